import os
import platform
import subprocess
import sys

import pytest

import distrain.distributed.process
from distrain.distributed.process import count_available_cores, count_available_memory


@pytest.mark.parametrize(
    ("limit", "found"), [(None, 8), (1, 1), (4, 4), (8, 8), (64, 8)]
)
def test_affinity_and_the_containers_limit_bound_the_cores(monkeypatch, limit, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(distrain.distributed.process, "read_cpu_limit", lambda: limit)
    assert count_available_cores() == found


@pytest.mark.parametrize(
    ("limit", "found"), [(None, 4096), (1000, 1000), (1 << 60, 4096)]
)
def test_the_machine_and_the_containers_limit_bound_the_memory(
    monkeypatch, tmp_path, limit, found
):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:       4 kB\n")
    monkeypatch.setattr(distrain.distributed.process, "_MEMORY_INFO_FILE", info)
    monkeypatch.setattr(
        distrain.distributed.process, "read_memory_limit", lambda: limit
    )
    assert count_available_memory() == found


def test_a_machine_that_does_not_say_what_is_available(monkeypatch, tmp_path):
    monkeypatch.setattr(
        distrain.distributed.process, "_MEMORY_INFO_FILE", tmp_path / "none"
    )
    assert count_available_memory() > 1 << 20


_COUNT_PAGE_FAULTS = """
import resource, sys
from distrain.distributed.process import keep_freed_memory

def count_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        buffers = [bytearray(3 << 20) for _ in range(4)]
        for buffer in buffers:
            buffer[::4096] = bytes(len(buffer) // 4096)
        del buffer, buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = count_page_faults()
keep_freed_memory()
print(before, count_page_faults())
"""


def test_freed_memory_is_kept_for_the_next_allocation():
    """Counted in a process of its own, whose C library nothing else has tuned."""
    found = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGE_FAULTS],
        capture_output=True,
        text=True,
        check=True,
    )
    default, kept = map(int, found.stdout.split())
    if platform.libc_ver()[0] == "glibc":
        assert kept < default / 5
    else:
        assert kept < default * 2
