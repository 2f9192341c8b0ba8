"""The sections of a config that come in one form: data, augmentation, reduction, and how the run goes on."""

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ByteSize, field_validator

from distrain.sections import Section, operation, result

_SECRET = r"(?i)(signature|token|secret|sig|password|passwd|pwd|credential)="  # noqa: S105 - what secrets are called


def without_secret(url: str | None) -> str | None:
    """Refuse a URL with a password or a signature: it would be saved with the config, and shown."""
    for part in url.split("::") if url is not None and "://" in url else ():
        parts = urlsplit(part)
        if parts.password is not None or re.search(
            r"(?i)(signature|token|secret|sig|password|passwd|pwd|credential)=", parts.query
        ):
            raise ValueError(
                "the URL holds a secret, which would be saved and shown: "
                "give credentials in the environment, a profile or a role"
            )
    return url


class Data(Section):
    """Where samples come from and how they travel."""

    train: str = operation()
    """URL (any fsspec scheme) or path of the packed training set. [operation]"""
    val: str | None = operation(None)
    """URL or path of the packed validation set; null: no evaluation. [operation]"""
    pack: Literal["digits"] | None = operation(None)
    """Built-in source that is packed into `train` and `val` on first use: scikit-learn's scanned digits. [operation]"""
    fingerprint: str | None = result(None)
    """SHA-256 of the training set's manifest; null: filled in when the run starts. [result]"""
    shuffle_rows: int = result(1024, ge=1)
    """Rows of one shuffled block of a virtual worker's stream; it holds about that many in memory. [result]"""
    backend: Literal["dali", "torch"] = result("dali")
    """dali: NVIDIA DALI; torch: PIL and torch, a plain reference for machines without DALI. [result]"""
    normalise: Literal["loader", "device"] = result("loader")
    """Where pixels become normalised floats: in the decoder's graph, or on the device from bytes. [result]"""
    pixel_limit: int = result(50_000_000, ge=1)
    """Pixels; an image that claims more is a bad sample. [result]"""
    memory: ByteSize = operation(ByteSize(2 << 30), gt=0)
    """Bytes of row groups that one rank keeps; beyond it rows are read again. Accepts 512MiB, 2GiB. [operation]"""
    connections: int = operation(8, ge=1)
    """Row groups fetched at once, ahead of the step. [operation]"""
    cache: str | None = operation(None)
    """Folder on this machine's disk where row groups are kept for later epochs, shared by all ranks; null: none.
    [operation]"""
    cache_bytes: ByteSize = operation(ByteSize(64 << 30), gt=0)
    """Bytes that the cache may hold. [operation]"""
    decode_threads: int | None = operation(None, ge=1)
    """Threads that decode images; null: as many as the rank has CPU cores. [operation]"""
    read_ahead: int = operation(2, ge=1)
    """Micro-batches decoded ahead of the step. [operation]"""
    patience: float = operation(60.0, ge=0)
    """Seconds for which a read that fails is tried again before the attempt ends. [operation]"""
    max_bad_samples: int = operation(100, ge=0)
    """Distinct samples that may turn out undecodable before the run stops. [operation]"""

    @field_validator("train", "val")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        return without_secret(value)


class Augment(Section):
    """What is done to a training image, per sample and epoch (Krizhevsky et al. 2012, section 4.1)."""

    crop: int = result(224, ge=1)
    """Side of the square image that the network sees, in pixels. [result]"""
    short_side: int | None = result(None, ge=1)
    """Pixels that the short side is resized to before the crop; null: images are used as they are stored. [result]"""
    window: Literal["crop", "random_resized", "centre"] = result("crop")
    """crop: at a random place; random_resized: 8 to 100 % of the area, sides 3:4 to 4:3, resized (Szegedy et al. 2015);
    centre: always there, as in evaluation. [result]"""
    mirror: bool = result(True)
    """Flip half of the images left to right. [result]"""
    colour: float = result(0.1, ge=0)
    """Standard deviation of the random numbers of the PCA colour shift; 0: none. [result]"""
    colour_unit: Literal["deviation", "variance"] = result("deviation")
    """What they multiply along each principal axis of the training set's colours. deviation: the standard deviation,
    the root of the eigenvalue, as in the released source of 2012; variance: the eigenvalue itself, of colours from 0
    to 1, as the paper's formula reads and most code since has it. On photographs the first is twice as strong.
    [result]"""
    draws: Literal["sample", "chunk"] = result("sample")
    """sample: window and mirror are drawn for each sample; chunk: once for 32 that follow each other in a virtual
    worker, as in the released source of 2012. Colours are drawn for each sample. [result]"""
    scale: float | None = result(None, gt=0)
    """What pixels (0 to 255), less their mean, are divided by, in evaluation too; null: the training set's standard
    deviation of each channel. The paper of 2012 has 1, its source 1.1. [result]"""


