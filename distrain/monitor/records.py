"""Metrics records: one per log step and one per evaluation.

Each is a line of JSON in `metrics-<attempt>.jsonl`, with the fields below as its keys.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class TrainRecord:
    """Training since the last log step, over all ranks."""

    kind: ClassVar[str] = "train"
    split: ClassVar[str] = "train"
    """Label `split` of the metrics that it sets."""

    step: int
    """Steps of the run that are done."""
    epoch: int
    """Epoch of the last of these steps, from 0."""
    loss: float
    """Mean over valid samples."""
    top1: float
    """Fraction of valid samples whose highest logit is their label's."""
    top5: float
    """Fraction of valid samples with their label among the five highest logits."""
    lr: float
    """Learning rate of the last step."""
    seconds: float
    """Time since the last log step, without evaluations."""
    images_per_second: float
    data_wait: float
    """Fraction of that time in which this rank waited for data, from 0 to 1."""
    bad_samples: int
    """Distinct training samples that could not be decoded, over the run so far."""
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Time of each phase on rank 0 since the last log step, summed over its lanes; of
    forward and backward those run side by side. Runs before it was recorded have none.
    """


@dataclass(frozen=True)
class EvalRecord:
    """Evaluation on the validation set."""

    kind: ClassVar[str] = "eval"
    split: ClassVar[str] = "val"
    """Label `split` of the metrics that it sets."""

    step: int
    """Steps of the run that are done."""
    epoch: int
    """Epoch of the last of these steps, from 0."""
    loss: float
    """Mean over samples; NaN if the loss of any sample is not finite."""
    top1: float
    """Fraction of samples whose highest logit is their label's."""
    top5: float
    """Fraction of samples with their label among the five highest logits."""
    top1_count: int
    top5_count: int
    samples: int
    """Images that were evaluated."""
    seconds: float
    classes: int


MetricsRecord = TrainRecord | EvalRecord
_RECORD_TYPES: dict[str, type[TrainRecord] | type[EvalRecord]] = {
    record_type.kind: record_type for record_type in (TrainRecord, EvalRecord)
}


def record_to_dict(record: MetricsRecord) -> dict[str, Any]:
    """Return a record as a dict for JSON, `kind` first."""
    return {"kind": record.kind, **asdict(record)}


def record_from_dict(tree: Mapping[str, Any]) -> MetricsRecord:
    """Return the record that `record_to_dict` turned into `tree`.

    JSON has no NaN and no infinity: null becomes NaN.

    Raises:
        KeyError: the kind is unknown, or a field is missing.
    """
    record_type = _RECORD_TYPES[tree["kind"]]
    values: dict[str, Any] = {}
    for column in fields(record_type):
        # Earlier versions did not write the fields that have a default.
        if column.name not in tree and column.default_factory is not MISSING:
            continue
        value = tree[column.name]
        values[column.name] = float("nan") if value is None else value
    return record_type(**values)
