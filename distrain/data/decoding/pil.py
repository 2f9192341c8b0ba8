"""The same as the DALI graph in PIL and numpy: for machines without DALI, and to check it against."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.decoder import (
    DecodeError,
    DecodeInput,
    DecodePlan,
    InputSource,
    normalize_images,
)
from distrain.data.decoding.image import BadImageError, crop_and_resize, decode_rgb

_NO_PIXEL_LIMIT = 1 << 31  # what is fed was held against data.pixel_limit before


class PilDecoder:
    """Has the interface of `dali.Decoder`, and decodes on `threads` threads of the CPU, whatever the device."""

    def __init__(
        self,
        source: InputSource,
        plan: DecodePlan,
        *,
        device: torch.device,
        num_threads: int,
        read_ahead: int,
    ) -> None:
        self._source, self._plan, self._device, self._read_ahead = (
            source,
            plan,
            device,
            read_ahead,
        )
        self._pool = ThreadPoolExecutor(num_threads, "distrain-decode")
        self._queued_batches: deque[
            tuple[DecodeInput, list[Future[NDArray[np.uint8]]]]
        ] = deque()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def decode_batch(self) -> torch.Tensor:
        """The next batch; its type and shape are the graph's.

        Raises:
            StopIteration: the source has ended.
            RefusedError: an image does not decode.
        """
        with suppress(StopIteration):
            while len(self._queued_batches) < self._read_ahead:
                feed = self._source()
                windows = zip(
                    feed.images,
                    feed.augment_params.window_start,
                    feed.augment_params.window_size,
                    strict=True,
                )
                self._queued_batches.append(
                    (
                        feed,
                        [
                            self._pool.submit(self._decode_window, *one)
                            for one in windows
                        ],
                    )
                )
        if not self._queued_batches:
            raise StopIteration
        feed, works = self._queued_batches.popleft()
        pixels = np.empty(
            (len(works), self._plan.crop_size, self._plan.crop_size, 3), np.uint8
        )
        for i, work in enumerate(works):
            try:
                pixels[i] = work.result()
            except BadImageError as error:
                raise DecodeError(i, str(error)) from None
        images = torch.from_numpy(pixels).to(self._device)
        if not self._plan.normalize:
            return images
        return normalize_images(
            images, feed.augment_params.mirror, feed.mean, self._plan.std
        )

    def _decode_window(
        self,
        image: NDArray[np.uint8],
        window_start: NDArray[np.float64],
        window_size: NDArray[np.float64],
    ) -> NDArray[np.uint8]:
        return crop_and_resize(
            image if self._plan.is_raw else decode_rgb(bytes(image), _NO_PIXEL_LIMIT),
            window_start,
            window_size,
            self._plan.crop_size,
        )