class Reduction(Section):
    """How the gradients of the virtual workers are added up."""

    mode: Literal["exact", "fast"] = result("exact")
    """exact: fixed-point integers, the same bits in any order; fast: fp32, equal to rounding. [result]"""
    fraction_bits: int = result(48, ge=16, le=60)
    """Bits behind the point of the 64-bit fixed-point gradient of the mean loss. [result]"""


class Evaluate(Section):
    """Validation: centre crop, each image once."""

    every: int | None = operation(None, ge=1)
    """Steps between evaluations; null: once an epoch. The last step is always evaluated. [operation]"""
    batch: int = result(128, ge=1)
    """Samples of one fixed chunk. [result]"""


class Checkpoint(Section):
    """What is kept of the run."""

    every: int | None = operation(None, ge=1)
    """Steps between checkpoints; null: once an epoch. The last step is always kept. [operation]"""
    keep: int = operation(2, ge=1)
    """Newest checkpoints kept, beside the best. [operation]"""
    patience: float = operation(120.0, ge=0)
    """Seconds for which a save that fails is tried again before the attempt ends. [operation]"""


class Log(Section):
    """What is told of the run."""

    every: int = operation(10, ge=1)
    """Steps between metrics lines; numbers stay on the device in between. [operation]"""
    tensorboard: bool = operation(False)
    """Write TensorBoard's event files too, in `tensorboard` of the run directory. [operation]"""
    mlflow: str | None = operation(None)
    """URI of an MLflow tracking server that is told too; null: none. Credentials are in the environment. [operation]"""

    @field_validator("mlflow")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        return without_secret(value)


class Metrics(Section):
    """What Prometheus may read of the run: one page a node, for all ranks of it."""

    port: int | None = operation(9477, ge=1, le=65535)
    """Port of the page; if it is taken, the next that is free; null: there is none. [operation]"""
    address: str = operation("127.0.0.1")
    """Address that the page is served on; on a cluster that of the nodes, or 0.0.0.0 behind a fence. [operation]"""
    linger: float = operation(15.0, ge=0)
    """Seconds for which a run that has ended waits for its page to be read once more, if it was read before.
    [operation]"""


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _workers(value: Any) -> Any:
    """One number of workers as least and most."""
    if value == "auto":
        return value
    both = (value, value) if _count(value) else value
    if isinstance(both, list | tuple) and len(both) == 2 and all(map(_count, both)):
        return tuple(both)
    raise ValueError(f"must be auto, a number of at least 1, or [least, most], not {value!r}")


def _cpus(value: Any) -> Any:
    if value == "auto" or _count(value):
        return value
    raise ValueError(f"must be auto, or a number of at least 1, not {value!r}")


def _gpus(value: Any) -> Any:
    if value == "auto" or (not isinstance(value, bool) and value in (0, 1)):
        return value
    raise ValueError(f"must be auto, 0 or 1, not {value!r}")


Auto = Literal["auto"]


class Cluster(Section):
    """How a run is spread over a Ray cluster, or over workers on one machine."""

    workers: Annotated[tuple[int, int] | Auto, BeforeValidator(_workers)] = operation("auto")
    """Ranks: a number, or [least, most]: the run grows and shrinks with the cluster. auto: 1 to as many as there are
    GPUs, on this machine or in the cluster; without GPUs one. At most V. [operation]"""
    cpus_per_worker: Annotated[int | Auto, BeforeValidator(_cpus)] = operation("auto")
    """CPU cores of each rank, which decode images; on a CPU as many virtual workers are computed side by side. auto: an
    equal share of a machine's. [operation]"""
    gpus_per_worker: Annotated[int | Auto, BeforeValidator(_gpus)] = operation("auto")
    """GPUs of each rank, 0 or 1. auto: 1 wherever there are GPUs, unless `device` is cpu. [operation]"""
    wait: float = operation(1800.0, ge=0)
    """Seconds for which a run waits until the cluster has room for the least number of workers. [operation]"""
    stall: float = operation(300.0, gt=0)
    """Seconds without progress after which a rank is taken to hang; local runs too. [operation]"""
    max_failures: int = operation(3, ge=1)
    """Failed attempts in a row, without a new checkpoint, that end the run. [operation]"""
