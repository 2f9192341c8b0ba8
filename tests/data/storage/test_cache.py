import os
import subprocess
import sys
import time

import numpy as np
from crc32c import crc32c

from distrain.data.storage.cache import DiskCache
from distrain.data.storage.store import StorageCounters


def ranges(n, size=1000):
    rng = np.random.default_rng(0)
    return [(DiskCache.make_key("set", i), rng.bytes(size)) for i in range(n)]


def test_what_was_put_comes_back(tmp_path):
    counts = StorageCounters()
    cache = DiskCache(str(tmp_path / "cache"), 100_000, counts)
    (key, data), (other, _) = ranges(2)
    assert cache.get_range(key, crc32c(data)) is None
    cache.put_range(key, data)
    assert cache.get_range(key, crc32c(data)) == data
    assert cache.get_range(other, crc32c(data)) is None
    assert (counts.cache_hits, dict(counts.errors_by_kind)) == (1, {})


def test_a_damaged_entry_is_removed_and_counted(tmp_path):
    counts = StorageCounters()
    cache = DiskCache(str(tmp_path), 100_000, counts)
    ((key, data),) = ranges(1)
    cache.put_range(key, data)
    (file,) = tmp_path.glob("*.range")
    file.write_bytes(data[:-1] + b"x")
    assert cache.get_range(key, crc32c(data)) is None
    assert not file.exists()
    assert counts.errors_by_kind == {"damaged cache entry": 1}


def test_the_least_recently_used_go_first(tmp_path):
    counts = StorageCounters()
    cache = DiskCache(str(tmp_path), 10_500, counts)
    entries = ranges(14)
    for i, (key, data) in enumerate(entries):
        cache.put_range(key, data)
        os.utime(tmp_path / f"{key}.range", ns=(i, i))
        if i >= 1:  # the first one is in use
            assert cache.get_range(*(entries[0][0], crc32c(entries[0][1]))) is not None
    there = [cache.get_range(key, crc32c(data)) is not None for key, data in entries]
    assert there == [True] + [False] * 4 + [True] * 9
    assert counts.cache_evictions == 4
    assert sum(f.stat().st_size for f in tmp_path.glob("*.range")) <= 10_500


def test_an_entry_larger_than_the_cache_is_not_kept(tmp_path):
    cache = DiskCache(str(tmp_path / "cache"), 999, StorageCounters())
    ((key, data),) = ranges(1)
    cache.put_range(key, data)
    assert cache.get_range(key, crc32c(data)) is None


def test_a_slow_reader_keeps_what_is_evicted(tmp_path):
    cache = DiskCache(str(tmp_path), 1500, StorageCounters())
    (one, first), (two, second) = ranges(2)
    cache.put_range(one, first)
    with (tmp_path / f"{one}.range").open("rb") as slow:
        cache.put_range(two, second)
        assert cache.get_range(one, crc32c(first)) is None
        assert slow.read() == first


def test_a_folder_that_cannot_be_written_to_costs_no_run(tmp_path):
    counts = StorageCounters()
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(str(tmp_path / "file"), 10_000, counts)
    ((key, data),) = ranges(1)
    cache.put_range(key, data)
    assert cache.get_range(key, crc32c(data)) is None
    assert sum(counts.errors_by_kind.values()) == 2


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    """And what a living one is writing is not."""
    code = f"""
import fcntl, time
for name in ("dead", "alive"):
    file = open({str(tmp_path)!r} + "/" + name + ".1.1.partial", "wb")
    if name == "alive":
        fcntl.flock(file, fcntl.LOCK_EX)
        print("ready", flush=True)
        time.sleep(60)
    file.close()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    DiskCache(str(tmp_path), 10_000, StorageCounters())
    assert [f.name for f in tmp_path.iterdir()] == ["alive.1.1.partial"]
    process.kill()
    process.communicate()
    end = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < end:
        DiskCache(str(tmp_path), 10_000, StorageCounters())
    assert list(tmp_path.iterdir()) == []
