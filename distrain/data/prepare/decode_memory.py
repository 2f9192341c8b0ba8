"""Memory that decoding takes: how many images may be decoded at a time."""

from distrain.distributed.process import (
    count_available_cores,
    count_available_memory,
)

FULL_PIXEL_BYTES = 30
"""Measured peak in bytes per pixel of an image that is used at full size."""


def count_decoding_threads(max_pixels: int) -> int:
    """Count the threads that may decode at a time: cores, or fewer if memory is short.

    Args:
        max_pixels: pixels of the largest image.
    """
    num_fitting = count_available_memory() // (FULL_PIXEL_BYTES * max(1, max_pixels))
    return max(1, min(count_available_cores(), num_fitting))
