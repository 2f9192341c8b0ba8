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

from distrain.data.config import Augment, DataConfig
from distrain.data.decoding.augment import draw_augment_params, make_center_params
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.decoder import (
    DecodeError,
    DecodeInput,
    DecodePlan,
    Decoder,
    normalize_images,
)
from distrain.data.decoding.image import (
    BadImageError,
    encode_ppm,
    sanitize_file,
    view_ppm_pixels,
)
from distrain.data.decoding.pil import PilDecoder
from distrain.data.decoding.quarantine import InFlightRecorder, decode_one_by_one
from distrain.data.order import Cursor, SampleOrder
from distrain.data.shards.dataset import Dataset, Row
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.distributed.process import count_available_cores
from distrain.errors import AttemptError

# Micro-batches whose row groups are fetched before they are asked for.
_PREFETCH_BATCHES = 16


class BatchRequest(NamedTuple):
    """One micro-batch to load."""

    cursor: Cursor
    """Epoch and step it belongs to; in evaluation (0, number of the chunk)."""
    virtual_worker: int
    sample_ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    num_padding: int
    """How many at the end only fill the shape: weight 0."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one virtual worker in one step, ready for the model."""

    cursor: Cursor
    virtual_worker: int
    sample_ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    pixels: torch.Tensor
    """On the device; as the decoder made them, normalised or bytes."""
    labels: torch.Tensor
    """int64 of shape (b,)."""
    sample_weights: torch.Tensor
    """1 for a valid sample, 0 for padding or a bad sample, float32 of shape (b,)."""
    bad_samples: dict[int, str]
    """Reason by sample id of the bad samples in it."""
    to_images: Callable[[torch.Tensor], torch.Tensor]
    """Makes the images of the pixels."""

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalised, float32 of shape (b, 3, crop, crop); all zeros where the weight is 0."""
        return self.to_images(self.pixels)


def iter_training_requests(
    order: SampleOrder, steps: range, local_virtual_workers: range
) -> Iterator[BatchRequest]:
    """The micro-batches of the hosted virtual workers, for the run's step numbers `steps`, in their order."""
    for step in steps:
        cursor = order.get_cursor(step)
        for v in local_virtual_workers:
            yield BatchRequest(cursor, v, order.get_sample_ids(cursor, v), 0)


def iter_evaluation_requests(
    num_rows: int, batch_size: int, rank: int, world_size: int
) -> Iterator[BatchRequest]:
    """A rank's share of all samples, in fixed chunks by sample id; the last one is padded to the same shape."""
    for chunk, start in islice(
        enumerate(range(0, num_rows, batch_size)), rank, None, world_size
    ):
        ids = np.arange(start, start + batch_size)
        padding = max(0, start + batch_size - num_rows)
        ids[batch_size - padding :] = start
        yield BatchRequest(Cursor(0, chunk), 0, ids, padding)


