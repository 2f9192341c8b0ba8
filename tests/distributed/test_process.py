import os

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
