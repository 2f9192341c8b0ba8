import os

import pytest

import distrain.distributed.process
from distrain.distributed.process import count_available_cores


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("max 100000", 8),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("400000 100000", 4),
    ],
)
def test_a_containers_quota_bounds_the_cores(monkeypatch, tmp_path, quota, found):
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(
        distrain.distributed.process, "_CPU_QUOTA_FILE", tmp_path / "cpu.max"
    )
    assert count_available_cores() == found
    monkeypatch.setattr(
        distrain.distributed.process, "_CPU_QUOTA_FILE", tmp_path / "none"
    )
    assert count_available_cores() == 8
