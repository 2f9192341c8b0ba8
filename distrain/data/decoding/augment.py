"""What happens to each sample: window, mirror and PCA colour shift, drawn per sample, never from a stream.

Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks" (NIPS 2012),
section 4.1. A draw is a pure function of (seed, epoch, sample id) and the image's size; as its source has it, with one
window and mirror for 32 images, of (seed, epoch, step, virtual worker, place) and the size.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from distrain.data.config import Augment
from distrain.data.order import Cursor
from distrain.philox import Purpose, draw_words

_AREA_RANGE = (0.08, 1.0)
_ASPECT_RANGE = (3 / 4, 4 / 3)
_MAX_TRIES = 10
_CHUNK_SIZE = 32


@dataclass(frozen=True)
class AugmentParams:
    """One draw a sample."""

    window_start: NDArray[np.float64]
    """Top and left of the window in pixels of the stored image, shape (n, 2); whole where nothing is resized."""
    window_size: NDArray[np.float64]
    """Height and width of the window in pixels of the stored image, shape (n, 2)."""
    mirror: NDArray[np.int32]
    """1 where the image is flipped left to right, shape (n,)."""
    color_shift: NDArray[np.float32]
    """Added to every pixel, RGB in units of 0 to 255, shape (n, 3)."""


def draw_augment_params(
    seed: int,
    cursor: Cursor,
    virtual_worker: int,
    sample_ids: NDArray[np.int64],
    image_sizes: NDArray[np.int64],
    augment: Augment,
    color_axes: NDArray[np.float64],
) -> AugmentParams:
    """Draw the augmentation of each sample of a micro-batch.

    Args:
        seed: 32-bit seed of the run.
        cursor: epoch and step of the micro-batch.
        virtual_worker: its virtual worker.
        ids: sample ids, shape (n,).
        sizes: height and width of each stored image in pixels, shape (n, 2).
        augment: what to draw.
        axes: principal axes of the colours, as long as `augment.colour_unit` says, one a column, shape (3, 3).
    """
    low, high = sample_ids & 0xFFFFFFFF, sample_ids >> 32
    both = draw_words(
        seed, Purpose.AUGMENT, np.arange(2)[:, None], cursor.epoch, low, high
    )  # (4, 2, n)
    draws_of = partial(draw_words, seed, Purpose.AUGMENT, b=cursor.epoch, c=low, d=high)
    if augment.draws == "chunk":
        chunk = (
            virtual_worker * -(-len(sample_ids) // _CHUNK_SIZE)
            + np.arange(len(sample_ids)) // _CHUNK_SIZE
        )
        draws_of = partial(
            draw_words,
            seed,
            Purpose.AUGMENT_CHUNK,
            b=cursor.epoch,
            c=cursor.step,
            d=chunk,
        )
    w = (draws_of(0) if augment.draws == "chunk" else both[:, 0]).astype(
        np.uint64
    )  # (4, n)
    if augment.window == "random_resized":
        start, size = _draw_resized_windows(
            draws_of(2 + np.arange(_MAX_TRIES)[:, None]), image_sizes
        )
    elif augment.window == "centre":
        start, size = _compute_center_windows(image_sizes, augment)
    else:
        scale, resized = _compute_resized_sizes(image_sizes, augment.short_side)
        # A 32-bit word times a range, shifted back, is uniform to within range / 2^32.
        place = (w[:2].T * (resized - augment.crop + 1).astype(np.uint64)) >> np.uint64(
            32
        )
        start, size = place * scale, augment.crop * scale
    return AugmentParams(
        window_start=start,
        window_size=size,
        mirror=(w[2] & np.uint64(augment.mirror)).astype(np.int32),
        color_shift=(
            _words_to_normals(both[:, 1]) @ (augment.colour * color_axes).T
        ).astype(np.float32, order="C"),
    )


def make_center_params(
    image_sizes: NDArray[np.int64], augment: Augment
) -> AugmentParams:
    """The evaluation draw: the centre window, not mirrored, no colour shift; `sizes` as in `draw`."""
    n = len(image_sizes)
    return AugmentParams(
        *_compute_center_windows(image_sizes, augment),
        np.zeros(n, np.int32),
        np.zeros((n, 3), np.float32),
    )


def _compute_center_windows(
    image_sizes: NDArray[np.int64], augment: Augment
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and size of the centre window."""
    scale, resized = _compute_resized_sizes(image_sizes, augment.short_side)
    return (resized - augment.crop) // 2 * scale, augment.crop * scale


def _compute_resized_sizes(
    image_sizes: NDArray[np.int64], short_side: int | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Stored pixels per resized pixel, and height and width when the short side is resized: both of shape (n, 2)."""
    if short_side is None:
        return np.ones(image_sizes.shape), image_sizes
    ratio = image_sizes.min(1, keepdims=True) / short_side
    resized = np.floor(image_sizes / ratio + 0.5).astype(np.int64)
    return image_sizes / resized, resized


def _draw_resized_windows(
    random_words: NDArray[np.uint32], image_sizes: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and size of windows of random area and aspect, as torchvision draws them: w is (4, attempts, n).

    Where no attempt fits into the image, the window is the largest centre one of an allowed aspect.
    """
    u = random_words / 2.0**32  # in [0, 1)
    height, width = image_sizes.T.astype(np.float64)
    area = height * width * (_AREA_RANGE[0] + (_AREA_RANGE[1] - _AREA_RANGE[0]) * u[0])
    low, high = np.log(_ASPECT_RANGE)
    aspect = np.exp(low + (high - low) * u[1])
    # size: (2, attempts, n), height and width
    size = np.rint(np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)]))
    fits = (size >= 1).all(0) & (size[0] <= height) & (size[1] <= width)
    first, n = fits.argmax(0), np.arange(len(image_sizes))
    start = np.floor(u[2:] * (np.stack([height, width])[:, None] - size + 1))
    own = np.clip(width / height, *_ASPECT_RANGE)
    widest = np.rint(
        np.stack([np.minimum(height, width / own), np.minimum(width, height * own)])
    )
    found = fits.any(0)
    size = np.where(found, size[:, first, n], np.maximum(widest, 1))
    start = np.where(
        found, start[:, first, n], np.floor((np.stack([height, width]) - size) / 2)
    )
    return np.ascontiguousarray(start.T), np.ascontiguousarray(size.T)


def _words_to_normals(random_words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Three standard normal numbers from four words (Box and Muller 1958): (4, n) -> (n, 3)."""
    uniform = (random_words.astype(np.float64) + 1) / 2**32  # in (0, 1]
    radius = np.sqrt(-2 * np.log(uniform[:2]))
    angle = 2 * np.pi * uniform[2:]
    return np.stack(
        [
            radius[0] * np.cos(angle[0]),
            radius[0] * np.sin(angle[0]),
            radius[1] * np.cos(angle[1]),
        ],
        axis=1,
    )
