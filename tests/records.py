"""Records of a run for tests: what a log step and an evaluation tell."""

from typing import Any

from distrain.monitor.records import EvalRecord, TrainRecord

TRAIN: dict[str, Any] = {
    "step": 3,
    "epoch": 0,
    "loss": 2.0,
    "top1": 0.5,
    "top5": 0.75,
    "lr": 0.01,
    "seconds": 1.5,
    "images_per_second": 10.0,
    "data_wait": 0.0,
    "bad_samples": 0,
    "phase_seconds": {},
}
EVAL: dict[str, Any] = {
    "step": 3,
    "epoch": 0,
    "loss": 2.0,
    "top1": 0.5,
    "top5": 0.75,
    "top1_count": 2,
    "top5_count": 3,
    "samples": 4,
    "seconds": 1.5,
    "classes": 10,
}


def train_record(**changes: Any) -> TrainRecord:
    """A record of training; keywords are its fields."""
    return TrainRecord(**{**TRAIN, **changes})


def eval_record(**changes: Any) -> EvalRecord:
    """A record of an evaluation; keywords are its fields."""
    return EvalRecord(**{**EVAL, **changes})
