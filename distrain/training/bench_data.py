"""Loader throughput next to a bare decode of the same files, in the same process."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.batch import BatchRequest
from distrain.data.config import Augment, DataConfig
from distrain.data.decoding.jpeg_header import parse_jpeg_size
from distrain.data.loader import Loader
from distrain.data.order import SampleOrder
from distrain.data.shards.dataset import Dataset
from distrain.distributed.world import World, make_local_world
from distrain.errors import UserError
from distrain.fields import CommandSection, operation_field
from distrain.parsing import parse_section
from distrain.training.run_data import open_dataset

_NUM_ROUNDS = 5
_SEED = 0
# Files of the bare decode, which are held in memory.
_MAX_DECODE_FILES = 1024

ProcessImages = Callable[[], int]
"""Process some images; return their number."""
MeasureRound = Callable[[], tuple[float, float]]
"""Measure one round; return images per second, and CPU milliseconds per image."""


class Throughput(NamedTuple):
    """Throughput of the loader or of a bare decoder: medians over the rounds."""

    name: str
    images_per_second: float
    cpu_ms_per_image: float
    """CPU milliseconds per image, summed over all threads of this process."""


class BenchResult(NamedTuple):
    """Measurements of one data set."""

    images_per_round: int
    batch_size: int
    num_threads: int
    """Decoding threads of the loader; the bare decode on the CPU uses as many."""
    throughputs: list[Throughput]
    """The loader first."""
    seconds_to_first_batch: float
    """From opening the data set."""


class BenchConfig(CommandSection):
    """Sections and fields of a config that a measurement uses."""

    command: ClassVar[str] = "distrain bench data"

    data: DataConfig
    """Samples."""
    augment: Augment = Augment()
    """Augmentation."""
    global_batch: int = operation_field(128, ge=1)
    """Samples of one batch. [operation]"""
    device: Literal["auto", "cpu", "cuda"] = operation_field("auto")
    """auto: a GPU if there is one. [operation]"""


def bench_data(
    url: str | Path, overrides: Sequence[str] = (), *, images: int = 2048
) -> BenchResult:
    """Time the data loader alone, interleaved with a bare decode of the same files.

    Args:
        url: packed or indexed data set (path or URL).
        overrides: changes to the config's sections data and augment, and to
            global_batch and device, as `key.sub=value`.
        images: images that the loader yields in each of five rounds, rounded down to
            whole batches, at least one.

    Raises:
        UserError: an override is wrong, the data does not fit, or a package is missing.
    """
    if images < 1:
        raise UserError(f"images {images} is not valid: use at least 1")
    return measure_loader(make_bench_config(str(url), overrides), images)


def make_bench_config(url: str, overrides: Sequence[str]) -> BenchConfig:
    """Build the config of a measurement from defaults and `key.sub=value` overrides.

    Raises:
        UserError: an override is wrong; names every problem at once.
    """
    tree = {"data": {"train": url}}
    return parse_section(BenchConfig, tree, "the config", overrides)


def measure_loader(config: BenchConfig, images_per_round: int) -> BenchResult:
    """Measure the loader, interleaved with bare decoders of the same data set's files.

    Args:
        config: data set, augmentation and device.
        images_per_round: images that the loader yields in each of five rounds, rounded
            down to whole batches, at least one.

    Raises:
        UserError: the data does not fit the config, or a package is missing.
    """
    start_time = time.monotonic()
    dataset = _open_dataset(config)
    world = make_local_world(config.device)
    # As one virtual worker, whose micro-batch is the whole global batch.
    order = SampleOrder(
        dataset.manifest.rows_per_group,
        _SEED,
        1,
        config.global_batch,
        config.data.shuffle_rows,
    )
    requests = _generate_requests(order)
    num_batches = max(1, images_per_round // config.global_batch)
    # The first batch pays for threads and decoders that start; time it apart.
    with _create_loader(config, world, dataset, requests) as loader:
        next(loader)
        seconds_to_first_batch = time.monotonic() - start_time

    # Measure in rounds.
    measure_loader_round = partial(
        _measure_loader_round, config, world, dataset, requests, num_batches
    )
    rounds: dict[str, MeasureRound] = {"loader": measure_loader_round}
    num_threads = config.data.decode_threads or world.num_cores
    with ThreadPoolExecutor(num_threads) as pool:
        bare_decoders = _make_bare_decoders(config, world.device, pool)
        for name, process_images in bare_decoders.items():
            rounds[name] = partial(_measure_throughput, process_images)
        throughputs = _measure_interleaved(rounds)
    return BenchResult(
        num_batches * config.global_batch,
        config.global_batch,
        num_threads,
        throughputs,
        seconds_to_first_batch,
    )


def format_bench_result(result: BenchResult) -> Iterator[str]:
    """Yield a measurement as lines of text of at most 80 columns."""
    yield (
        f"{result.images_per_round:,} images per round, "
        f"batches of {result.batch_size}, {result.num_threads} threads, "
        f"medians of {_NUM_ROUNDS} rounds"
    )
    # Ratios are to the bare decode on the CPU, which only JPEG files have.
    baseline = result.throughputs[1] if len(result.throughputs) > 1 else None
    for throughput in result.throughputs:
        images_per_second = f"{throughput.images_per_second:8,.0f} images/s"
        cpu_ms = f"{throughput.cpu_ms_per_image:7.3f} CPU-ms per image"
        ratio = ""
        if baseline and throughput is not baseline:
            times = throughput.cpu_ms_per_image / baseline.cpu_ms_per_image
            ratio = f", {times:.2f} x bare"
        yield f"{throughput.name:<19} {images_per_second} {cpu_ms}{ratio}"
    yield f"first batch after {result.seconds_to_first_batch:.2f} s"


def _generate_requests(order: SampleOrder) -> Iterator[BatchRequest]:
    """Request batch after batch in training order, without end."""
    for step in count():
        cursor = order.get_cursor(step)
        yield BatchRequest(cursor, 0, order.get_sample_ids(cursor, 0), 0)


def _measure_interleaved(workloads: dict[str, MeasureRound]) -> list[Throughput]:
    """Measure workloads in turns, so that a change in machine load affects all."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in workloads}
    for _ in range(_NUM_ROUNDS):
        for name, measure_round in workloads.items():
            rounds[name].append(measure_round())
    throughputs = []
    for name, measurements in rounds.items():
        images_per_second = statistics.median(rate for rate, _ in measurements)
        cpu_ms_per_image = statistics.median(cpu_ms for _, cpu_ms in measurements)
        throughputs.append(Throughput(name, images_per_second, cpu_ms_per_image))
    return throughputs


