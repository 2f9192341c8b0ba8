"""CPU milliseconds an image of distrain's loader and of its peers, on the same images, on two threads or workers.

    python tests/bench/peers.py [--images 1500] [--rounds 5] [--folder DIR] [--only NAME,...]

All make batches of 128 of the short-side-256, crop-224, mirror, PCA colour, normalise recipe, as float32 NCHW unless
the name says uint8; where a peer does less, its name says so. Each measurement is a process of its own; rounds are
interleaved; CPU time is that of the whole process tree. A peer that is not installed is named and left out: needs
`pip install 'distrain[bench]' scikit-learn webdataset spdl mosaicml-streaming litdata ffcv`.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, THREADS = 128, 2
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
AXES = np.array([[40.0, -9.0, 2.0], [42.0, 1.0, -4.0], [41.0, 9.0, 2.0]])


def cpu_seconds(pid: int | None = None) -> float:
    """User and system time of a process and all its descendants that live, and of those it has waited for."""
    pid = pid or os.getpid()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(int(fields[i]) for i in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")
    children = [
        int(c)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for c in (task / "children").read_text().split()
    ]
    return own + sum(cpu_seconds(child) for child in children)


def measure(batches: Iterator[Any]) -> dict[str, float]:
    """After two batches of warm-up, the rest of one pass."""
    images, began, cpu = 0, 0.0, 0.0
    for i, batch in enumerate(batches):
        if i == 1:
            began, cpu = time.monotonic(), cpu_seconds()
        elif i > 1:
            images += len(batch)
    wall = time.monotonic() - began
    return {
        "CPU-ms": 1000 * (cpu_seconds() - cpu) / images,
        "images/s": images / wall,
        "images": images,
    }


# --- distrain


def _distrain(shards: str, *overrides: str) -> Iterator[Any]:
    from distrain.data.batch import iter_training_requests
    from distrain.data.loader import Loader
    from distrain.data.order import SampleOrder
    from distrain.data.shards.dataset import Dataset
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store
    from distrain.distributed.world import make_local_world
    from distrain.training.bench_data import make_bench_config

    config = make_bench_config(shards, [f"data.decode_threads={THREADS}", *overrides])
    store = Store(shards)
    dataset = Dataset(
        store, Manifest.load(store), memory_bytes=2 << 30, retry_seconds=0
    )
    order = SampleOrder(dataset.manifest.rows_per_group, 0, 1, BATCH, 1024)
    options: dict[str, Any] = {
        "batch_size": BATCH,
        "device": make_local_world(config.device).device,
        "use_augmentation": True,
    }
    requests = iter_training_requests(order, range(order.steps_per_epoch), range(1))
    with Loader(
        dataset,
        dataset.manifest.statistics,
        requests,
        data=config.data,
        augment=config.augment,
        seed=0,
        run_dir="peers",
        **options,
    ) as loader:
        for batch in loader:
            yield batch.pixels


def _bare(shards: str) -> Iterator[Any]:
    """The limit: libjpeg-turbo on the same bytes, nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    import simplejpeg

    from distrain.data.shards.dataset import Dataset
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store

    store = Store(shards)
    dataset = Dataset(
        store, Manifest.load(store), memory_bytes=2 << 30, retry_seconds=0
    )
    files = [
        row.data
        for i in range(dataset.manifest.num_rows)
        for row in dataset.read_rows(np.array([i]))
    ]
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(files) - BATCH + 1, BATCH):
            part = files[start : start + BATCH]
            list(pool.map(lambda data: simplejpeg.decode_jpeg(data, "RGB"), part))
            yield part


# --- peers


