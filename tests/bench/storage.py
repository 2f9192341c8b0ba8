"""Storage, measured: `python tests/bench/storage.py pack|stream|memory|open`. Ratios of interleaved runs.

pack    a pack of photographs against the bare decode, resize and encode of the same files on as many processes
stream  row groups of packed shards from a real S3 server, against plain clients with as many connections
memory  the peak memory of a reader at 10 and at 10,000 row groups of one size
open    opening a data set of 10,000 shards
"""

import argparse
import http.client
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.extend(
    str(Path(__file__).parents[1] / name) for name in ("", "data", "s3", "bench")
)

from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.entries import RowGroup, Shard
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.distributed.process import count_available_cores

_CONNECTIONS = 8
_ROUNDS = 5


def bare(paths: Sequence[str]) -> int:
    """What a pack cannot do without: decode, resize and cut, encode."""
    done = 0
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        width, height = (
            max(256, round(image.width * scale)),
            max(256, round(image.height * scale)),
        )
        left, top, x, y = (
            (width - 256) // 2,
            (height - 256) // 2,
            image.width / width,
            image.height / height,
        )
        box = (
            left * x,
            top * y,
            min((left + 256) * x, image.width),
            min((top + 256) * y, image.height),
        )
        file = io.BytesIO()
        image.resize((256, 256), Image.Resampling.LANCZOS, box=box).save(
            file, "JPEG", quality=95
        )
        done += len(file.getvalue())
    return done


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def cpu() -> float:
    used = (
        resource.getrusage(who)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of CPU time of this process and its children."""
    began, before = time.monotonic(), cpu()
    work()
    return time.monotonic() - began, cpu() - before


def bench_pack(work: Path) -> None:
    import photographs

    photos, processes = (
        photographs.folder(work / "photos", 4000),
        count_available_cores(),
    )
    paths = sorted(str(path) for path in photos.rglob("*.JPEG"))
    chunks = [paths[i : i + 32] for i in range(0, len(paths), 32)]

    def plain() -> None:
        with ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn")
        ) as pool:
            list(pool.map(bare, chunks))

    def ours() -> None:
        target = work / "packed"
        shutil.rmtree(target, ignore_errors=True)
        pack_dataset(
            open_source(str(photos)).source,
            str(target),
            PackOptions(Geometry("square", 256)),
            num_processes=processes,
        )

    rounds = [(timed(plain), timed(ours)) for _ in range(_ROUNDS)]
    for (plain_wall, plain_cpu), (wall, used) in rounds:
        tell(f"bare {plain_wall:.2f} s, {plain_cpu / len(paths) * 1e3:.2f} CPU-ms an image; "
              f"pack {wall:.2f} s, {used / len(paths) * 1e3:.2f}: {wall / plain_wall:.3f} x")  # fmt: skip
    tell(f"median {statistics.median(ours[0] / plain[0] for plain, ours in rounds):.3f} x the time, "
          f"{statistics.median(ours[1] / plain[1] for plain, ours in rounds):.3f} x the CPU time")  # fmt: skip


def bench_stream(work: Path) -> None:
    import boto3
    import photographs
    from botocore.config import Config
    from ceph import KEY, PORT, SECRET, Ceph

    server = Ceph(work / "ceph")
    (work / "ceph").mkdir()
    server.up()
    os.environ.update(
        AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1"
    )
    os.environ["AWS_ENDPOINT_URL"] = server.url
    checksums = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=_CONNECTIONS,
    )
    client = boto3.client("s3", endpoint_url=server.url, config=checksums)
    client.create_bucket(Bucket="data")
    photos = photographs.folder(work / "photos", 4000)
    pack_dataset(
        open_source(str(photos)).source,
        "s3://data/set",
        PackOptions(Geometry("keep")),
        num_processes=count_available_cores(),
    )
    # Plain reads of a public object need no signature: the cheapest client there is.
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": "arn:aws:s3:::data/*",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    client.put_bucket_policy(Bucket="data", Policy=policy)
    store = Store("s3://data/set")
    manifest = Manifest.load(store)
    ranges = [
        (shard.path, group.start, group.end)
        for shard in manifest.shards
        for group in shard.groups
    ]
    total = sum(end - start for _, start, end in ranges)
    local, obstore_store = threading.local(), Store("s3://data/set")

    def plain_http(one: tuple[str, int, int]) -> int:
        path, start, end = one
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", PORT)
        local.connection.request(
            "GET", f"/data/set/{path}", headers={"Range": f"bytes={start}-{end - 1}"}
        )
        answer = local.connection.getresponse()
        assert answer.status == 206, answer.status
        return len(answer.read())

    def with_boto(one: tuple[str, int, int]) -> int:
        path, start, end = one
        body = client.get_object(
            Bucket="data", Key=f"set/{path}", Range=f"bytes={start}-{end - 1}"
        )["Body"]
        return len(body.read())

    def with_obstore(one: tuple[str, int, int]) -> int:
        return len(obstore_store.read_view(*one))

    def plain(get: Callable[[tuple[str, int, int]], int]) -> None:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            assert sum(pool.map(get, ranges)) == total

    # One reader for all rounds, as in a training: its first rounds pay for memory that it has not had before.
    dataset, fetching = (
        Dataset(store, manifest, memory_bytes=100 << 20, retry_seconds=60.0),
        ThreadPoolExecutor(_CONNECTIONS),
    )

    def ours() -> None:
        """Every row of every group in order, verified, groups fetched ahead as the loader does."""
        ends, read = np.cumsum(manifest.rows_per_group), 0
        for g, end in enumerate(ends.tolist()):
            dataset.prefetch_row_groups(
                ([h] for h in range(g, min(g + 16, len(ends)))), fetching
            )
            read += sum(
                len(row.data)
                for row in dataset.read_rows(
                    np.arange(end - manifest.rows_per_group[g], end)
                )
            )
        assert read > 0.9 * total

    ways = {"http.client": lambda: plain(plain_http), "boto3": lambda: plain(with_boto),
            "obstore": lambda: plain(with_obstore), "distrain": ours}  # fmt: skip
    try:
        for way in [*ways.values()] * 2:
            way()
        rounds = [
            {name: timed(way) for name, way in ways.items()} for _ in range(_ROUNDS)
        ]
    finally:
        server.down()
    tell(f"{len(ranges)} ranges, {total / 1e6:.0f} MB, {_CONNECTIONS} connections")
    for name in ways:
        walls, cpus = zip(*(one[name] for one in rounds), strict=True)
        speed, cost = (
            total / statistics.median(walls) / 1e6,
            statistics.median(cpus) * 1e9 / total,
        )
        tell(f"{name:<12} {speed:6.0f} MB/s, {cost:.2f} CPU-s a GB")
    ratios = [
        min(wall for name, (wall, _) in one.items() if name != "distrain")
        / one["distrain"][0]
        for one in rounds
    ]
    each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    tell(
        f"distrain has {statistics.median(ratios):.2f} of the fastest one's speed ({each})"
    )


_READ = """
import re, sys
from pathlib import Path
import numpy as np
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
def peak():  # not getrusage, which keeps the peak of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
store = Store(sys.argv[1])
manifest = Manifest.load(store)
dataset = Dataset(store, manifest, memory_bytes=1 << 20, retry_seconds=0.0)
opened = peak()
rng, ends = np.random.default_rng(0), np.cumsum(manifest.rows_per_group)
for _ in range(3000):
    g = int(rng.integers(len(ends)))
    dataset.read_rows(np.arange(ends[g] - manifest.rows_per_group[g], ends[g]))
print(len(ends), opened, peak())
"""


def bench_memory(work: Path) -> None:
    from sets import SetWriter

    from distrain.data.shards.stats import ColorStatistics

    rng = np.random.default_rng(0)
    for groups in (10, 10_000):
        place = work / f"set-{groups}"
        writer = SetWriter(
            Store(str(place)), ["a", "b"], (8, 8), group_rows=10, shard_groups=100
        )
        for i in range(10 * groups):
            writer.add(rng.bytes(20_000), i % 2, f"{i}.jpg")
        writer.finish(ColorStatistics.from_covariance(np.zeros(3), np.eye(3)))
        out = subprocess.run(
            [sys.executable, "-c", _READ, str(place)],
            check=True,
            capture_output=True,
            text=True,
        )
        n, opened, peak = out.stdout.split()
        tell(
            f"{n} row groups of 200 kB, data.memory 1 MiB: {opened} MiB when open, peak {peak} MiB"
        )


def bench_open(work: Path) -> None:
    groups = tuple(
        RowGroup(64, 4 + 2_000_000 * i, 2_000_004 + 2_000_000 * i, 0xFFFFFFFF - i)
        for i in range(2)
    )
    import photographs

    small = pack_dataset(
        open_source(str(photographs.folder(work / "few", 20))).source,
        str(work / "small"),
        PackOptions(),
    ).manifest
    shards = tuple(
        Shard(f"shard-{i:05d}.parquet", 4_100_000, groups, "0" * 64, 4_000_004, i)
        for i in range(10_000)
    )
    store = Store(str(work / "many"))
    store.write(MANIFEST_FILE, replace(small, shards=shards).to_json().encode())
    for _ in range(_ROUNDS):
        fresh = Store(str(work / "many"))
        began = time.monotonic()
        manifest = Manifest.load(fresh)
        Dataset(fresh, manifest, memory_bytes=1 << 28, retry_seconds=0.0)
        opened = time.monotonic() - began
        manifest.fingerprint  # noqa: B018 - computed once, for a run's checkpoints
        hashed, counts = time.monotonic() - began, fresh.counters
        tell(
            f"{len(manifest.shards):,} shards, {manifest.num_rows:,} rows: open after {opened:.2f} s"
        )
        tell(
            f"  {counts.num_requests} read of {counts.bytes_read / 1e6:.1f} MB; fingerprint after {hashed:.2f} s"
        )


BENCHES = {
    "pack": bench_pack,
    "stream": bench_stream,
    "memory": bench_memory,
    "open": bench_open,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=BENCHES)
    chosen = parser.parse_args().part
    with tempfile.TemporaryDirectory() as folder:
        BENCHES[chosen](Path(folder))
