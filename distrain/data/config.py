"""Config sections of the data sets and of the augmentation."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from distrain.data.storage.url import expand_home, forbid_url_secrets
from distrain.fields import Section, make_conflict, operation_field, result_field

_SIZE_UNITS = "KMGTPE"
# Above zero, with a unit such as KiB, KB, K or B, in any case, or with none.
_SIZE_PATTERN = (
    r"^\s*(?=[0-9.]*[1-9])([0-9]*\.?[0-9]+)\s*"
    r"(([KMGTPEkmgtpe])([Ii](?=[Bb]))?)?[Bb]?\s*$"
)
_SIZE_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": _SIZE_PATTERN},
    ]
}


def _parse_size(value: Any) -> int:
    """Parse a number of bytes, or a text such as 64GiB."""
    # YAML reads 1e9 as a float.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    size = re.match(_SIZE_PATTERN, value) if isinstance(value, str) else None
    if size is None:
        raise ValueError(
            f"must be a number of bytes or a size such as 64GiB, not {value!r}"
        )
    number, _, unit, binary = size.groups()
    power = _SIZE_UNITS.index(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


_Size = Annotated[int, BeforeValidator(_parse_size), WithJsonSchema(_SIZE_SCHEMA)]


class DataConfig(Section):
    """Data sets, and how their samples are read and decoded."""

    train: str = operation_field()
    """URL (any fsspec scheme) or path of the training set, packed or indexed.
    [operation]"""
    val: str | None = operation_field(None)
    """URL or path of the validation set, packed or indexed; null: no evaluation.
    [operation]"""
    pack: Literal["digits"] | None = operation_field(None)
    """Built-in source that is packed into `train` and `val` on first use; digits:
    scikit-learn's scanned digits; null: the data sets must exist. [operation]"""
    fingerprint: str | None = result_field(None)
    """SHA-256 of the training set's manifest; null: filled in when the run starts, so
    that a resume on other data is refused. [result]"""
    shuffle_rows: int = result_field(1024, ge=1)
    """Rows per shuffled block of a virtual worker's stream; each virtual worker holds
    about that many in memory. [result]"""
    backend: Literal["dali", "torch"] = result_field("dali")
    """Decoder of images. dali: NVIDIA DALI; torch: PIL and torch, a plain reference for
    machines without DALI. [result]"""
    normalise: Literal["loader", "device"] = result_field("loader")
    """Place where pixels become normalized floats: in the decoder (loader), or from
    bytes on the device that computes (device). [result]"""
    pixel_limit: int = result_field(50_000_000, ge=1)
    """Pixels; an image that claims more is a bad sample, so that a damaged header
    cannot take all memory. [result]"""
    memory: _Size = operation_field(2 << 30, gt=0)
    """Bytes of row groups that one rank keeps in memory, a number or a text such as
    512MiB or 2GiB; beyond them rows are read again. [operation]"""
    connections: int = operation_field(8, ge=1)
    """Row groups that are fetched at once, ahead of the step. [operation]"""
    cache: str | None = operation_field(None)
    """Folder on this machine's disk that keeps row groups for later epochs, shared by
    all ranks on the machine; null: none. [operation]"""
    cache_bytes: _Size = operation_field(64 << 30, gt=0)
    """Bytes that `cache` may hold, a number or a text such as 64GiB. [operation]"""
    decode_threads: int | None = operation_field(None, ge=1)
    """Threads that decode images; null: one per CPU core of the rank. [operation]"""
    read_ahead: int = operation_field(2, ge=1)
    """Micro-batches that are decoded ahead of the step. [operation]"""
    patience: float = operation_field(60.0, ge=0)
    """Seconds for which a failed read is retried before the attempt ends.
    [operation]"""
    max_bad_samples: int = operation_field(100, ge=0)
    """Distinct samples that may turn out not to decode before the run stops; 0: the
    first one stops it. [operation]"""

    @field_validator("train", "val", "cache")
    @classmethod
    def _expand_home(cls, value: str | None) -> str | None:
        return expand_home(value)

    @field_validator("train", "val")
    @classmethod
    def _check_no_secret(cls, value: str | None) -> str | None:
        return forbid_url_secrets(value)


class Augment(Section):
    """Augmentation of training images (Krizhevsky et al. 2012, section 4.1).

    It is drawn per sample and epoch.
    """

    crop: int = result_field(224, ge=1)
    """Side of the square image that the network takes, in pixels. [result]"""
    short_side: int | None = result_field(None, ge=1)
    """Pixels that the short side is resized to before the crop, at least `crop`; null:
    images are used as they are stored. [result]"""
    window: Literal["crop", "random_resized", "centre"] = result_field("crop")
    """Window that is cut out. crop: at a random place; random_resized: 8 to 100 % of
    the area, sides 3:4 to 4:3, resized (Szegedy et al. 2015); centre: always the
    center, as in evaluation. [result]"""
    mirror: bool = result_field(True)
    """Flip half of the images left to right, at random. [result]"""
    colour: float = result_field(0.1, ge=0)
    """Standard deviation of the random numbers of the PCA color shift; 0: no shift. The
    default is that of Krizhevsky et al. 2012. [result]"""
    colour_unit: Literal["deviation", "variance"] = result_field("deviation")
    """Quantity that these numbers multiply along each principal axis of the training
    set's colors. deviation: the standard deviation, that is, the root of the
    eigenvalue, as in the released source of 2012; variance: the eigenvalue itself, of
    colors from 0 to 1, as the paper's formula reads and as most code since has it. On
    photographs the first is twice as strong. [result]"""
    draws: Literal["sample", "chunk"] = result_field("sample")
    """sample: window and mirror are drawn for each sample; chunk: once for 32 samples
    that follow each other in a virtual worker, as in the released source of 2012.
    Colors are drawn for each sample. [result]"""
    scale: float | None = result_field(None, gt=0)
    """Divisor of the pixels (0 to 255) after their mean is subtracted, above 0, in
    evaluation too; null: the training set's standard deviation of each channel. The
    paper of 2012 has 1, its source 1.1. [result]"""

    # Checks one field against another, but hangs on a single field, so that it is
    # reported together with all other problems.
    @field_validator("short_side")
    @classmethod
    def _check_crop_fits(
        cls,
        value: int | None,
        info: ValidationInfo,
    ) -> int | None:
        crop = info.data.get("crop")
        if value is not None and crop is not None and value < crop:
            raise make_conflict(
                f"{value} is less than augment.crop = {crop}: raise it",
                "crop",
            )
        return value
