"""Delivers micro-batches: asks for the samples, routes their files, decodes them ahead, on a thread of its own."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.config import Augment, Data
from distrain.data.decoding.augment import centre, draw
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.graph import Decoder, Feed, Graph, RefusedError, normalised
from distrain.data.decoding.image import BadImageError, ppm, ppm_pixels, readable
from distrain.data.decoding.pil import ReferenceDecoder
from distrain.data.decoding.quarantine import Recorder, judge
from distrain.data.order import Cursor, Order
from distrain.data.shards.dataset import Dataset, Row
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.stats import Statistics
from distrain.distributed.process import available_cores
from distrain.errors import AttemptError

# Micro-batches whose row groups are fetched before they are asked for.
_FETCHED_AHEAD = 16


class Request(NamedTuple):
    """One micro-batch to load."""

    cursor: Cursor
    """Epoch and step it belongs to; in evaluation (0, number of the chunk)."""
    virtual_worker: int
    ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    padding: int
    """How many at the end only fill the shape: weight 0."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one virtual worker in one step, ready for the model."""

    cursor: Cursor
    virtual_worker: int
    ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    pixels: torch.Tensor
    """On the device; as the decoder made them, normalised or bytes."""
    labels: torch.Tensor
    """int64 of shape (b,)."""
    weights: torch.Tensor
    """1 for a valid sample, 0 for padding or a bad sample, float32 of shape (b,)."""
    bad: dict[int, str]
    """Reason by sample id of the bad samples in it."""
    finish: Callable[[torch.Tensor], torch.Tensor]
    """Makes the images of the pixels."""

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalised, float32 of shape (b, 3, crop, crop); all zeros where the weight is 0."""
        return self.finish(self.pixels)


def training_requests(order: Order, steps: range, hosted: range) -> Iterator[Request]:
    """The micro-batches of the hosted virtual workers, for the run's step numbers `steps`, in their order."""
    for step in steps:
        cursor = order.cursor(step)
        for v in hosted:
            yield Request(cursor, v, order.ids(cursor, v), 0)


def evaluation_requests(
    rows: int, batch: int, rank: int, ranks: int
) -> Iterator[Request]:
    """A rank's share of all samples, in fixed chunks by sample id; the last one is padded to the same shape."""
    for chunk, start in islice(enumerate(range(0, rows, batch)), rank, None, ranks):
        ids = np.arange(start, start + batch)
        padding = max(0, start + batch - rows)
        ids[batch - padding :] = start
        yield Request(Cursor(0, chunk), 0, ids, padding)


