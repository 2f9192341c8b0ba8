"""What a checkpoint says beside its tensors, in `state.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from distrain.optim.schedule import PlateauState


@dataclass(frozen=True)
class BestEval:
    """The best evaluation of a run so far."""

    step: int
    """Steps that were done."""
    top1: int
    """Validation samples whose highest logit is their label's."""
    samples: int
    """Images that were evaluated."""
    val: str | None
    """Fingerprint of the validation set."""


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stands, and what it may be resumed with."""

    cursor: Mapping[str, int]
    """Epoch, and step in it, that come next."""
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    """The fields of the config that decide the weights."""
    environment: Mapping[str, str]
    """Versions, and kinds of processor and GPU."""
    hardware: str | None
    """Hash of what the hardware computes; None where no bits are promised."""
    bad_samples: Mapping[int, str]
    """Reason by sample id, of the training samples that do not decode."""
    best: BestEval | None
    plateau: PlateauState
    """Validation history of a schedule that follows validation."""
    val: str | None
    """Fingerprint of the validation set."""
    reduction: str
    """exact or fast."""

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        bad_samples = {
            str(sample): self.bad_samples[sample] for sample in sorted(self.bad_samples)
        }
        return {
            **asdict(self),
            "bad_samples": bad_samples,
            "best": asdict(self.best) if self.best else {},
        }

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "CheckpointState":
        """Return the state that `to_tree` made a tree of."""
        found = {field.name: tree[field.name] for field in fields(CheckpointState)}
        found["bad_samples"] = {
            int(sample): reason for sample, reason in tree["bad_samples"].items()
        }
        found["best"] = BestEval(**tree["best"]) if tree["best"] else None
        plateau = tree["plateau"]
        found["plateau"] = PlateauState(
            plateau["best"], plateau["epochs"], tuple(plateau["drops"])
        )
        return CheckpointState(**found)
