"""Section of a config: how a run is spread over workers."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from distrain.fields import Section, operation_field


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse_workers(value: Any) -> Any:
    """One number of workers as least and most."""
    if value == "auto":
        return value
    both = (value, value) if _is_count(value) else value
    if isinstance(both, list | tuple) and len(both) == 2 and all(map(_is_count, both)):
        return tuple(both)
    raise ValueError(
        f"must be auto, a number of at least 1, or [least, most], not {value!r}"
    )


def _check_cpus(value: Any) -> Any:
    if value == "auto" or _is_count(value):
        return value
    raise ValueError(f"must be auto, or a number of at least 1, not {value!r}")


def _check_gpus(value: Any) -> Any:
    if value == "auto" or (not isinstance(value, bool) and value in (0, 1)):
        return value
    raise ValueError(f"must be auto, 0 or 1, not {value!r}")


Auto = Literal["auto"]


class Cluster(Section):
    """How a run is spread over a Ray cluster, or over workers on one machine."""

    workers: Annotated[tuple[int, int] | Auto, BeforeValidator(_parse_workers)] = (
        operation_field("auto")
    )
    """Ranks: a number, or [least, most]: the run grows and shrinks with the cluster. auto: 1 to as many as there are
    GPUs, on this machine or in the cluster; without GPUs one. At most V. [operation]"""
    cpus_per_worker: Annotated[int | Auto, BeforeValidator(_check_cpus)] = (
        operation_field("auto")
    )
    """CPU cores of each rank, which decode images; on a CPU as many virtual workers are computed side by side. auto: an
    equal share of a machine's. [operation]"""
    gpus_per_worker: Annotated[int | Auto, BeforeValidator(_check_gpus)] = (
        operation_field("auto")
    )
    """GPUs of each rank, 0 or 1. auto: 1 wherever there are GPUs, unless `device` is cpu. [operation]"""
    wait: float = operation_field(1800.0, ge=0)
    """Seconds for which a run waits until the cluster has room for the least number of workers. [operation]"""
    stall: float = operation_field(300.0, gt=0)
    """Seconds without progress after which a rank is taken to hang; local runs too. [operation]"""
    max_failures: int = operation_field(3, ge=1)
    """Failed attempts in a row, without a new checkpoint, that end the run. [operation]"""
