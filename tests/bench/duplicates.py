"""What finding equal images costs: `python tests/bench/duplicates.py cost OTHER|search|near [--images N]`.

cost    CPU time of pack and index of photographs, against another checkout in interleaved pairs
search  seconds to find equal and near images among as many random hashes as ImageNet has images
near    CPU milliseconds per image of reading, decoding and hashing packed 256 x 256 images for --near
"""

import argparse
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import photographs

from distrain.data.prepare.commands import pack
from distrain.data.prepare.duplicates import (
    HashedSet,
    find_duplicates,
    find_equal_images,
)
from distrain.data.prepare.near_duplicates import add_near_duplicates, find_near_pairs
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store

ROWS = 1_281_167
_PAIRS = 7
_RUN = "import sys; from distrain.cli.main import main; sys.exit(main())"


def tell(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def cpu_seconds(checkout: Path, arguments: list[str]) -> float:
    """CPU time of a command of a checkout, and of all of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", _RUN, *arguments],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        cwd=checkout,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_samples(photos: Path, tar: Path) -> None:
    """Write a folder of classes as a WebDataset shard of `.jpg` and `.cls`."""
    classes = sorted(path.name for path in photos.iterdir())
    with tarfile.open(tar, "w") as archive:
        for path in sorted(photos.rglob("*.JPEG")):
            key = f"{path.parent.name}_{path.stem}"
            archive.add(path, f"{key}.jpg")
            label = str(classes.index(path.parent.name)).encode()
            member = tarfile.TarInfo(f"{key}.cls")
            member.size = len(label)
            archive.addfile(member, io.BytesIO(label))


def bench_cost(work: Path, other: Path, images: int) -> None:
    """Compare pack and index with those of another checkout."""
    photos = photographs.folder(work / "photos", images)
    (work / "tars").mkdir()
    write_samples(photos, work / "tars/photos.tar")
    here = Path(__file__).parents[2]
    target = work / "target"
    commands = {
        "pack": ["pack", str(photos), str(target)],
        "index": ["index", str(work / "tars"), "--to", str(target)],
    }
    for name, arguments in commands.items():
        ratios = []
        least = dict.fromkeys((here, other), float("inf"))
        for pair in range(_PAIRS):
            used = {}
            # Neither is always the first.
            for checkout in (here, other) if pair % 2 else (other, here):
                shutil.rmtree(target, ignore_errors=True)
                used[checkout] = cpu_seconds(checkout, [*arguments, "--processes", "1"])
                least[checkout] = min(least[checkout], used[checkout])
            ratios.append(used[here] / used[other])
            each = [1e3 * used[checkout] / images for checkout in (here, other)]
            tell(
                f"{name} {each[0]:.3f} and {each[1]:.3f} CPU-ms per image: {ratios[-1]:.4f}"
            )
        tell(
            f"{name}: {statistics.median(ratios):.4f} x the CPU time, the median of "
            f"{_PAIRS} pairs; {least[here] / least[other]:.4f} x, least of each"
        )


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def bench_search() -> None:
    """Search as many random hashes as ImageNet has images."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (ROWS, 2), np.uint64)
    hashes[-1000:] = hashes[:1000]
    values = hashes[:, 0].copy()
    values[-1000:] ^= np.uint64(0b1011)
    tell(f"equal of {ROWS:,}: {timed(lambda: find_equal_images([hashes])):.2f} s")
    tell(f"near of {ROWS:,}: {timed(lambda: list(find_near_pairs(values))):.2f} s")


def bench_near(work: Path, images: int) -> None:
    """Look for near-duplicates in a packed set."""
    photos = photographs.folder(work / "photos", images)
    pack(photos, work / "set")
    store = Store(str(work / "set"))
    dataset = HashedSet(store, Manifest.load(store))
    report = find_duplicates(dataset)
    add_near_duplicates(report, dataset)
    for _ in range(3):
        began = time.process_time()
        add_near_duplicates(report, dataset)
        used = time.process_time() - began
        tell(f"near: {1e3 * used / images:.2f} CPU-ms per image")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["cost", "search", "near"])
    parser.add_argument("other", nargs="?", type=Path, help="another checkout")
    parser.add_argument("--images", type=int, default=4000)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if chosen.part == "cost":
            bench_cost(Path(folder), chosen.other.resolve(), chosen.images)
        elif chosen.part == "near":
            bench_near(Path(folder), chosen.images)
        else:
            bench_search()