def _measure_loader_round(
    config: BenchConfig,
    world: World,
    dataset: Dataset,
    requests: Iterator[BatchRequest],
    num_batches: int,
) -> tuple[float, float]:
    """Return images per second of a new loader, and CPU milliseconds per image."""
    # A loader per round: another's read-ahead would run during the bare decode.
    with _create_loader(config, world, dataset, requests) as loader:
        # Take what is decoded ahead while nobody asks: the decoder's batches, a ready
        # one, and one that waits to be.
        _take_batches(loader, config.data.read_ahead + 2, world.device)

        def process_images() -> int:
            _take_batches(loader, num_batches, world.device)
            return num_batches * config.global_batch

        return _measure_throughput(process_images)


def _take_batches(loader: Loader, num_batches: int, device: torch.device) -> None:
    """Take batches, and wait until they are decoded."""
    for _ in range(num_batches):
        next(loader)
    # Batches are returned while the GPU is still decoding them.
    if device.type == "cuda":
        torch.cuda.synchronize()


def _measure_throughput(process_images: ProcessImages) -> tuple[float, float]:
    """Return images per second, and CPU milliseconds per image."""
    wall_start = time.monotonic()
    cpu_start = time.process_time()
    num_images = process_images()
    wall_seconds = time.monotonic() - wall_start
    cpu_seconds = time.process_time() - cpu_start
    return num_images / wall_seconds, 1000 * cpu_seconds / num_images


def _open_dataset(config: BenchConfig) -> Dataset:
    return open_dataset(config.data.train, config.data, config.augment)


def _create_loader(
    config: BenchConfig,
    world: World,
    dataset: Dataset,
    requests: Iterator[BatchRequest],
) -> Loader:
    return Loader(
        dataset,
        dataset.manifest.statistics,
        requests,
        data=config.data,
        augment=config.augment,
        seed=_SEED,
        # There is no run: this only names the record of the files in flight.
        run_dir="bench data",
        batch_size=config.global_batch,
        device=world.device,
        use_augmentation=True,
        num_cores=world.num_cores,
    )


def _make_bare_decoders(
    config: BenchConfig, device: torch.device, pool: ThreadPoolExecutor
) -> dict[str, ProcessImages]:
    """Return bare decoders of the data set's JPEG files: libjpeg-turbo, nvJPEG on CUDA.

    Empty if it holds raw pixels or no JPEG files.

    Raises:
        UserError: simplejpeg is not installed.
    """
    # Not the loader's data set: its thread reads that one, and only one thread may.
    dataset = _open_dataset(config)
    if dataset.manifest.encoding == "raw":
        return {}
    if find_spec("simplejpeg") is None:
        raise UserError(
            "the bare decode needs simplejpeg: pip install 'distrain[bench]'"
        )
    files = _read_jpeg_files(dataset)
    if not files:
        return {}
    bare_decoders: dict[str, ProcessImages] = {}
    bare_decoders["libjpeg-turbo alone"] = partial(_decode_on_cpu, files, pool)
    if device.type == "cuda":
        bare_decoders["nvJPEG alone"] = partial(_decode_on_gpu, files, device)
    return bare_decoders


def _read_jpeg_files(dataset: Dataset) -> list[NDArray[np.uint8]]:
    """Read JPEG files evenly spread over a data set into memory."""
    stride = -(-len(dataset) // _MAX_DECODE_FILES)
    files = []
    for sample_id in range(0, len(dataset), stride):
        data = dataset[sample_id].data
        if parse_jpeg_size(data) is not None:
            files.append(data)
    return files


def _decode_on_cpu(files: Sequence[NDArray[np.uint8]], pool: ThreadPoolExecutor) -> int:
    """Decode files in threads with libjpeg-turbo; return their number."""
    import simplejpeg

    images = pool.map(lambda data: simplejpeg.decode_jpeg(data, "RGB"), files)
    # A list would hold all decoded images at once.
    return sum(1 for _ in images)


def _decode_on_gpu(files: Sequence[NDArray[np.uint8]], device: torch.device) -> int:
    """Decode files with nvJPEG; return their number."""
    from torchvision.io import decode_jpeg

    decode_jpeg([torch.from_numpy(data) for data in files], device=device)
    torch.cuda.synchronize()
    return len(files)
