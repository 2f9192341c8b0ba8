"""Decoder in PIL and numpy: for machines without DALI, and to check DALI against."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.decoder import (
    DecodeError,
    DecodeInput,
    DecodePlan,
    InputSource,
    normalize_images,
)
from distrain.data.decoding.image import crop_and_resize, decode_rgb
from distrain.data.shards.manifest import FIRST_READING

# Files were checked against data.pixel_limit before they are fed.
_NO_PIXEL_LIMIT = 1 << 31

_PendingImages = list[Future[NDArray[np.uint8]]]
"""Cropped images of one batch, each being decoded."""


class PilDecoder:
    """Drop-in replacement for DaliDecoder; decodes on CPU threads for any device."""

    def __init__(
        self,
        source: InputSource,
        plan: DecodePlan,
        *,
        device: torch.device,
        num_threads: int,
        read_ahead: int,
    ) -> None:
        self._source = source
        self._plan = plan
        self._device = device
        self._read_ahead = read_ahead
        self._pool = ThreadPoolExecutor(num_threads, "distrain-decode")
        self._queued_batches: deque[tuple[DecodeInput, _PendingImages]] = deque()

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def decode_batch(self) -> torch.Tensor:
        """Return the next batch, of the plan's dtype and shape.

        Raises:
            StopIteration: the source has ended.
            DecodeError: an image does not decode.
        """
        # Keep `read_ahead` batches in the pool. A source that has ended leaves those
        # that are queued.
        with suppress(StopIteration):
            while len(self._queued_batches) < self._read_ahead:
                decode_input = self._source()
                self._queued_batches.append((decode_input, self._submit(decode_input)))
        if not self._queued_batches:
            raise StopIteration

        # Wait for the oldest.
        decode_input, pending_images = self._queued_batches.popleft()
        crop_size = self._plan.crop_size
        pixels = np.empty((len(pending_images), crop_size, crop_size, 3), np.uint8)
        for i, pending_image in enumerate(pending_images):
            try:
                pixels[i] = pending_image.result()
            except BadImageError as error:
                raise DecodeError(i, str(error)) from None

        images = torch.from_numpy(pixels).to(self._device)
        if not self._plan.normalize:
            return images
        mirror = decode_input.augment_params.mirror
        return normalize_images(images, mirror, decode_input.mean, self._plan.std)

    def _submit(self, decode_input: DecodeInput) -> _PendingImages:
        windows = zip(
            decode_input.images,
            decode_input.augment_params.window_start,
            decode_input.augment_params.window_size,
            strict=True,
        )
        return [self._pool.submit(self._decode_window, *window) for window in windows]

    def _decode_window(
        self,
        image: NDArray[np.uint8],
        window_start: NDArray[np.float64],
        window_size: NDArray[np.float64],
    ) -> NDArray[np.uint8]:
        if not self._plan.is_raw:
            # Later readings turn images before they are fed, so nothing is turned here.
            image = decode_rgb(bytes(image), _NO_PIXEL_LIMIT, FIRST_READING)
        return crop_and_resize(image, window_start, window_size, self._plan.crop_size)
