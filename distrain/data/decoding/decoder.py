"""Interface of the decoders: the plan, their input, and the error they raise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.augment import AugmentParams


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """Operations on each image of a batch, the same on every device."""

    batch_size: int
    """Images per batch."""
    crop_size: int
    """Side of the result in pixels."""
    is_raw: bool
    """Images are pixels of shape (height, width, 3), not files."""
    resize: bool
    """Windows are resized to the crop; otherwise they have the crop's size, and corners
    at whole pixels."""
    decode_full_image: bool
    """Decode whole images, since whether a file decodes must not depend on the window.
    Not needed for files that were verified before."""
    normalize: bool
    """The result is float32 (n, 3, crop, crop), mirrored and normalized; otherwise
    uint8 (n, crop, crop, 3)."""
    std: NDArray[np.float32]
    """Standard deviation of each channel, shape (3,)."""


class DecodeInput(NamedTuple):
    """One batch of n images for a decoder."""

    images: list[NDArray[np.uint8]]
    """n files that decode, or n images of pixels. They may be views; DALI keeps
    references to them."""
    image_sizes: NDArray[np.int64]
    """Height and width of each image in pixels, shape (n, 2)."""
    augment_params: AugmentParams
    mean: NDArray[np.float32]
    """Subtracted from every pixel, RGB in units of 0 to 255, shape (n, 3); it includes
    the color shift."""


class DecodeError(Exception):
    """Failure to decode the oldest batch that a decoder was fed."""

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        """Index of the failing image in the batch; None: unknown."""


class Decoder(Protocol):
    """Decoder of the batches that a source returns, running ahead of the caller."""

    def decode_batch(self) -> torch.Tensor:
        """Return the next batch.

        Raises:
            StopIteration: the source has ended.
            DecodeError: an image does not decode.
        """

    def close(self) -> None:
        """Release threads and memory."""


InputSource = Callable[[], DecodeInput]
"""Returns the next batch to decode; raises StopIteration at the end."""


def normalize_images(
    images: torch.Tensor,
    mirror: NDArray[np.int32],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> torch.Tensor:
    """Mirror and normalize images on their device.

    Args:
        images: uint8 of shape (n, crop, crop, 3).
        mirror: 1 where the image is flipped left to right, shape (n,).
        mean: subtracted from every pixel, shape (n, 3).
        std: divides every pixel, shape (3,).

    Returns:
        float32 of shape (n, 3, crop, crop).
    """
    device = images.device
    offset = torch.from_numpy(mean).to(device, non_blocking=True)
    # A factor, not a divisor, as in DALI: the two decoders' results then differ by no
    # more than the rounding of one product.
    factor = torch.from_numpy(np.float32(1) / std).to(device, non_blocking=True)
    flipped = torch.from_numpy(mirror != 0).to(device, non_blocking=True)

    channels_first = images.permute(0, 3, 1, 2).float()
    centered = channels_first - offset[:, :, None, None]
    normalized = centered * factor[:, None, None]
    is_mirrored = flipped[:, None, None, None]
    mixed = torch.where(is_mirrored, normalized.flip(3), normalized)
    return mixed.contiguous()
