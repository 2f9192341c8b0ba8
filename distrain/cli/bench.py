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

from distrain.data.config import Augment, Data
from distrain.data.decoding.image import jpeg_size
from distrain.data.loader import Loader, Request
from distrain.data.order import Order
from distrain.data.shards.dataset import Dataset
from distrain.distributed.world import World, local_world
from distrain.errors import UserError
from distrain.fields import Section, operation
from distrain.parsing import parse_section
from distrain.training.datasets import open_set

_ROUNDS = 5
_SEED = 0
_LIMIT_FILES = 1024


class Rate(NamedTuple):
    """What one side did: medians over the rounds."""

    name: str
    images_per_second: float
    cpu_ms: float
    """Milliseconds of CPU time an image, of all threads of this process."""


class Found(NamedTuple):
    """A measurement of a data set."""

    images: int
    """Images of a round."""
    batch: int
    threads: int
    rates: list[Rate]
    """The loader first."""
    seconds_to_first_batch: float


class Settings(Section):
    """The sections and fields of a config that a measurement uses."""

    data: Data
    """Samples."""
    augment: Augment = Augment()
    """Augmentation."""
    global_batch: int = operation(128, ge=1)
    """Samples of one batch. [operation]"""
    device: Literal["auto", "cpu", "cuda"] = operation("auto")
    """auto: a GPU where there is one. [operation]"""


def settings(url: str, overrides: Sequence[str]) -> Settings:
    """Make the settings of a measurement: defaults, and what the overrides say.

    Raises:
        UserError: naming every problem at once.
    """
    return parse_section(Settings, {"data": {"train": url}}, "the settings", overrides)


def measure(settings: Settings, images: int) -> Found:
    """Measure the loader on a data set, `images` a round, interleaved with the bare decode of as many of its files.

    Raises:
        UserError: the data does not fit the settings, or a package is missing.
    """
    began = time.monotonic()
    dataset = _open(settings)
    world = local_world(settings.device)
    threads = settings.data.decode_threads or world.cores
    limits = _limits(settings, world.device, threads)
    batch = settings.global_batch
    order = Order(
        dataset.manifest.group_rows, _SEED, 1, batch, settings.data.shuffle_rows
    )

    def requests() -> Iterator[Request]:
        for step in count():
            cursor = order.cursor(step)
            yield Request(cursor, 0, order.ids(cursor, 0), 0)

    batches = max(1, images // batch)
    with _loader(settings, world, dataset, requests()) as loader:
        next(loader)
        first = time.monotonic() - began

        def load() -> int:
            for _ in range(batches):
                next(loader)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            return batches * batch

        sides: dict[str, Callable[[], int]] = {"loader": load, **limits}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(_ROUNDS):
            for name, side in sides.items():
                measured[name].append(_timed(side))
    rates = [
        Rate(
            name,
            statistics.median(r for r, _ in found),
            statistics.median(c for _, c in found),
        )
        for name, found in measured.items()
    ]
    return Found(batches * batch, batch, threads, rates, first)


def _timed(side: Callable[[], int]) -> tuple[float, float]:
    """Images a second, and CPU milliseconds an image."""
    wall, cpu = time.monotonic(), time.process_time()
    images = side()
    return images / (time.monotonic() - wall), 1000 * (
        time.process_time() - cpu
    ) / images


def _open(settings: Settings) -> Dataset:
    return open_set(settings.data.train, settings.data, settings.augment)


def _loader(
    settings: Settings, world: World, dataset: Dataset, requests: Iterator[Request]
) -> Loader:
    return Loader(
        dataset,
        dataset.manifest.statistics,
        requests,
        data=settings.data,
        augment=settings.augment,
        seed=_SEED,
        run="bench data",
        batch=settings.global_batch,
        device=world.device,
        augmented=True,
        cores=world.cores,
    )


def _limits(
    settings: Settings, device: torch.device, threads: int
) -> dict[str, Callable[[], int]]:
    """Bare decodes of the set's own JPEG files: libjpeg-turbo, and the GPU's decoder where there is one."""
    dataset = _open(settings)  # of its own: a data set is read by one thread
    if dataset.manifest.encoding == "raw":
        return {}
    try:
        import simplejpeg
    except ImportError:
        raise UserError(
            "the bare decode needs simplejpeg: pip install 'distrain[bench]'"
        ) from None
    picked = range(0, dataset.manifest.rows, -(-dataset.manifest.rows // _LIMIT_FILES))
    rows = (dataset.rows(np.array([i]))[0].data.copy() for i in picked)
    files: list[NDArray[np.uint8]] = [
        data for data in rows if jpeg_size(data) is not None
    ]
    if not files:
        return {}
    pool = ThreadPoolExecutor(threads)

    def turbo() -> int:
        return sum(
            1 for _ in pool.map(lambda data: simplejpeg.decode_jpeg(data, "RGB"), files)
        )

    def gpu() -> int:
        from torchvision.io import decode_jpeg

        decode_jpeg([torch.from_numpy(data) for data in files], device=device)
        torch.cuda.synchronize()
        return len(files)

    return {
        "libjpeg-turbo alone": turbo,
        **({"nvJPEG alone": gpu} if device.type == "cuda" else {}),
    }
