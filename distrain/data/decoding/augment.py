"""Augmentation of each sample: window, mirror and PCA color shift.

Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional
neural networks" (NIPS 2012), section 4.1. No stream of random numbers is used: a draw
is a pure function of (seed, epoch, sample id) and the image's size. With
`augment.draws=chunk`, as in the paper's source code, 32 images share a window and a
mirror, which are a function of (seed, epoch, step, virtual worker, index in the batch)
and the size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.config import Augment
from distrain.data.order import Cursor
from distrain.philox import Purpose, draw_words

_AREA_RANGE = (0.08, 1.0)
_ASPECT_RANGE = (3 / 4, 4 / 3)
_MAX_TRIES = 10
_CHUNK_SIZE = 32

# First counter word of each draw. Try i of random_resized uses
# _DRAW_RESIZED_WINDOW + i, so no constant may follow that one.
_DRAW_WINDOW_AND_MIRROR = 0
_DRAW_COLOR_SHIFT = 1
_DRAW_RESIZED_WINDOW = 2

_Windows = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Start and size of n windows, vertical and horizontal, each of shape (n, 2)."""


class EvalWindow(NamedTuple):
    """Place of an evaluation's window in the resized image, in halves of the margin."""

    vertical: int
    """0: at the top; 1: in the middle; 2: at the bottom."""
    horizontal: int
    """0: at the left; 1: in the middle; 2: at the right."""


CENTER_WINDOW = EvalWindow(1, 1)
TEN_CROP_WINDOWS = (
    EvalWindow(0, 0),
    EvalWindow(0, 2),
    EvalWindow(2, 0),
    EvalWindow(2, 2),
    CENTER_WINDOW,
)
"""Four corners and the center, which the paper also mirrors (section 4.1)."""

_DrawWords = Callable[[int | NDArray[np.int64]], NDArray[np.uint32]]
"""Draws four words per sample for a first counter word: shape (4, ..., n)."""


@dataclass(frozen=True)
class AugmentParams:
    """Draws of n samples."""

    window_start: NDArray[np.float64]
    """Top and left of the window in pixels of the stored image, shape (n, 2); whole
    numbers if nothing is resized."""
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
        virtual_worker: the micro-batch's virtual worker.
        sample_ids: sample ids, shape (n,).
        image_sizes: height and width of each stored image in pixels, shape (n, 2).
        augment: what to draw.
        color_axes: principal axes of the colors, in columns, shape (3, 3); their
            lengths are what `augment.colour_unit` says.
    """
    # Draw per sample; one call for both uses, since a call has a fixed cost.
    draw_sample_words = _bind_sample_counters(seed, cursor, sample_ids)
    uses = np.array([[_DRAW_WINDOW_AND_MIRROR], [_DRAW_COLOR_SHIFT]])
    # (4, 2, n)
    sample_words = draw_sample_words(uses)
    window_words = sample_words[:, 0]
    color_words = sample_words[:, 1]

    # With draws=chunk, replace window and mirror by draws shared by 32 samples.
    draw_window_words = draw_sample_words
    if augment.draws == "chunk":
        draw_window_words = _bind_chunk_counters(
            seed, cursor, virtual_worker, len(sample_ids)
        )
        window_words = draw_window_words(_DRAW_WINDOW_AND_MIRROR)

    # Words 0 and 1 place a random crop, word 2 mirrors; "random_resized" draws words of
    # its own for its tries. (4, n)
    words = window_words.astype(np.uint64)
    start, size = _draw_windows(words, draw_window_words, image_sizes, augment)
    mirror = words[2] & np.uint64(augment.mirror)
    color_shift = _words_to_normals(color_words) @ (augment.colour * color_axes).T
    return AugmentParams(
        window_start=start,
        window_size=size,
        mirror=mirror.astype(np.int32),
        color_shift=color_shift.astype(np.float32, order="C"),
    )


def make_eval_params(
    image_sizes: NDArray[np.int64],
    augment: Augment,
    window: EvalWindow = CENTER_WINDOW,
) -> AugmentParams:
    """Return the parameters of evaluation: a fixed window, no mirror, no color shift.

    Args:
        image_sizes: height and width of each stored image in pixels, shape (n, 2).
        augment: sizes of crop and short side.
        window: place of the window.
    """
    n = len(image_sizes)
    start, size = _compute_fixed_windows(image_sizes, augment, window)
    no_mirror = np.zeros(n, np.int32)
    no_color_shift = np.zeros((n, 3), np.float32)
    return AugmentParams(start, size, no_mirror, no_color_shift)


def _bind_sample_counters(
    seed: int, cursor: Cursor, sample_ids: NDArray[np.int64]
) -> _DrawWords:
    low = sample_ids & 0xFFFFFFFF
    high = sample_ids >> 32
    return partial(draw_words, seed, Purpose.AUGMENT, b=cursor.epoch, c=low, d=high)


def _bind_chunk_counters(
    seed: int, cursor: Cursor, virtual_worker: int, n: int
) -> _DrawWords:
    """Give each chunk of 32 samples of a global batch one counter, and so one draw."""
    # A chunk never spans two virtual workers: their last ones may be shorter.
    chunks_per_batch = -(-n // _CHUNK_SIZE)
    chunk = virtual_worker * chunks_per_batch + np.arange(n) // _CHUNK_SIZE
    return partial(
        draw_words,
        seed,
        Purpose.AUGMENT_CHUNK,
        b=cursor.epoch,
        c=cursor.step,
        d=chunk,
    )


def _draw_windows(
    window_words: NDArray[np.uint64],
    draw_window_words: _DrawWords,
    image_sizes: NDArray[np.int64],
    augment: Augment,
) -> _Windows:
    """Draw the windows that `augment.window` describes."""
    if augment.window == "random_resized":
        tries = _DRAW_RESIZED_WINDOW + np.arange(_MAX_TRIES)[:, None]
        return _draw_resized_windows(draw_window_words(tries), image_sizes)
    if augment.window == "centre":
        return _compute_fixed_windows(image_sizes, augment, CENTER_WINDOW)

    scale, resized = _compute_resized_sizes(image_sizes, augment.short_side)
    # Multiply and shift: maps a 32-bit word to [0, range), biased by less than
    # range / 2^32.
    num_positions = (resized - augment.crop + 1).astype(np.uint64)
    corner = (window_words[:2].T * num_positions) >> np.uint64(32)
    return corner * scale, augment.crop * scale


def _compute_fixed_windows(
    image_sizes: NDArray[np.int64], augment: Augment, window: EvalWindow
) -> _Windows:
    """Return the windows at one place; an odd margin is larger at bottom or right."""
    scale, resized = _compute_resized_sizes(image_sizes, augment.short_side)
    corner = (resized - augment.crop) * np.array(window) // 2
    return corner * scale, augment.crop * scale


def _compute_resized_sizes(
    image_sizes: NDArray[np.int64], short_side: int | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the sizes of the images when their short sides are resized.

    Returns:
        Stored pixels per resized pixel, and height and width in resized pixels, both
        of shape (n, 2).
    """
    if short_side is None:
        return np.ones(image_sizes.shape), image_sizes
    ratio = image_sizes.min(1, keepdims=True) / short_side
    rounded = np.floor(image_sizes / ratio + 0.5)
    resized = rounded.astype(np.int64)
    return image_sizes / resized, resized


