"""Sections of a config: where samples come from, and what is done to them."""

from typing import Literal

from pydantic import ByteSize, ValidationInfo, field_validator

from distrain.data.storage.url import forbid_url_secrets
from distrain.fields import Section, operation_field, result_field


class DataConfig(Section):
    """Where samples come from and how they travel."""

    train: str = operation_field()
    """URL (any fsspec scheme) or path of the packed training set. [operation]"""
    val: str | None = operation_field(None)
    """URL or path of the packed validation set; null: no evaluation. [operation]"""
    pack: Literal["digits"] | None = operation_field(None)
    """Built-in source that is packed into `train` and `val` on first use: scikit-learn's scanned digits. [operation]"""
    fingerprint: str | None = result_field(None)
    """SHA-256 of the training set's manifest; null: filled in when the run starts. [result]"""
    shuffle_rows: int = result_field(1024, ge=1)
    """Rows of one shuffled block of a virtual worker's stream; it holds about that many in memory. [result]"""
    backend: Literal["dali", "torch"] = result_field("dali")
    """dali: NVIDIA DALI; torch: PIL and torch, a plain reference for machines without DALI. [result]"""
    normalise: Literal["loader", "device"] = result_field("loader")
    """Where pixels become normalised floats: in the decoder's graph, or on the device from bytes. [result]"""
    pixel_limit: int = result_field(50_000_000, ge=1)
    """Pixels; an image that claims more is a bad sample. [result]"""
    memory: ByteSize = operation_field(ByteSize(2 << 30), gt=0)
    """Bytes of row groups that one rank keeps; beyond it rows are read again. Accepts 512MiB, 2GiB. [operation]"""
    connections: int = operation_field(8, ge=1)
    """Row groups fetched at once, ahead of the step. [operation]"""
    cache: str | None = operation_field(None)
    """Folder on this machine's disk where row groups are kept for later epochs, shared by all ranks; null: none.
    [operation]"""
    cache_bytes: ByteSize = operation_field(ByteSize(64 << 30), gt=0)
    """Bytes that the cache may hold. [operation]"""
    decode_threads: int | None = operation_field(None, ge=1)
    """Threads that decode images; null: as many as the rank has CPU cores. [operation]"""
    read_ahead: int = operation_field(2, ge=1)
    """Micro-batches decoded ahead of the step. [operation]"""
    patience: float = operation_field(60.0, ge=0)
    """Seconds for which a read that fails is tried again before the attempt ends. [operation]"""
    max_bad_samples: int = operation_field(100, ge=0)
    """Distinct samples that may turn out undecodable before the run stops. [operation]"""

    @field_validator("train", "val")
    @classmethod
    def _check_no_secret(cls, value: str | None) -> str | None:
        return forbid_url_secrets(value)


class Augment(Section):
    """What is done to a training image, per sample and epoch (Krizhevsky et al. 2012, section 4.1)."""

    crop: int = result_field(224, ge=1)
    """Side of the square image that the network sees, in pixels. [result]"""
    short_side: int | None = result_field(None, ge=1)
    """Pixels that the short side is resized to before the crop; null: images are used as they are stored. [result]"""
    window: Literal["crop", "random_resized", "centre"] = result_field("crop")
    """crop: at a random place; random_resized: 8 to 100 % of the area, sides 3:4 to 4:3, resized (Szegedy et al. 2015);
    centre: always there, as in evaluation. [result]"""
    mirror: bool = result_field(True)
    """Flip half of the images left to right. [result]"""
    colour: float = result_field(0.1, ge=0)
    """Standard deviation of the random numbers of the PCA colour shift; 0: none. [result]"""
    colour_unit: Literal["deviation", "variance"] = result_field("deviation")
    """What they multiply along each principal axis of the training set's colours. deviation: the standard deviation,
    the root of the eigenvalue, as in the released source of 2012; variance: the eigenvalue itself, of colours from 0
    to 1, as the paper's formula reads and most code since has it. On photographs the first is twice as strong.
    [result]"""
    draws: Literal["sample", "chunk"] = result_field("sample")
    """sample: window and mirror are drawn for each sample; chunk: once for 32 that follow each other in a virtual
    worker, as in the released source of 2012. Colours are drawn for each sample. [result]"""
    scale: float | None = result_field(None, gt=0)
    """What pixels (0 to 255), less their mean, are divided by, in evaluation too; null: the training set's standard
    deviation of each channel. The paper of 2012 has 1, its source 1.1. [result]"""

    # On a single field, so that it is reported together with all other problems.
    @field_validator("short_side")
    @classmethod
    def _check_crop_fits(cls, value: int | None, info: ValidationInfo) -> int | None:
        crop = info.data.get("crop")
        if value is not None and crop is not None and value < crop:
            raise ValueError(f"{value} is less than augment.crop = {crop}: raise it")
        return value
