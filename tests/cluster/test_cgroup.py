"""Cores of a process in control groups of the kernel's, with a limit."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

# Of a machine with version 1, or with both; else of version 2.
V1 = Path("/sys/fs/cgroup/cpu")
TOP = V1 if V1.is_dir() else Path("/sys/fs/cgroup")
COUNT = """
import sys
from distrain.distributed.process import count_available_cores
for _ in sys.stdin:
    print(count_available_cores(), flush=True)
"""


@contextmanager
def group(parent: Path) -> Iterator[Path]:
    if TOP != V1:
        (parent / "cgroup.subtree_control").write_text("+cpu")
    folder = parent / f"distrain-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


def set_quota(folder: Path, cores: float) -> None:
    if TOP != V1:
        (folder / "cpu.max").write_text(f"{int(cores * 100000)} 100000")
        return
    (folder / "cpu.cfs_period_us").write_text("100000")
    (folder / "cpu.cfs_quota_us").write_text(str(int(cores * 100000)))


@pytest.mark.parametrize("is_own", [True, False])
def test_a_quota_of_the_kernels_is_seen(is_own):
    """On the process's own group, or on the one above it."""
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-c", COUNT]
    with (
        group(TOP) as above,
        group(above) as own,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process,
    ):

        def count() -> int:
            process.stdin.write("\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        (own / "cgroup.procs").write_text(str(process.pid))
        counts = [count()]
        for quota in (1.5, 0.3):
            set_quota(own if is_own else above, quota)
            counts.append(count())
        process.stdin.close()
        process.wait()
    assert counts == [cores, min(cores, 2), 1]
