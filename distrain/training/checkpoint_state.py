"""Contents of a checkpoint's `state.json`: everything in it but the tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from distrain.optim.early_stopping import StopState
from distrain.optim.schedule import PlateauState


@dataclass(frozen=True)
class BestEval:
    """Best evaluation of a run so far."""

    step: int
    """Steps done."""
    top1: int
    """Validation samples whose highest logit is their label's."""
    samples: int
    """Images that were evaluated."""
    val: str | None
    """Fingerprint of the validation set."""


@dataclass(frozen=True)
class CheckpointState:
    """State of a run between two steps, and what it must be resumed with."""

    cursor: Mapping[str, int]
    """Epoch, and step in that epoch, that come next."""
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    """Fields of the config that decide the weights."""
    environment: Mapping[str, str]
    """Versions, and kinds of processor and GPU."""
    hardware: str | None
    """Hash of what the hardware computes; None if bits are not promised."""
    bad_samples: Mapping[int, str]
    """Reason by sample id, of the training samples that do not decode."""
    best: BestEval | None
    """Best of all evaluations so far."""
    scheduled_best: BestEval | None
    """Best without an evaluation that was made only because the run ended there: this
    one counts if the run is trained for more epochs."""
    plateau: PlateauState
    """Validation history of a schedule that follows validation."""
    stop: StopState
    """Validation history of early stopping; kept without it too."""
    val: str | None
    """Fingerprint of the validation set."""
    reduction: str
    """exact or fast."""

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain values for JSON."""
        # JSON's keys are strings.
        bad_samples = {
            str(sample): self.bad_samples[sample] for sample in sorted(self.bad_samples)
        }
        return {
            **asdict(self),
            "bad_samples": bad_samples,
            "best": _best_to_dict(self.best),
            "scheduled_best": _best_to_dict(self.scheduled_best),
        }

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> "CheckpointState":
        """Rebuild a state from what `to_dict` returned."""
        # Undo what JSON does to integer keys, dataclasses and tuples. Keys that are not
        # fields, such as the format version, are left out. Early checkpoints have
        # neither `scheduled_best` nor `stop`.
        tree = {"scheduled_best": tree["best"], "stop": {}, **tree}
        values = {field.name: tree[field.name] for field in fields(CheckpointState)}
        values["bad_samples"] = {
            int(sample): reason for sample, reason in tree["bad_samples"].items()
        }
        for key in ("best", "scheduled_best"):
            values[key] = BestEval(**tree[key]) if tree[key] else None
        plateau = tree["plateau"]
        values["plateau"] = PlateauState(
            plateau["best"], plateau["epochs"], tuple(plateau["drops"])
        )
        values["stop"] = StopState(**tree["stop"])
        return CheckpointState(**values)


def _best_to_dict(best: BestEval | None) -> dict[str, Any]:
    return asdict(best) if best else {}