class Loader:
    """Iterates over the micro-batches of `requests`, in their order. Close it, or use it in a `with`."""

    def __init__(
        self,
        dataset: Dataset,
        statistics: Statistics,
        requests: Iterable[Request],
        *,
        data: Data,
        augment: Augment,
        seed: int,
        run: str,
        batch: int,
        device: torch.device,
        augmented: bool,
        cores: int | None = None,
    ) -> None:
        """Start loading.

        Args:
            dataset: where the samples are; its verdicts on bad files are used and added to.
            statistics: normalise and colour; always those of the training set.
            requests: what to load.
            data: how samples are read and decoded.
            augment: what is done to them.
            seed: of the draws, 32 bits.
            run: names this run to its later attempts, which look there for what killed the decoder.
            batch: samples of each request.
            device: where the images go.
            augmented: draw windows, mirrors and colours; without, the centre.
            cores: CPU cores of this rank, which decode where `data` does not say how many; None: all.

        Raises:
            UserError: the decoder is not installed.
        """
        manifest = dataset.manifest
        self._data, self._augment, self._seed = data, augment, seed
        self._dataset, self._requests, self._device = dataset, iter(requests), device
        self._augmented = augmented
        self._threads = data.decode_threads or cores or available_cores()
        self._mean = statistics.mean.astype(np.float32)
        self._axes = statistics.principal_axes(augment.colour_unit)
        self._graph = _graph_of(
            manifest, statistics, data, augment, batch=batch, augmented=augmented
        )
        blank = np.zeros((augment.crop, augment.crop, 3), np.uint8)
        self._placeholder = blank if self._graph.raw else ppm(blank)
        self._fetching = ThreadPoolExecutor(data.connections, "distrain-fetch")
        self._coming: deque[tuple[Request, list[int]]] = (
            deque()
        )  # with the row groups that they need
        self._again: deque[_Pending] = (
            deque()
        )  # to be fed once more, after a decoder was replaced
        self._pending: deque[_Pending] = deque()  # fed to the decoder, not yet decoded
        self._ready: queue.Queue[MicroBatch | BaseException] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self.rebuilds = 0
        """How often the decoder was replaced, after it refused a batch."""
        self._decoder = self._open_decoder()
        self._recorder = self._open_recorder(run)
        self._thread = threading.Thread(
            target=self._produce, name="distrain-loader", daemon=True
        )
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

    def depths(self) -> dict[str, int]:
        """Micro-batches on their way, by stage."""
        return {
            "fetching": len(self._coming),
            "decoding": len(self._pending),
            "ready": self._ready.qsize(),
        }

    def close(self) -> None:
        """Stop loading and wait for the thread."""
        self._closing.set()
        while self._thread.is_alive() or not self._ready.empty():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._decoder.close()
        self._fetching.shutdown(cancel_futures=True)
        if self._recorder is not None:
            self._recorder.close()
        self._end(StopIteration())

    def _end(self, reason: BaseException) -> None:
        """Leave the reason for whoever else waits for a batch, or will."""
        with suppress(queue.Full):  # one is there already
            self._ready.put_nowait(reason)

    def _open_decoder(self) -> Decoder:
        kind = DaliDecoder if self._data.backend == "dali" else ReferenceDecoder
        ahead = self._data.read_ahead
        return kind(
            self._feed,
            self._graph,
            device=self._device,
            threads=self._threads,
            read_ahead=ahead,
        )

    def _open_recorder(self, run: str) -> Recorder | None:
        """Notes what is in flight, where the decoder may die of it."""
        manifest = self._dataset.manifest
        # Files written by others were decoded by PIL when they were indexed; DALI may crash on them all the same.
        is_trusted = self._graph.raw or (
            manifest.proved and manifest.layout == "distrain"
        )
        if is_trusted or self._data.backend != "dali":
            return None
        return Recorder(
            run, self._dataset, slots=self._data.read_ahead + 2, batch=self._graph.batch
        )

    def _produce(self) -> None:
        try:
            while not self._closing.is_set():
                pixels = self._decode()
                done = self._pending.popleft()
                if self._recorder is not None:
                    self._recorder.decoded()
                self._ready.put(self._finished(pixels, done))
        except StopIteration as end:
            # Without its traceback, whose frames form a cycle that holds the decoder, with its threads and its memory
            # on the GPU, until a full garbage collection. From Python 3.12 on these are rare.
            self._ready.put(end.with_traceback(None))
        except (
            BaseException
        ) as error:  # handed to the thread that asks for the next batch
            self._ready.put(error)

    def _decode(self) -> torch.Tensor:
        """The next batch; where the decoder refuses a file, it is replaced, and fed again what it had been fed."""
        while True:
            try:
                return self._decoder.run()
            except RefusedError as refused:
                self._condemn(self._pending[0], refused)
            self._decoder.close()
            self._again.extendleft(reversed(self._pending))
            self._pending.clear()
            if self._recorder is not None:
                self._recorder.clear()
            self._decoder = self._open_decoder()
            self.rebuilds += 1

    def _condemn(self, pending: "_Pending", refused: RefusedError) -> None:
        """Take a refused file, or files, for bad.

        Raises:
            AttemptError: the files were proved when they were written, or none of them is refused when it is alone.
        """
        ids, files = pending.request.ids, pending.feed.images
        places = (
            range(len(ids) - pending.request.padding)
            if refused.place is None
            else [refused.place]
        )
        reasons = {place: str(refused) for place in places}
        if refused.place is None:
            verdicts = judge([files[place] for place in places], self._device)
            reasons = {
                place: verdict
                for place, verdict in zip(places, verdicts, strict=True)
                if verdict
            }
        named = [
            f"{ids[place]} ({self._dataset.describe(ids[place])}): {reason}"
            for place, reason in reasons.items()
        ]
        if self._dataset.manifest.proved:
            raise AttemptError(
                "files that decoded when they were packed or indexed are refused now, do that again: "
                + "; ".join(named)
            )
        if not reasons or not all(
            pending.weights[place] for place in reasons
        ):  # or it refuses its own placeholder
            raise AttemptError(
                f"the decoder stopped ({refused}), but each file of the batch decodes alone: samples {ids.tolist()}"
            )
        for place, reason in reasons.items():
            self._dataset.bad[int(ids[place])] = reason
            pending.exclude(place, self._placeholder, self._graph.crop, reason)

    def _feed(self) -> Feed:
        """Called by the decoder, on the loader's thread, ahead of the batch being delivered."""
        pending = (
            self._again.popleft()
            if self._again
            else self._prepare(self._next_request())
        )
        self._pending.append(pending)
        if self._recorder is not None:
            self._recorder.fed(pending.request.ids)
        return pending.feed

    def _next_request(self) -> Request:
        """The next request; those behind it have their row groups fetched meanwhile."""
        while (
            len(self._coming) < _FETCHED_AHEAD
            and (request := next(self._requests, None)) is not None
        ):
            self._coming.append((request, self._dataset.groups_of(request.ids)))
        if not self._coming:
            raise StopIteration
        self._dataset.prefetch((groups for _, groups in self._coming), self._fetching)
        return self._coming.popleft()[0]

    def _prepare(self, request: Request) -> "_Pending":
        """Read the files of a micro-batch, judge them, and draw what is done to them."""
        rows, crop = self._dataset.rows(request.ids), self._graph.crop
        files, sizes = [self._placeholder] * len(rows), [(crop, crop)] * len(rows)
        excluded: dict[int, str] = {}  # by place
        for place in range(len(rows) - request.padding):
            try:
                files[place], sizes[place] = self._file(
                    int(request.ids[place]), rows[place]
                )
            except BadImageError as error:
                excluded[place] = str(error)
        height_width = np.array(sizes)
        if self._augmented:
            cursor, v, ids, _ = request
            draws = draw(
                self._seed, cursor, v, ids, height_width, self._augment, self._axes
            )
        else:
            draws = centre(height_width, self._augment)
        labels = torch.tensor([row.label for row in rows])
        weights = torch.ones(len(rows))
        feed = Feed(files, height_width, draws, self._mean - draws.colour)
        pending = _Pending(request, labels, weights, {}, feed, set())
        for place in [*excluded, *range(len(rows) - request.padding, len(rows))]:
            pending.exclude(place, self._placeholder, crop, excluded.get(place))
        return pending

    def _file(
        self, sample_id: int, row: Row
    ) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """What the decoder gets for a sample, and its size. Raises BadImageError, and remembers it."""
        manifest, bad = self._dataset.manifest, self._dataset.bad
        if sample_id in bad:
            raise BadImageError(bad[sample_id])
        try:
            if self._graph.raw:
                return ppm_pixels(row.data, *row.size), row.size
            data, *size = readable(row.data, self._data.pixel_limit)
            if manifest.size not in (None, tuple(size)):
                raise BadImageError(
                    f"{size[1]} x {size[0]} pixels in a data set of {manifest.size[1]} x {manifest.size[0]}"
                )
            return data, (size[0], size[1])
        except BadImageError as error:
            bad[sample_id] = str(error)
            raise
        except MemoryError:
            raise AttemptError(
                f"there is not enough memory to decode sample {sample_id}: free some"
            ) from None

    def _finished(self, pixels: torch.Tensor, done: "_Pending") -> MicroBatch:
        request, weights, device = done.request, done.weights, self._device
        mirror, mean = done.feed.draws.mirror, done.feed.mean
        blank = (weights == 0).to(device, non_blocking=True) if done.blank else None

        def finish(pixels: torch.Tensor) -> torch.Tensor:
            if not self._graph.normalise:
                pixels = normalised(pixels, mirror, mean, self._graph.std)
            elif blank is not None:
                pixels = pixels.clone()
            if blank is not None:
                pixels[blank] = 0
            return pixels

        return MicroBatch(
            cursor=request.cursor,
            virtual_worker=request.virtual_worker,
            ids=request.ids,
            pixels=pixels.to(device),
            labels=done.labels.to(device, non_blocking=True),
            weights=weights.to(device, non_blocking=True),
            bad=done.bad,
            finish=finish,
        )


