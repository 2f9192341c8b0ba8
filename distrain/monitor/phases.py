"""The phases of a training step, timed one by one."""

from enum import Enum


class Phase(str, Enum):
    """A part of a step, in the order of a step; the value is the label `phase` of `distrain_phase_seconds`."""

    DATA_WAIT = "data_wait"
    TRANSFER = "transfer"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCTION = "reduction"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"

    __str__ = str.__str__  # the value, as StrEnum of Python 3.11 has it
