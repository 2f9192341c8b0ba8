"""Phases of a training step, each of which is timed."""

from enum import Enum


class Phase(str, Enum):
    """Phase of a step, in the order of a step.

    The value is the label `phase` of the metric `distrain_phase_seconds`.
    """

    DATA_WAIT = "data_wait"
    TRANSFER = "transfer"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCTION = "reduction"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"

    # Print the value, as StrEnum does, which came with Python 3.11.
    __str__ = str.__str__
