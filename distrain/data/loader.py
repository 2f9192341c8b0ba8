"""Delivers micro-batches: asks for the samples, routes their files, decodes them ahead, on a thread of its own."""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.config import Config
from distrain.data.augment import Draws, centre, draw
from distrain.data.dali import Decoder, Feed
from distrain.data.decode import BadImageError, decode, for_dali
from distrain.data.order import Cursor, Order
from distrain.data.shards import Dataset
from distrain.data.stats import Statistics
from distrain.errors import RunError


class Request(NamedTuple):
    """One micro-batch to load."""

    cursor: Cursor
    """Epoch and step it belongs to; in evaluation (0, number of the chunk)."""
    virtual_worker: int
    ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    padding: int
    """How many at the end only fill the shape: weight 0."""
    draws: Draws


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one virtual worker in one step, ready for the model."""

    cursor: Cursor
    virtual_worker: int
    ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    images: torch.Tensor
    """Normalised, float32 of shape (b, 3, crop, crop); all zeros where the weight is 0."""
    labels: torch.Tensor
    """int64 of shape (b,)."""
    weights: torch.Tensor
    """1 for a valid sample, 0 for padding or a bad sample, float32 of shape (b,)."""
    bad: dict[int, str]
    """Reason by sample id of the bad samples in it."""


def training_requests(config: Config, dataset: Dataset, order: Order, steps: range, hosted: range) -> Iterator[Request]:
    """The micro-batches of the hosted virtual workers, for the run's step numbers `steps`, in their order."""
    manifest, augment = dataset.manifest, config.augment
    colour = augment.colour * manifest.statistics.principal_axes()
    for step in steps:
        cursor = order.cursor(step)
        for v in hosted:
            ids = order.ids(cursor, v)
            draws = draw(
                config.seed,
                cursor.epoch,
                ids,
                size=(manifest.height, manifest.width),
                crop=augment.crop,
                mirror=augment.mirror,
                colour=colour,
            )
            yield Request(cursor, v, ids, 0, draws)


def evaluation_requests(config: Config, dataset: Dataset, rank: int, ranks: int) -> Iterator[Request]:
    """A rank's share of all samples, in fixed chunks by sample id; the last one is padded to the same shape."""
    manifest, batch = dataset.manifest, config.evaluate.batch
    size = (manifest.height, manifest.width)
    for chunk, start in islice(enumerate(range(0, manifest.rows, batch)), rank, None, ranks):
        ids = np.arange(start, start + batch)
        padding = max(0, start + batch - manifest.rows)
        ids[batch - padding :] = start
        yield Request(Cursor(0, chunk), 0, ids, padding, centre(batch, size=size, crop=config.augment.crop))


class Loader:
    """Iterates over the micro-batches of `requests`, in their order. Close it, or use it in a `with`."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        statistics: Statistics,
        requests: Iterable[Request],
        *,
        batch: int,
        device: torch.device,
    ) -> None:
        """Start loading. `statistics` normalise: always those of the training set."""
        self._dataset, self._requests, self._device = dataset, iter(requests), device
        self._known_bad: dict[int, str] = {}  # so that a verdict costs once
        self._pixel_limit = config.data.pixel_limit
        self._mean = statistics.mean.astype(np.float32)
        height, width = dataset.manifest.height, dataset.manifest.width
        self._placeholder = np.frombuffer(b"P6 %d %d 255\n" % (width, height) + bytes(3 * width * height), np.uint8)
        self._pending: deque[_Pending] = deque()  # fed to DALI, not yet decoded
        self._ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._decoder = Decoder(
            self._feed,
            batch=batch,
            crop=config.augment.crop,
            std=statistics.std.astype(np.float32),
            device=device,
            threads=config.data.decode_threads,
            read_ahead=config.data.read_ahead,
        )
        self._thread = threading.Thread(target=self._produce, name="distrain-loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch. Raises what loading it raised; StopIteration at the end, again and again."""
        item = self._ready.get()
        if isinstance(item, MicroBatch):
            return item
        self._end(item)
        raise item

    def close(self) -> None:
        """Stop loading and wait for the thread."""
        self._closing.set()
        while self._thread.is_alive() or not self._ready.empty():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._decoder.close()
        self._end(StopIteration())

    def _end(self, reason: BaseException) -> None:
        """Leave the reason for whoever else waits for a batch, or will."""
        with suppress(queue.Full):  # one is there already
            self._ready.put_nowait(reason)

    def _produce(self) -> None:
        try:
            while not self._closing.is_set():
                images = self._decode()
                request, labels, weights, bad = self._pending.popleft()
                if not weights.all():
                    images = images.clone()
                    images[(weights == 0).to(images.device)] = 0
                self._ready.put(
                    MicroBatch(
                        cursor=request.cursor,
                        virtual_worker=request.virtual_worker,
                        ids=request.ids,
                        images=images,
                        labels=labels.to(self._device, non_blocking=True),
                        weights=weights.to(self._device, non_blocking=True),
                        bad=bad,
                    )
                )
        except BaseException as error:  # handed to the thread that asks for the next batch
            self._ready.put(error)

    def _decode(self) -> torch.Tensor:
        try:
            return self._decoder.run()
        except RunError:
            raise  # from reading the samples: the storage failed, or a shard is damaged
        except RuntimeError as error:
            suspects = np.unique(np.concatenate([pending.request.ids for pending in self._pending]))
            bad = [f"{i} ({self._dataset.describe(i)}): {reason}" for i in suspects if (reason := self._judge(i))]
            if not bad:
                raise
            raise RunError(f"DALI stopped at files that do not decode, pack them again: {'; '.join(bad)}") from error

    def _judge(self, sample_id: int) -> str | None:
        """Why PIL cannot decode a sample, if so."""
        try:
            decode(bytes(self._dataset.rows(np.array([sample_id]))[0].data), self._pixel_limit)
        except BadImageError as error:
            return str(error)
        return None

    def _feed(self) -> Feed:
        """Called by DALI, on the loader's thread, ahead of the batch being delivered."""
        request = next(self._requests)
        rows = self._dataset.rows(request.ids)
        files, weights, bad = [self._placeholder] * len(rows), torch.zeros(len(rows)), {}
        for i in range(len(rows) - request.padding):
            sample_id = int(request.ids[i])
            try:
                files[i] = self._file(sample_id, rows[i].data)
                weights[i] = 1
            except BadImageError as error:
                bad[sample_id] = str(error)
        labels = torch.tensor([row.label for row in rows])
        self._pending.append(_Pending(request, labels, weights, bad))
        draws = request.draws
        return Feed(files, draws.start, draws.mirror, self._mean - draws.colour)

    def _file(self, sample_id: int, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The file to decode. Raises BadImageError, and remembers it."""
        if sample_id not in self._known_bad:
            manifest = self._dataset.manifest
            try:
                return for_dali(data, manifest.height, manifest.width, self._pixel_limit)
            except BadImageError as error:
                self._known_bad[sample_id] = str(error)
        raise BadImageError(self._known_bad[sample_id])


class _Pending(NamedTuple):
    request: Request
    labels: torch.Tensor
    weights: torch.Tensor
    bad: dict[int, str]
