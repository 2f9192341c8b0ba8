"""This process beside others: which one it is, and how many CPU cores it may use."""

import os
from contextlib import suppress
from pathlib import Path

_CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def count_available_cores() -> int:
    """Count the CPU cores that this process may use: by its affinity, and by the quota of its container (cgroup)."""
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    with suppress(
        OSError, ValueError
    ):  # no Linux, no limit ("max"), or version 1 of cgroups
        quota, period = _CPU_QUOTA_FILE.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def get_process_identity(pid: int) -> str | None:
    """What tells a process from all others in the world: boot, PID namespace, number and start; None if not there."""
    try:
        boot = (
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        )
        started = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8")
            .rpartition(")")[2]
            .split()[19]
        )
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {started}"
    except OSError:
        return None


def is_dead_local_process(identity: str) -> bool:
    """Whether a process is known to be dead: it ran on this machine, in this PID namespace."""
    own, parts = get_process_identity(os.getpid()), identity.split()
    if own is None or len(parts) != 4 or own.split()[:2] != parts[:2]:
        return False
    return get_process_identity(int(parts[2])) != identity
