"""What happens to each sample: crop window, mirror and PCA colour shift, drawn per sample, never from a stream.

Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks" (NIPS 2012),
section 4.1. A draw is a pure function of (seed, epoch, sample id).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.philox import Purpose, words


@dataclass(frozen=True)
class Draws:
    """One draw a sample."""

    start: NDArray[np.int32]
    """Top and left of the crop window in pixels, shape (n, 2)."""
    mirror: NDArray[np.int32]
    """1 where the image is flipped left to right, shape (n,)."""
    colour: NDArray[np.float32]
    """Added to every pixel, RGB in units of 0 to 255, shape (n, 3)."""


def draw(
    seed: int,
    epoch: int,
    ids: NDArray[np.int64],
    *,
    size: tuple[int, int],
    crop: int,
    mirror: bool,
    colour: NDArray[np.float64],
) -> Draws:
    """Draw the augmentation of each sample.

    Args:
        seed: 32-bit seed of the run.
        epoch: from 0.
        ids: sample ids, shape (n,).
        size: height and width of the stored images in pixels.
        crop: side of the square window in pixels.
        mirror: whether to flip half of the samples.
        colour: standard deviation times principal axis, one axis a column, shape (3, 3); zeros for none.
    """
    low, high = ids & 0xFFFFFFFF, ids >> 32
    w = words(seed, Purpose.AUGMENT, 0, epoch, low, high).astype(np.uint64)  # (4, n)
    # A 32-bit word times a range, shifted back, is uniform to within range / 2^32.
    span = np.array([size[0] - crop + 1, size[1] - crop + 1], np.uint64)
    start = (w[:2].T * span) >> np.uint64(32)
    return Draws(
        start=start.astype(np.int32, order="C"),
        mirror=(w[2] & np.uint64(mirror)).astype(np.int32),
        colour=(_normals(words(seed, Purpose.AUGMENT, 1, epoch, low, high)) @ colour.T).astype(np.float32, order="C"),
    )


def centre(n: int, *, size: tuple[int, int], crop: int) -> Draws:
    """The evaluation draw of n samples: the centre window, not mirrored, no colour shift."""
    start = np.tile(np.array([(size[0] - crop) // 2, (size[1] - crop) // 2], np.int32), (n, 1))
    return Draws(start, np.zeros(n, np.int32), np.zeros((n, 3), np.float32))


def _normals(w: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Three standard normal numbers from four words (Box and Muller 1958): (4, n) -> (n, 3)."""
    uniform = (w.astype(np.float64) + 1) / 2**32  # in (0, 1]
    radius = np.sqrt(-2 * np.log(uniform[:2]))
    angle = 2 * np.pi * uniform[2:]
    return np.stack([radius[0] * np.cos(angle[0]), radius[0] * np.sin(angle[0]), radius[1] * np.cos(angle[1])], axis=1)
