"""The phases of a step, whose seconds are told apart."""

from enum import Enum


class Phase(str, Enum):
    """What a rank does in a step: the label `phase` of `distrain_phase_seconds`, in the order in which it comes."""

    DATA_WAIT = "data_wait"
    TRANSFER = "transfer"
    FORWARD = "forward"
    BACKWARD = "backward"
    REDUCTION = "reduction"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"

    __str__ = str.__str__  # the value, as StrEnum of Python 3.11 has it
