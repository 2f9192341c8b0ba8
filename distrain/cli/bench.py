"""How fast data arrives: the loader alone, beside the bare decode of the same bytes in the same run."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.batch import BatchRequest
from distrain.data.config import Augment, DataConfig
from distrain.data.decoding.image import parse_jpeg_size
from distrain.data.loader import Loader
from distrain.data.order import SampleOrder
from distrain.data.shards.dataset import Dataset
from distrain.distributed.world import World, make_local_world
from distrain.errors import UserError
from distrain.fields import Section, operation_field
from distrain.parsing import parse_section
from distrain.training.run_data import open_dataset

_NUM_ROUNDS = 5
_SEED = 0
_MAX_DECODE_FILES = 1024


class Throughput(NamedTuple):
    """What one side did: medians over the rounds."""

    name: str
    images_per_second: float
    cpu_ms_per_image: float
    """Milliseconds of CPU time an image, of all threads of this process."""


class BenchResult(NamedTuple):
    """A measurement of a data set."""

    images_per_round: int
    """Images of a round."""
    batch_size: int
    num_threads: int
    throughputs: list[Throughput]
    """The loader first."""
    seconds_to_first_batch: float


class BenchConfig(Section):
    """The sections and fields of a config that a measurement uses."""

    data: DataConfig
    """Samples."""
    augment: Augment = Augment()
    """Augmentation."""
    global_batch: int = operation_field(128, ge=1)
    """Samples of one batch. [operation]"""
    device: Literal["auto", "cpu", "cuda"] = operation_field("auto")
    """auto: a GPU where there is one. [operation]"""


def make_bench_config(url: str, overrides: Sequence[str]) -> BenchConfig:
    """Make the settings of a measurement: defaults, and what the overrides say.

    Raises:
        UserError: naming every problem at once.
    """
    return parse_section(
        BenchConfig, {"data": {"train": url}}, "the settings", overrides
    )


def measure_loader(config: BenchConfig, images_per_round: int) -> BenchResult:
    """Measure the loader on a data set, `images` a round, interleaved with the bare decode of as many of its files.

    Raises:
        UserError: the data does not fit the settings, or a package is missing.
    """
    began = time.monotonic()
    dataset = _open_dataset(config)
    world = make_local_world(config.device)
    threads = config.data.decode_threads or world.num_cores
    limits = _make_bare_decoders(config, world.device, threads)
    batch = config.global_batch
    order = SampleOrder(
        dataset.manifest.rows_per_group, _SEED, 1, batch, config.data.shuffle_rows
    )

    def generate_requests() -> Iterator[BatchRequest]:
        for step in count():
            cursor = order.get_cursor(step)
            yield BatchRequest(cursor, 0, order.get_sample_ids(cursor, 0), 0)

    batches = max(1, images_per_round // batch)
    with _create_loader(config, world, dataset, generate_requests()) as loader:
        next(loader)
        first = time.monotonic() - began

        def load_batches() -> int:
            for _ in range(batches):
                next(loader)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return batches * batch

        sides: dict[str, Callable[[], int]] = {"loader": load_batches, **limits}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(_NUM_ROUNDS):
            for name, side in sides.items():
                measured[name].append(_measure_throughput(side))
    rates = [
        Throughput(
            name,
            statistics.median(r for r, _ in found),
            statistics.median(c for _, c in found),
        )
        for name, found in measured.items()
    ]
    return BenchResult(batches * batch, batch, threads, rates, first)


def _measure_throughput(process_images: Callable[[], int]) -> tuple[float, float]:
    """Images a second, and CPU milliseconds an image."""
    wall, cpu = time.monotonic(), time.process_time()
    images = process_images()
    return images / (time.monotonic() - wall), 1000 * (
        time.process_time() - cpu
    ) / images


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
        run_dir="bench data",
        batch_size=config.global_batch,
        device=world.device,
        use_augmentation=True,
        num_cores=world.num_cores,
    )


def _make_bare_decoders(
    config: BenchConfig, device: torch.device, num_threads: int
) -> dict[str, Callable[[], int]]:
    """Bare decodes of the set's own JPEG files: libjpeg-turbo, and the GPU's decoder where there is one."""
    dataset = _open_dataset(config)  # of its own: a data set is read by one thread
    if dataset.manifest.encoding == "raw":
        return {}
    try:
        import simplejpeg
    except ImportError:
        raise UserError(
            "the bare decode needs simplejpeg: pip install 'distrain[bench]'"
        ) from None
    picked = range(
        0, dataset.manifest.num_rows, -(-dataset.manifest.num_rows // _MAX_DECODE_FILES)
    )
    rows = (dataset.read_rows(np.array([i]))[0].data.copy() for i in picked)
    files: list[NDArray[np.uint8]] = [
        data for data in rows if parse_jpeg_size(data) is not None
    ]
    if not files:
        return {}
    pool = ThreadPoolExecutor(num_threads)

    def decode_on_cpu() -> int:
        return sum(
            1 for _ in pool.map(lambda data: simplejpeg.decode_jpeg(data, "RGB"), files)
        )

    def decode_on_gpu() -> int:
        from torchvision.io import decode_jpeg

        decode_jpeg([torch.from_numpy(data) for data in files], device=device)
        torch.cuda.synchronize()
        return len(files)

    return {
        "libjpeg-turbo alone": decode_on_cpu,
        **({"nvJPEG alone": decode_on_gpu} if device.type == "cuda" else {}),
    }