def _dali_reader(photos: str) -> Iterator[Any]:
    """DALI's standard recipe: its own reader, decode, resize, crop."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None)
    def pipeline() -> Any:
        files, _ = fn.readers.file(file_root=photos, random_shuffle=True, name="reader")
        images = fn.resize(fn.decoders.image(files, device="cpu"), resize_shorter=256)
        place = {
            "crop_pos_x": fn.random.uniform(range=(0, 1)),
            "crop_pos_y": fn.random.uniform(range=(0, 1)),
        }
        return fn.crop_mirror_normalize(
            images,
            crop=(224, 224),
            mirror=fn.random.coin_flip(),
            mean=list(MEAN),
            std=list(STD),
            dtype=types.FLOAT,
            **place,
        )

    pipe = pipeline()
    pipe.build()
    for _ in range(pipe.epoch_size("reader") // BATCH):
        yield pipe.run()[0]


def _transform() -> Callable[[Any], Any]:
    """torchvision's own, with PCA colour added before normalising."""
    import torch
    from torchvision.transforms import v2

    axes = torch.tensor(AXES, dtype=torch.float32)
    normalize = v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD])
    first = v2.Compose(
        [
            v2.Resize(256),
            v2.RandomCrop(224),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )

    def transform(image: Any) -> Any:
        shift = 0.1 * axes @ torch.randn(3)
        return normalize(
            (first(image.convert("RGB")).float() + shift[:, None, None]) / 255
        )

    return transform


def _torchvision(photos: str) -> Iterator[Any]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(photos, _transform())
    for images, _ in DataLoader(
        dataset, BATCH, shuffle=True, num_workers=THREADS, drop_last=True
    ):
        yield images


def _opened(transform: Callable[[Any], Any], data: bytes) -> Any:
    from PIL import Image

    return transform(Image.open(io.BytesIO(data)))


def _webdataset(tar: str) -> Iterator[Any]:
    import webdataset
    from torch.utils.data import DataLoader

    transform = _transform()
    dataset = (
        webdataset.WebDataset(f"{tar}/{{0..1}}.tar", shardshuffle=False)
        .shuffle(500)
        .to_tuple("jpg", "cls")
    )
    dataset = dataset.map_tuple(lambda data: _opened(transform, data), int)
    for images, _ in DataLoader(dataset, BATCH, num_workers=THREADS, drop_last=True):
        yield images


def _streaming(folder: str) -> Iterator[Any]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    transform = _transform()

    class Photos(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            return _opened(transform, super().__getitem__(at)["image"])

    dataset = Photos(local=folder, shuffle=True, batch_size=BATCH)
    yield from DataLoader(dataset, BATCH, num_workers=THREADS, drop_last=True)


def _litdata(folder: str) -> Iterator[Any]:
    import litdata

    transform = _transform()
    dataset = litdata.StreamingDataset(
        folder, shuffle=True, transform=lambda data: _opened(transform, data)
    )
    yield from litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=THREADS, drop_last=True
    )


def _spdl(photos: str) -> Iterator[Any]:
    import torch
    from spdl.pipeline import PipelineBuilder

    transform, files = _transform(), sorted(Path(photos).rglob("*.JPEG"))
    order = np.random.default_rng(0).permutation(len(files))
    pipeline = (
        PipelineBuilder()
        .add_source([files[i] for i in order])
        .pipe(lambda path: _opened(transform, path.read_bytes()), concurrency=THREADS)
        .aggregate(BATCH, drop_last=True)
        .pipe(torch.stack)
        .add_sink(2)
        .build(num_threads=THREADS)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _ffcv(file: str) -> Iterator[Any]:
    """FFCV's own decoder and layout; centre crop and no PCA: it does less."""
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        NormalizeImage,
        RandomHorizontalFlip,
        ToTensor,
        ToTorchImage,
    )

    steps = [CenterCropRGBImageDecoder((224, 224), 224 / 256), RandomHorizontalFlip()]
    steps += [
        NormalizeImage(np.array(MEAN), np.array(STD), np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    loader = Loader(
        file,
        BATCH,
        THREADS,
        order=OrderOption.RANDOM,
        pipelines={"image": steps, "label": None},
        drop_last=True,
    )
    for batch in loader:
        yield batch[0]


SHORT = "augment.short_side=256"
BYTES = "data.normalise=device"
SIDES: dict[str, tuple[str, Callable[[str], Iterator[Any]]]] = {
    "as-is: bare libjpeg-turbo decode": ("keep", _bare),
    "as-is: distrain, uint8": ("keep", lambda place: _distrain(place, SHORT, BYTES)),
    "as-is: distrain, float32": ("keep", lambda place: _distrain(place, SHORT)),
    "as-is: distrain, random resized, float32": (
        "keep",
        lambda place: _distrain(place, SHORT, "augment.window=random_resized"),
    ),
    "as-is: distrain, data.backend=torch": (
        "keep",
        lambda place: _distrain(place, SHORT, "data.backend=torch"),
    ),
    "as-is: DALI's reader and recipe, no PCA": ("photos", _dali_reader),
    "as-is: torchvision, DataLoader": ("photos", _torchvision),
    "as-is: WebDataset": ("wds", _webdataset),
    "as-is: SPDL": ("photos", _spdl),
    "as-is: MosaicML Streaming": ("mds", _streaming),
    "as-is: LitData": ("litdata", _litdata),
    "as-is: FFCV, centre crop, no PCA": ("ffcv", _ffcv),
    "packed: bare libjpeg-turbo decode": ("square", _bare),
    "packed: distrain, uint8": ("square", lambda place: _distrain(place, BYTES)),
    "packed: distrain, float32": ("square", _distrain),
    "raw: distrain, uint8": ("raw", lambda place: _distrain(place, BYTES)),
    "raw: distrain, float32": ("raw", _distrain),
}
PACKAGES = {
    "wds": "webdataset",
    "mds": "streaming",
    "litdata": "litdata",
    "ffcv": "ffcv",
    "spdl": "spdl",
}


def missing(name: str) -> str | None:
    """The package that a side needs and that is not there."""
    package = PACKAGES.get(SIDES[name][0]) or ("spdl" if "SPDL" in name else None)
    return package if package and importlib.util.find_spec(package) is None else None


def _litdata_file(path: str) -> bytes:
    return Path(path).read_bytes()


def prepare(folder: Path, images: int) -> None:
    """Write the same images in every layout that is needed, on first use."""
    sys.path.insert(0, str(Path(__file__).parent))
    from photographs import folder as photographs

    from distrain.data.prepare.open import open_source
    from distrain.data.prepare.pack import pack_dataset
    from distrain.data.prepare.pack_options import Geometry, PackOptions

    photos = photographs(folder / "photos", images)
    files = sorted(photos.rglob("*.JPEG"))
    for name, geometry, encoding in (
        ("keep", "keep", "jpeg"),
        ("square", "square:256", "jpeg"),
        ("raw", "square:256", "raw"),
    ):
        if not (folder / name).exists():
            pack_dataset(
                open_source(str(photos)).source,
                str(folder / name),
                PackOptions(Geometry.from_text(geometry), encoding),
            )  # type: ignore[arg-type]
    if importlib.util.find_spec("webdataset") and not (folder / "wds").exists():
        import webdataset

        (folder / "wds").mkdir()
        for part in range(2):
            with webdataset.TarWriter(str(folder / f"wds/{part}.tar")) as tar:
                for i, file in enumerate(files[part::2]):
                    tar.write(
                        {"__key__": f"{i:06d}", "jpg": file.read_bytes(), "cls": i % 10}
                    )
    if importlib.util.find_spec("streaming") and not (folder / "mds").exists():
        from streaming import MDSWriter

        with MDSWriter(
            out=str(folder / "mds"), columns={"image": "bytes", "label": "int"}
        ) as writer:
            for i, file in enumerate(files):
                writer.write({"image": file.read_bytes(), "label": i % 10})
    if importlib.util.find_spec("litdata") and not (folder / "litdata").exists():
        import litdata

        litdata.optimize(
            _litdata_file,
            [str(f) for f in files],
            str(folder / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
        )
    if importlib.util.find_spec("ffcv") and not (folder / "ffcv").exists():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        from torchvision.datasets import ImageFolder

        fields = {
            "image": RGBImageField(
                write_mode="jpg", max_resolution=500, jpeg_quality=95
            ),
            "label": IntField(),
        }
        DatasetWriter(str(folder / "ffcv"), fields, num_workers=2).from_indexed_dataset(
            ImageFolder(str(photos))
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="distrain-peers-"))
    if args.one:
        place, side = SIDES[args.one]
        found = measure(side(str(folder / place)))
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    prepare(folder, args.images)
    names = [
        n
        for n in SIDES
        if not args.only or any(part in n for part in args.only.split(","))
    ]
    out = {name: package for name in names if (package := missing(name))}
    runs: dict[str, list[dict[str, float]]] = {
        name: [] for name in names if name not in out
    }
    for _ in range(args.rounds):
        for name in list(runs):
            command = [sys.executable, __file__, "--folder", str(folder), "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                out[name] = (done.stderr.strip().splitlines() or ["no word"])[-1]
                del runs[name]
    medians = {
        name: {k: statistics.median(r[k] for r in found) for k in found[0]}
        for name, found in runs.items()
    }
    for name, found in medians.items():
        bare = medians.get(f"{name.partition(':')[0]}: bare libjpeg-turbo decode")
        ratio = f"{found['CPU-ms'] / bare['CPU-ms']:6.2f} x bare" if bare else ""
        sys.stderr.write(
            f"{name:<44} {found['CPU-ms']:7.3f} CPU-ms {found['images/s']:7.0f} images/s {ratio}\n"
        )
    for name, why in out.items():
        sys.stderr.write(f"{name:<44} left out: {why}\n")
    sys.stdout.write(
        json.dumps({"medians": medians, "left out": out, "runs": runs}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
