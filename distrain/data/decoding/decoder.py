"""What decoders do to a batch of images, whichever decodes it: the graph, what it is fed, how it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.augment import AugmentParams


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """What is done to each image of a batch, on whatever device."""

    batch_size: int
    """Images of a batch."""
    crop_size: int
    """Side of the result in pixels."""
    is_raw: bool
    """Images come as pixels of shape (height, width, 3), not as files."""
    resize: bool
    """Windows are resized to the crop; without, they have its size and whole numbers as corners."""
    decode_full_image: bool
    """Decode whole images: whether a file decodes must not depend on the window. Not needed for proved files."""
    normalize: bool
    """The result is float32 (n, 3, crop, crop), mirrored and normalised; without, uint8 (n, crop, crop, 3)."""
    std: NDArray[np.float32]
    """Standard deviation of each channel, shape (3,)."""


class DecodeInput(NamedTuple):
    """One batch of n images for the graph."""

    images: list[NDArray[np.uint8]]
    """n files that decode, or n images of pixels; they may be views, DALI holds on to them."""
    image_sizes: NDArray[np.int64]
    """Height and width of each image in pixels, shape (n, 2)."""
    augment_params: AugmentParams
    mean: NDArray[np.float32]
    """Subtracted from every pixel, RGB in units of 0 to 255, shape (n, 3): the colour shift is folded in."""


class DecodeError(Exception):
    """A decoder did not decode the oldest batch that it was fed."""

    def __init__(self, index: int | None, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        """Which image of the batch; None: not known."""


class Decoder(Protocol):
    """Runs a graph over what a source returns, ahead of the caller."""

    def decode_batch(self) -> torch.Tensor:
        """The next batch. Raises StopIteration at the source's end, RefusedError for an image that does not decode."""

    def close(self) -> None:
        """Let go of threads and memory."""


InputSource = Callable[[], DecodeInput]
"""The next batch to decode; raises StopIteration at the end."""


def normalize_images(
    images: torch.Tensor,
    mirror: NDArray[np.int32],
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
) -> torch.Tensor:
    """Mirror and normalise on the images' device: uint8 (n, crop, crop, 3) to float32 (n, 3, crop, crop)."""
    device = images.device
    offset = torch.from_numpy(mean).to(device, non_blocking=True)[:, :, None, None]
    # A factor, as DALI has it: then the two differ by no more than the rounding of one product.
    factor = torch.from_numpy(np.float32(1) / std).to(device, non_blocking=True)[
        :, None, None
    ]
    flipped = torch.from_numpy(mirror != 0).to(device, non_blocking=True)[
        :, None, None, None
    ]
    floats = (images.permute(0, 3, 1, 2).float() - offset) * factor
    return torch.where(flipped, floats.flip(3), floats).contiguous()
