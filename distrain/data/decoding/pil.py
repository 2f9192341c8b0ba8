"""The same as the DALI graph in PIL and numpy: for machines without DALI, and to check it against."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.graph import Feed, Graph, RefusedError, Source, normalised
from distrain.data.decoding.image import BadImageError, cut, decode

_ANY = 1 << 31  # what is fed was held against data.pixel_limit before


class ReferenceDecoder:
    """Has the interface of `dali.Decoder`, and decodes on `threads` threads of the CPU, whatever the device."""

    def __init__(
        self,
        source: Source,
        graph: Graph,
        *,
        device: torch.device,
        threads: int,
        read_ahead: int,
    ) -> None:
        self._source, self._graph, self._device, self._read_ahead = (
            source,
            graph,
            device,
            read_ahead,
        )
        self._pool = ThreadPoolExecutor(threads, "distrain-decode")
        self._ahead: deque[tuple[Feed, list[Future[NDArray[np.uint8]]]]] = deque()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def run(self) -> torch.Tensor:
        """The next batch; its type and shape are the graph's.

        Raises:
            StopIteration: the source has ended.
            RefusedError: an image does not decode.
        """
        with suppress(StopIteration):
            while len(self._ahead) < self._read_ahead:
                feed = self._source()
                windows = zip(
                    feed.images, feed.draws.start, feed.draws.size, strict=True
                )
                self._ahead.append(
                    (feed, [self._pool.submit(self._window, *one) for one in windows])
                )
        if not self._ahead:
            raise StopIteration
        feed, works = self._ahead.popleft()
        pixels = np.empty((len(works), self._graph.crop, self._graph.crop, 3), np.uint8)
        for i, work in enumerate(works):
            try:
                pixels[i] = work.result()
            except BadImageError as error:
                raise RefusedError(i, str(error)) from None
        images = torch.from_numpy(pixels).to(self._device)
        if not self._graph.normalise:
            return images
        return normalised(images, feed.draws.mirror, feed.mean, self._graph.std)

    def _window(
        self,
        image: NDArray[np.uint8],
        start: NDArray[np.float64],
        size: NDArray[np.float64],
    ) -> NDArray[np.uint8]:
        return cut(
            image if self._graph.raw else decode(bytes(image), _ANY),
            start,
            size,
            self._graph.crop,
        )
