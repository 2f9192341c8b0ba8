"""Metrics records: one per log step and one per evaluation, each a line of JSON in `metrics-<attempt>.jsonl`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class TrainRecord:
    """Training since the last log step, of all ranks."""

    kind: ClassVar[str] = "train"
    split: ClassVar[str] = "train"
    """The label of its metrics."""

    step: int
    """Steps of the run that are done."""
    epoch: int
    """Epoch of the last of them, from 0."""
    loss: float
    """Mean over valid samples."""
    top1: float
    """Share of valid samples whose highest logit is their label's."""
    top5: float
    """Share of valid samples with their label among the five highest logits."""
    lr: float
    """Learning rate of the last step."""
    seconds: float
    """Time since the last log step, without evaluations."""
    images_per_second: float
    data_wait: float
    """Share of that time in which this rank waited for data, from 0 to 1."""
    bad_samples: int
    """Distinct training samples that do not decode, of the whole run so far."""


@dataclass(frozen=True)
class EvalRecord:
    """An evaluation on the validation set."""

    kind: ClassVar[str] = "eval"
    split: ClassVar[str] = "val"
    """The label of its metrics."""

    step: int
    """Steps of the run that are done."""
    epoch: int
    """Epoch of the last of them, from 0."""
    loss: float
    """Mean over samples; NaN where one of them is not finite."""
    top1: float
    """Share of samples whose highest logit is their label's."""
    top5: float
    """Share of samples with their label among the five highest logits."""
    top1_count: int
    top5_count: int
    samples: int
    """Images that were evaluated."""
    seconds: float
    classes: int


MetricsRecord = TrainRecord | EvalRecord
_RECORD_TYPES: dict[str, type[TrainRecord] | type[EvalRecord]] = {
    form.kind: form for form in (TrainRecord, EvalRecord)
}


def record_to_dict(record: MetricsRecord) -> dict[str, Any]:
    """Return a record as JSON has it, `kind` first."""
    return {"kind": record.kind, **asdict(record)}


def record_from_dict(tree: Mapping[str, Any]) -> MetricsRecord:
    """Return the record that `to_tree` made a tree of; null stands for a number that JSON lacks."""
    form = _RECORD_TYPES[tree["kind"]]
    values: dict[str, Any] = {field.name: tree[field.name] for field in fields(form)}
    values.update(
        {name: float("nan") for name, value in values.items() if value is None}
    )
    return form(**values)