def _draw_resized_windows(
    random_words: NDArray[np.uint32], image_sizes: NDArray[np.int64]
) -> _Windows:
    """Return windows of random area and aspect, drawn as in torchvision.

    If no try fits into the image, the window is the largest center window with an
    allowed aspect.

    Args:
        random_words: words of each try, shape (4, tries, n).
        image_sizes: height and width of each stored image in pixels, shape (n, 2).
    """
    # In [0, 1).
    uniform = random_words / 2.0**32
    height, width = image_sizes.T.astype(np.float64)
    # (2, n)
    image_size = np.stack([height, width])

    # Draw area and aspect of every try; (2, tries, n).
    min_area, max_area = _AREA_RANGE
    area = height * width * (min_area + (max_area - min_area) * uniform[0])
    log_min, log_max = np.log(_ASPECT_RANGE)
    aspect = np.exp(log_min + (log_max - log_min) * uniform[1])
    heights = np.sqrt(area / aspect)
    widths = np.sqrt(area * aspect)
    sizes = np.rint(np.stack([heights, widths]))
    num_positions = image_size[:, None] - sizes + 1
    starts = np.floor(uniform[2:] * num_positions)

    # Take the first try that fits.
    is_inside = (sizes[0] <= height) & (sizes[1] <= width)
    fits = (sizes >= 1).all(0) & is_inside
    first_fit = fits.argmax(0)
    sample = np.arange(len(image_sizes))
    drawn_size = sizes[:, first_fit, sample]
    drawn_start = starts[:, first_fit, sample]

    # Or the largest center window.
    clipped_aspect = np.clip(width / height, *_ASPECT_RANGE)
    max_height = np.minimum(height, width / clipped_aspect)
    max_width = np.minimum(width, height * clipped_aspect)
    max_size = np.rint(np.stack([max_height, max_width]))
    center_size = np.maximum(max_size, 1)
    center_start = np.floor((image_size - center_size) / 2)

    any_fits = fits.any(0)
    size = np.where(any_fits, drawn_size, center_size)
    start = np.where(any_fits, drawn_start, center_start)
    return np.ascontiguousarray(start.T), np.ascontiguousarray(size.T)


def _words_to_normals(random_words: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Return three standard normal numbers per four words: (4, n) -> (n, 3).

    Box and Muller, "A note on the generation of random normal deviates" (1958).
    """
    # In (0, 1]: the logarithm of 0 is infinite.
    uniform = (random_words.astype(np.float64) + 1) / 2**32
    radius = np.sqrt(-2 * np.log(uniform[:2]))
    angle = 2 * np.pi * uniform[2:]
    normals = [
        radius[0] * np.cos(angle[0]),
        radius[0] * np.sin(angle[0]),
        radius[1] * np.cos(angle[1]),
    ]
    return np.stack(normals, axis=1)
