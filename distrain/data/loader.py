"""Background loader of micro-batches: fetch, check, decode and augment ahead."""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from distrain.data.batch import BatchRequest, MicroBatch, PendingBatch
from distrain.data.batch_builder import BatchBuilder, Normalization
from distrain.data.config import Augment, DataConfig
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.decoder import DecodeError, DecodeInput, Decoder
from distrain.data.decoding.pil import PilDecoder
from distrain.data.decoding.quarantine import InFlightRecorder, decode_one_by_one
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.stats import ColorStatistics
from distrain.distributed.process import count_available_cores
from distrain.errors import AttemptError

# Micro-batches whose row groups are fetched before they are asked for.
_PREFETCH_BATCHES = 16


class Loader:
    """Iterator over the micro-batches of `requests`, in their order.

    Close it, or use it in a `with` statement. A background thread loads, with a pool of
    threads that fetch row groups and the decoder's own threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        statistics: ColorStatistics | Normalization,
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
            dataset: where the samples are; bad samples are looked up and added there.
            statistics: for normalization and colors; always the training set's. Without
                augmentation, the normalization is enough.
            requests: the micro-batches to load.
            data: how samples are read and decoded.
            augment: how samples are augmented.
            seed: seed of the augmentation, 32 bits.
            run_dir: identifies this run to its later attempts, which look under this
                name for what crashed the decoder.
            batch_size: samples per request.
            device: where the images go.
            use_augmentation: random crop, horizontal flip and color jitter; otherwise
                the window of the request.
            num_cores: CPU cores of this rank, None: all of this process; they set the
                number of decoding threads unless `data` does.

        Raises:
            UserError: the decoder is not installed.
        """
        self._dataset = dataset
        self._data_config = data
        self._device = device
        self._num_threads = data.decode_threads or num_cores or count_available_cores()
        self._builder = BatchBuilder(
            dataset,
            statistics,
            data=data,
            augment=augment,
            seed=seed,
            batch_size=batch_size,
            use_augmentation=use_augmentation,
        )
        self._decode_plan = self._builder.plan

        # Stages of a micro-batch, in the order in which it passes them.
        self._requests = iter(requests)
        # Requests that are prefetched, each with the row groups that it needs.
        self._upcoming_requests: deque[tuple[BatchRequest, list[int]]] = deque()
        # Batches to feed again to a rebuilt decoder.
        self._replay_queue: deque[PendingBatch] = deque()
        # Batches that were fed to the decoder and are not decoded yet.
        self._pending_batches: deque[PendingBatch] = deque()
        # Request of the batch that failed although each of its files decodes alone: it
        # is fed to a new decoder once. Not the batch, which would keep its row groups.
        self._retried_request: BatchRequest | None = None
        # Decoded batches, or the exception that ended the loading.
        self._ready_queue: queue.Queue[MicroBatch | BaseException] = queue.Queue(
            maxsize=1
        )

        self._fetch_pool = ThreadPoolExecutor(data.connections, "distrain-fetch")
        self._stop_event = threading.Event()
        self.num_decoder_rebuilds = 0
        """Number of times that the decoder was replaced after it failed on a batch."""
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
        """Return the next micro-batch.

        Raises what loading it raised, and StopIteration at the end, in this call and
        all later ones.
        """
        item = self._ready_queue.get()
        if isinstance(item, MicroBatch):
            return item
        self._post_exception(item)
        raise item

    def get_queue_depths(self) -> dict[str, int]:
        """Count the micro-batches in each stage."""
        return {
            "fetching": len(self._upcoming_requests),
            "decoding": len(self._pending_batches),
            "ready": self._ready_queue.qsize(),
        }

    def close(self) -> None:
        """Stop loading and wait for the thread."""
        self._stop_event.set()
        # The thread may be blocked on the full queue: empty it until the thread ends.
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
        """Keep the exception, so that later or waiting next() calls raise it too."""
        # The queue may hold one already.
        with suppress(queue.Full):
            self._ready_queue.put_nowait(error)

    def _open_decoder(self) -> Decoder:
        use_dali = self._data_config.backend == "dali"
        decoder_class = DaliDecoder if use_dali else PilDecoder
        return decoder_class(
            self._next_decode_input,
            self._decode_plan,
            device=self._device,
            num_threads=self._num_threads,
            read_ahead=self._data_config.read_ahead,
        )

    def _open_recorder(self, run_dir: str) -> InFlightRecorder | None:
        """Open a record of the samples in flight, if the decoder may crash on them."""
        may_crash = self._dataset.manifest.may_crash_decoder
        if not may_crash or self._data_config.backend != "dali":
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
                pending = self._pending_batches.popleft()
                if self._recorder is not None:
                    self._recorder.record_decoded()
                micro_batch = pending.to_micro_batch(
                    pixels, self._decode_plan, self._device
                )
                self._ready_queue.put(micro_batch)
        except StopIteration as end:
            # Drop the traceback: its frames form a cycle that holds the decoder, with
            # its threads and its GPU memory, until a full garbage collection, and those
            # are rare from Python 3.12 on.
            self._ready_queue.put(end.with_traceback(None))
        except BaseException as error:
            # Raised in the thread that asks for the next batch.
            self._ready_queue.put(error)

    def _decode_or_rebuild(self) -> torch.Tensor:
        """Return the next decoded batch.

        If the decoder fails, substitute a placeholder for the file that it failed on
        (none, if each decodes alone), rebuild the decoder, and feed it the batches in
        flight again.
        """
        while True:
            try:
                return self._decoder.decode_batch()
            except DecodeError as error:
                self._handle_decode_error(self._pending_batches[0], error)
            self._decoder.close()
            # Before what is left of an earlier replay: these batches came first.
            self._replay_queue.extendleft(reversed(self._pending_batches))
            self._pending_batches.clear()
            if self._recorder is not None:
                self._recorder.clear_slots()
            self._decoder = self._open_decoder()
            self.num_decoder_rebuilds += 1

    def _handle_decode_error(self, pending: PendingBatch, error: DecodeError) -> None:
        """Record the files that the decoder rejected as bad samples, or allow a retry.

        If each file decodes alone, none is recorded: the batch is retried, once.

        Raises:
            AttemptError: the data set was verified when it was written, or no file can
                be blamed: the retry failed, or a placeholder did.
        """
        reasons = self._find_bad_files(pending, error)
        sample_ids = pending.request.sample_ids
        if not reasons and pending.request is not self._retried_request:
            self._retried_request = pending.request
            return

        # No file is to blame, or one that is the placeholder already: a new decoder fed
        # with the same files could fail again, forever.
        all_replaceable = all(pending.sample_weights[i] for i in reasons)
        if not reasons or not all_replaceable:
            raise AttemptError(
                f"the decoder failed ({error}) on samples {sample_ids.tolist()}, "
                "although no single file of theirs is at fault: check DALI's version "
                "and this machine's memory"
            )

        # A verified file that fails is no bad sample: the data or the machine changed.
        if self._dataset.manifest.verified:
            described = [
                f"{sample_ids[i]} ({self._dataset.describe_sample(sample_ids[i])}): "
                f"{reason}"
                for i, reason in reasons.items()
            ]
            raise AttemptError(
                "these samples decoded when they were packed or indexed, and no longer "
                f"do: {'; '.join(described)}; check DALI's version and this machine, "
                "or pack or index the data set again"
            )

        # Only in a data set whose manifest says that it was not verified; `pack` and
        # `index` write none.
        crop = self._decode_plan.crop_size
        for i, reason in reasons.items():
            self._dataset.bad_samples[int(sample_ids[i])] = reason
            pending.exclude_sample(i, self._builder.placeholder, crop, reason)

    def _find_bad_files(
        self, pending: PendingBatch, error: DecodeError
    ) -> dict[int, str]:
        """Return the files that do not decode, as reasons by index in the batch."""
        if error.index is not None:
            return {error.index: str(error)}
        # Pixels that are stored raw always decode.
        if self._decode_plan.is_raw:
            return {}
        # The decoder did not say which file it was: decode each alone.
        num_samples = len(pending.request.sample_ids) - pending.request.num_padding
        files = pending.decode_input.images[:num_samples]
        verdicts = decode_one_by_one(files, self._device)
        return {i: verdict for i, verdict in enumerate(verdicts) if verdict}

    def _next_decode_input(self) -> DecodeInput:
        """Return the next input; the decoder calls this ahead of what is delivered."""
        pending = (
            self._replay_queue.popleft()
            if self._replay_queue
            else self._builder.build_batch(self._next_request())
        )
        self._pending_batches.append(pending)
        if self._recorder is not None:
            self._recorder.record_fed(pending.request.sample_ids)
        return pending.decode_input

    def _next_request(self) -> BatchRequest:
        """Return the next request, and fetch the row groups of those after it."""
        while len(self._upcoming_requests) < _PREFETCH_BATCHES:
            request = next(self._requests, None)
            if request is None:
                break
            row_groups = self._dataset.find_row_groups(request.sample_ids)
            self._upcoming_requests.append((request, row_groups))
        if not self._upcoming_requests:
            raise StopIteration
        self._dataset.prefetch_row_groups(
            (row_groups for _, row_groups in self._upcoming_requests), self._fetch_pool
        )
        request, _ = self._upcoming_requests.popleft()
        return request
