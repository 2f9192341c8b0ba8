"""What the loader costs beside decoding: `python tests/bench/overhead.py [SHARDS]`.

CPU microseconds an image of order, draws, checksum and header walk, and seconds from opening a set of 1,281,167
rows, ImageNet's number, to its first batch (its manifest names one shard again and again).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from crc32c import crc32c

from distrain.data.config import Augment
from distrain.data.decoding.augment import draw_augment_params
from distrain.data.decoding.jpeg_header import parse_jpeg_size
from distrain.data.order import Cursor, SampleOrder
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.training.bench_data import make_bench_config, measure_loader

ROWS, BATCH = 1_281_167, 128


def each(work: Callable[[int], object], times: int, images: int = BATCH) -> float:
    """CPU microseconds an image; `work` is called with 0, 1, 2, ..."""
    work(0)
    began = time.process_time()
    for i in range(1, times + 1):
        work(i)
    return 1e6 * (time.process_time() - began) / times / images


def imagenet(store: Store, target: Path) -> Manifest:
    """The manifest of as many rows as ImageNet has, in shards that are all the first shard of a set."""
    small = Manifest.load(store)
    shard = small.shards[0]
    rows = sum(group.rows for group in shard.groups)
    target.mkdir()
    (target / shard.path).symlink_to(f"{store.local_path}/{shard.path}")
    shards, left = [], ROWS
    while left >= rows:
        shards.append(shard)
        left -= rows
    large = replace(small, shards=tuple(shards))
    (target / MANIFEST_FILE).write_text(large.to_json())
    return large


def main(shards: str) -> None:
    store = Store(shards)
    manifest = Manifest.load(store)
    dataset = Dataset(store, manifest, memory_bytes=1 << 30, retry_seconds=0)
    files = [
        row.data.copy()
        for row in dataset.read_rows(np.arange(min(1000, manifest.num_rows)))
    ]
    sizes = np.tile([375, 500], (BATCH, 1))
    with tempfile.TemporaryDirectory() as folder:
        large = imagenet(store, Path(folder) / "imagenet")
        order = SampleOrder(large.rows_per_group, 0, 8, BATCH, 1024)
        axes = large.statistics.compute_principal_axes()
        some = order.get_sample_ids(Cursor(0, 0), 0)
        both = {
            window: Augment(short_side=256, window=window)
            for window in ("crop", "random_resized")
        }  # type: ignore[arg-type]

        def drawn(window: str, i: int) -> object:
            return draw_augment_params(
                0, Cursor(i, 0), 0, some, sizes, both[window], axes
            )

        parts = {
            "order": each(
                lambda i: order.get_sample_ids(
                    Cursor(0, i % order.steps_per_epoch), i % 8
                ),
                800,
            ),
            "draws": each(lambda i: drawn("crop", i), 300),
            "draws, random resized": each(lambda i: drawn("random_resized", i), 300),
            "checksum": each(lambda i: crc32c(files[i % len(files)]), 1000, 1),
            "header walk": each(
                lambda i: parse_jpeg_size(files[i % len(files)]), 1000, 1
            ),
        }
        config = make_bench_config(
            str(Path(folder) / "imagenet"),
            [f"global_batch={BATCH}", "augment.short_side=256"],
        )
        first = measure_loader(config, BATCH)
    found = {
        "CPU us an image": parts,
        "together": sum(
            parts[k] for k in ("order", "draws", "checksum", "header walk")
        ),
        "bytes an image": sum(len(f) for f in files) / len(files),
        "seconds to the first batch": first.seconds_to_first_batch,
        "rows": large.num_rows,
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", help="Packed data set.")
    main(parser.parse_args().shards)