def _graph_of(
    manifest: Manifest,
    statistics: Statistics,
    data: Data,
    augment: Augment,
    *,
    batch: int,
    augmented: bool,
) -> Graph:
    """Return the decoder's graph for images stored as the manifest says."""
    is_stored_at_size = manifest.size is not None and augment.short_side in (
        None,
        min(manifest.size),
    )
    return Graph(
        batch=batch,
        crop=augment.crop,
        raw=manifest.encoding == "raw",
        resize=not is_stored_at_size
        or (augmented and augment.window == "random_resized"),
        whole=not manifest.proved,
        normalise=data.normalise == "loader",
        std=(
            statistics.std if augment.scale is None else np.full(3, augment.scale)
        ).astype(np.float32),
    )


class _Pending(NamedTuple):
    """A micro-batch on its way through the decoder."""

    request: Request
    labels: torch.Tensor
    weights: torch.Tensor
    bad: dict[int, str]
    """Reason by sample id."""
    feed: Feed
    blank: set[int]
    """Places in the batch that hold the placeholder."""

    def exclude(
        self, place: int, placeholder: NDArray[np.uint8], crop: int, reason: str | None
    ) -> None:
        """Put the placeholder, of weight 0, in a sample's place; with a reason it is bad, without it is padding."""
        if reason is not None:
            self.bad[int(self.request.ids[place])] = reason
        self.weights[place] = 0
        self.blank.add(place)
        self.feed.images[place] = placeholder
        self.feed.sizes[place] = crop
        self.feed.draws.start[place] = 0
        self.feed.draws.size[place] = crop