class Loader:
    """Iterates over the micro-batches of `requests`, in their order. Close it, or use it in a `with`."""

    def __init__(
        self,
        dataset: Dataset,
        statistics: ColorStatistics,
        requests: Iterable[BatchRequest],
        *,
        data: DataConfig,
        augment: Augment,
        seed: int,
        run_dir: str,
        batch_size: int,
        device: torch.device,
        use_augmentation: bool,
        num_cores: int | None = None,
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
        self._data_config, self._augment_config, self._seed = data, augment, seed
        self._dataset, self._requests, self._device = dataset, iter(requests), device
        self._use_augmentation = use_augmentation
        self._num_threads = data.decode_threads or num_cores or count_available_cores()
        self._channel_mean = statistics.mean.astype(np.float32)
        self._color_axes = statistics.compute_principal_axes(augment.colour_unit)
        self._decode_plan = _make_decode_plan(
            manifest,
            statistics,
            data,
            augment,
            batch_size=batch_size,
            use_augmentation=use_augmentation,
        )
        blank = np.zeros((augment.crop, augment.crop, 3), np.uint8)
        self._placeholder = blank if self._decode_plan.is_raw else encode_ppm(blank)
        self._fetch_pool = ThreadPoolExecutor(data.connections, "distrain-fetch")
        self._upcoming_requests: deque[tuple[BatchRequest, list[int]]] = (
            deque()
        )  # with the row groups that they need
        self._replay_queue: deque[_PendingBatch] = (
            deque()
        )  # to be fed once more, after a decoder was replaced
        self._pending_batches: deque[_PendingBatch] = (
            deque()
        )  # fed to the decoder, not yet decoded
        self._ready_queue: queue.Queue[MicroBatch | BaseException] = queue.Queue(
            maxsize=1
        )
        self._stop_event = threading.Event()
        self.num_decoder_rebuilds = 0
        """How often the decoder was replaced, after it refused a batch."""
        self._decoder = self._open_decoder()
        self._recorder = self._open_recorder(run_dir)
        self._thread = threading.Thread(
            target=self._produce_batches, name="distrain-loader", daemon=True
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
        item = self._ready_queue.get()
        if isinstance(item, MicroBatch):
            return item
        self._post_exception(item)
        raise item

    def get_queue_depths(self) -> dict[str, int]:
        """Micro-batches on their way, by stage."""
        return {
            "fetching": len(self._upcoming_requests),
            "decoding": len(self._pending_batches),
            "ready": self._ready_queue.qsize(),
        }

    def close(self) -> None:
        """Stop loading and wait for the thread."""
        self._stop_event.set()
        while self._thread.is_alive() or not self._ready_queue.empty():
            try:
                self._ready_queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._decoder.close()
        self._fetch_pool.shutdown(cancel_futures=True)
        if self._recorder is not None:
            self._recorder.close()
        self._post_exception(StopIteration())

    def _post_exception(self, error: BaseException) -> None:
        """Leave the reason for whoever else waits for a batch, or will."""
        with suppress(queue.Full):  # one is there already
            self._ready_queue.put_nowait(error)

    def _open_decoder(self) -> Decoder:
        kind = DaliDecoder if self._data_config.backend == "dali" else PilDecoder
        ahead = self._data_config.read_ahead
        return kind(
            self._next_decode_input,
            self._decode_plan,
            device=self._device,
            num_threads=self._num_threads,
            read_ahead=ahead,
        )

    def _open_recorder(self, run_dir: str) -> InFlightRecorder | None:
        """Notes what is in flight, where the decoder may die of it."""
        manifest = self._dataset.manifest
        # Files written by others were decoded by PIL when they were indexed; DALI may crash on them all the same.
        is_trusted = self._decode_plan.is_raw or (
            manifest.verified and manifest.layout == "distrain"
        )
        if is_trusted or self._data_config.backend != "dali":
            return None
        return InFlightRecorder(
            run_dir,
            self._dataset,
            num_slots=self._data_config.read_ahead + 2,
            batch_size=self._decode_plan.batch_size,
        )

    def _produce_batches(self) -> None:
        try:
            while not self._stop_event.is_set():
                pixels = self._decode_or_rebuild()
                done = self._pending_batches.popleft()
                if self._recorder is not None:
                    self._recorder.record_decoded()
                self._ready_queue.put(self._make_micro_batch(pixels, done))
        except StopIteration as end:
            # Without its traceback, whose frames form a cycle that holds the decoder, with its threads and its memory
            # on the GPU, until a full garbage collection. From Python 3.12 on these are rare.
            self._ready_queue.put(end.with_traceback(None))
        except (
            BaseException
        ) as error:  # handed to the thread that asks for the next batch
            self._ready_queue.put(error)

    def _decode_or_rebuild(self) -> torch.Tensor:
        """The next batch; where the decoder refuses a file, it is replaced, and fed again what it had been fed."""
        while True:
            try:
                return self._decoder.decode_batch()
            except DecodeError as refused:
                self._mark_bad_samples(self._pending_batches[0], refused)
            self._decoder.close()
            self._replay_queue.extendleft(reversed(self._pending_batches))
            self._pending_batches.clear()
            if self._recorder is not None:
                self._recorder.clear_slots()
            self._decoder = self._open_decoder()
            self.num_decoder_rebuilds += 1

    def _mark_bad_samples(self, pending: "_PendingBatch", error: DecodeError) -> None:
        """Take a refused file, or files, for bad.

        Raises:
            AttemptError: the files were proved when they were written, or none of them is refused when it is alone.
        """
        ids, files = pending.request.sample_ids, pending.decode_input.images
        places = (
            range(len(ids) - pending.request.num_padding)
            if error.index is None
            else [error.index]
        )
        reasons = {place: str(error) for place in places}
        if error.index is None:
            verdicts = decode_one_by_one(
                [files[place] for place in places], self._device
            )
            reasons = {
                place: verdict
                for place, verdict in zip(places, verdicts, strict=True)
                if verdict
            }
        named = [
            f"{ids[place]} ({self._dataset.describe_sample(ids[place])}): {reason}"
            for place, reason in reasons.items()
        ]
        if self._dataset.manifest.verified:
            raise AttemptError(
                "files that decoded when they were packed or indexed are refused now, do that again: "
                + "; ".join(named)
            )
        if not reasons or not all(
            pending.sample_weights[place] for place in reasons
        ):  # or it refuses its own placeholder
            raise AttemptError(
                f"the decoder stopped ({error}), but each file of the batch decodes alone: samples {ids.tolist()}"
            )
        for place, reason in reasons.items():
            self._dataset.bad_samples[int(ids[place])] = reason
            pending.exclude_sample(
                place, self._placeholder, self._decode_plan.crop_size, reason
            )

    def _next_decode_input(self) -> DecodeInput:
        """Called by the decoder, on the loader's thread, ahead of the batch being delivered."""
        pending = (
            self._replay_queue.popleft()
            if self._replay_queue
            else self._prepare_batch(self._next_request())
        )
        self._pending_batches.append(pending)
        if self._recorder is not None:
            self._recorder.record_fed(pending.request.sample_ids)
        return pending.decode_input

    def _next_request(self) -> BatchRequest:
        """The next request; those behind it have their row groups fetched meanwhile."""
        while (
            len(self._upcoming_requests) < _PREFETCH_BATCHES
            and (request := next(self._requests, None)) is not None
        ):
            self._upcoming_requests.append(
                (request, self._dataset.find_row_groups(request.sample_ids))
            )
        if not self._upcoming_requests:
            raise StopIteration
        self._dataset.prefetch_row_groups(
            (groups for _, groups in self._upcoming_requests), self._fetch_pool
        )
        return self._upcoming_requests.popleft()[0]

    def _prepare_batch(self, request: BatchRequest) -> "_PendingBatch":
        """Read the files of a micro-batch, judge them, and draw what is done to them."""
        rows, crop = (
            self._dataset.read_rows(request.sample_ids),
            self._decode_plan.crop_size,
        )
        files, sizes = [self._placeholder] * len(rows), [(crop, crop)] * len(rows)
        excluded: dict[int, str] = {}  # by place
        for place in range(len(rows) - request.num_padding):
            try:
                files[place], sizes[place] = self._check_file(
                    int(request.sample_ids[place]), rows[place]
                )
            except BadImageError as error:
                excluded[place] = str(error)
        height_width = np.array(sizes)
        if self._use_augmentation:
            cursor, v, ids, _ = request
            draws = draw_augment_params(
                self._seed,
                cursor,
                v,
                ids,
                height_width,
                self._augment_config,
                self._color_axes,
            )
        else:
            draws = make_center_params(height_width, self._augment_config)
        labels = torch.tensor([row.label for row in rows])
        weights = torch.ones(len(rows))
        feed = DecodeInput(
            files, height_width, draws, self._channel_mean - draws.color_shift
        )
        pending = _PendingBatch(request, labels, weights, {}, feed, set())
        for place in [*excluded, *range(len(rows) - request.num_padding, len(rows))]:
            pending.exclude_sample(place, self._placeholder, crop, excluded.get(place))
        return pending

    def _check_file(
        self, sample_id: int, row: Row
    ) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """What the decoder gets for a sample, and its size. Raises BadImageError, and remembers it."""
        manifest, bad = self._dataset.manifest, self._dataset.bad_samples
        if sample_id in bad:
            raise BadImageError(bad[sample_id])
        try:
            if self._decode_plan.is_raw:
                return view_ppm_pixels(row.data, *row.image_size), row.image_size
            data, *size = sanitize_file(row.data, self._data_config.pixel_limit)
            if manifest.image_size not in (None, tuple(size)):
                raise BadImageError(
                    f"{size[1]} x {size[0]} pixels in a data set of {manifest.image_size[1]} x {manifest.image_size[0]}"
                )
            return data, (size[0], size[1])
        except BadImageError as error:
            bad[sample_id] = str(error)
            raise
        except MemoryError:
            raise AttemptError(
                f"there is not enough memory to decode sample {sample_id}: free some"
            ) from None

    def _make_micro_batch(
        self, pixels: torch.Tensor, pending: "_PendingBatch"
    ) -> MicroBatch:
        request, weights, device = pending.request, pending.sample_weights, self._device
        mirror, mean = (
            pending.decode_input.augment_params.mirror,
            pending.decode_input.mean,
        )
        blank = (
            (weights == 0).to(device, non_blocking=True)
            if pending.blank_indices
            else None
        )

        def to_images(pixels: torch.Tensor) -> torch.Tensor:
            if not self._decode_plan.normalize:
                pixels = normalize_images(pixels, mirror, mean, self._decode_plan.std)
            elif blank is not None:
                pixels = pixels.clone()
            if blank is not None:
                pixels[blank] = 0
            return pixels

        return MicroBatch(
            cursor=request.cursor,
            virtual_worker=request.virtual_worker,
            sample_ids=request.sample_ids,
            pixels=pixels.to(device),
            labels=pending.labels.to(device, non_blocking=True),
            sample_weights=weights.to(device, non_blocking=True),
            bad_samples=pending.bad_samples,
            to_images=to_images,
        )


def _make_decode_plan(
    manifest: Manifest,
    statistics: ColorStatistics,
    data: DataConfig,
    augment: Augment,
    *,
    batch_size: int,
    use_augmentation: bool,
) -> DecodePlan:
    """Return the decoder's graph for images stored as the manifest says."""
    is_stored_at_size = manifest.image_size is not None and augment.short_side in (
        None,
        min(manifest.image_size),
    )
    return DecodePlan(
        batch_size=batch_size,
        crop_size=augment.crop,
        is_raw=manifest.encoding == "raw",
        resize=not is_stored_at_size
        or (use_augmentation and augment.window == "random_resized"),
        decode_full_image=not manifest.verified,
        normalize=data.normalise == "loader",
        std=(
            statistics.std if augment.scale is None else np.full(3, augment.scale)
        ).astype(np.float32),
    )


class _PendingBatch(NamedTuple):
    """A micro-batch on its way through the decoder."""

    request: BatchRequest
    labels: torch.Tensor
    sample_weights: torch.Tensor
    bad_samples: dict[int, str]
    """Reason by sample id."""
    decode_input: DecodeInput
    blank_indices: set[int]
    """Places in the batch that hold the placeholder."""

    def exclude_sample(
        self, index: int, placeholder: NDArray[np.uint8], crop: int, reason: str | None
    ) -> None:
        """Put the placeholder, of weight 0, in a sample's place; with a reason it is bad, without it is padding."""
        if reason is not None:
            self.bad_samples[int(self.request.sample_ids[index])] = reason
        self.sample_weights[index] = 0
        self.blank_indices.add(index)
        self.decode_input.images[index] = placeholder
        self.decode_input.image_sizes[index] = crop
        self.decode_input.augment_params.window_start[index] = 0
        self.decode_input.augment_params.window_size[index] = crop
