"""Config section of the ranks of a run and their resources."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from distrain.fields import Section, operation_field


def _is_count(value: Any) -> bool:
    # bool is a subclass of int in Python, but `true` is not a number of workers.
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse_workers(value: Any) -> Any:
    """Parse `auto`, a number, or [minimum, maximum]; a number becomes both limits."""
    if value == "auto":
        return value
    limits = (value, value) if _is_count(value) else value
    is_pair = isinstance(limits, list | tuple) and len(limits) == 2
    if is_pair and all(_is_count(limit) for limit in limits):
        return tuple(limits)
    raise ValueError(
        f"must be auto, a number of at least 1, or [minimum, maximum], not {value!r}"
    )


def _check_cpus(value: Any) -> Any:
    if value == "auto" or _is_count(value):
        return value
    raise ValueError(f"must be auto, or a number of at least 1, not {value!r}")


def _check_gpus(value: Any) -> Any:
    # bool is a subclass of int in Python, but `true` is not a number of GPUs.
    if value == "auto" or (not isinstance(value, bool) and value in (0, 1)):
        return value
    raise ValueError(f"must be auto, 0 or 1, not {value!r}")


Auto = Literal["auto"]
# What the validators above accept, for the JSON Schema.
_Count = Annotated[int, Field(ge=1)]
_WorkersInput = Auto | _Count | tuple[_Count, _Count]

_Workers = Annotated[
    tuple[int, int] | Auto,
    BeforeValidator(_parse_workers, json_schema_input_type=_WorkersInput),
]
_Cpus = Annotated[
    int | Auto,
    BeforeValidator(_check_cpus, json_schema_input_type=Auto | _Count),
]
_Gpus = Annotated[
    int | Auto,
    BeforeValidator(_check_gpus, json_schema_input_type=Auto | Literal[0, 1]),
]


class Cluster(Section):
    """Ranks of a run, on a Ray cluster or as several workers on one machine."""

    workers: _Workers = operation_field("auto")
    """Number of ranks, at most V: one number, or [minimum, maximum], within which the
    run grows and shrinks with the cluster. auto: 1 to the number of GPUs, on this
    machine or in the cluster; 1 if there are no GPUs. [operation]"""
    cpus_per_worker: _Cpus = operation_field("auto")
    """CPU cores per rank, which decode images; on a CPU as many virtual workers are
    computed side by side. auto: an equal share of a node's cores. [operation]"""
    gpus_per_worker: _Gpus = operation_field("auto")
    """GPUs per rank, 0 or 1. auto: 1 wherever there are GPUs, unless `device` is cpu.
    [operation]"""
    wait: float = operation_field(1800.0, ge=0)
    """Seconds for which a run waits until the cluster has room for the minimum number
    of workers. [operation]"""
    stall: float = operation_field(300.0, gt=0)
    """Seconds without progress, above 0, after which a rank counts as hanging; in local
    runs too. [operation]"""
    max_failures: int = operation_field(3, ge=1)
    """Number of failed attempts in a row, without a new checkpoint, that ends the run.
    [operation]"""
