"""Processes: how many CPU cores this one may use, and which other ones are dead."""

import os
from contextlib import suppress
from pathlib import Path

_CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def count_available_cores() -> int:
    """Count the CPU cores that this process may use.

    Both its affinity and the quota of its container (cgroup) limit them.
    """
    cores = os.cpu_count() or 1
    # Not every system has affinities.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # Not Linux, no quota ("max"), or version 1 of cgroups: there is no limit to read.
    with suppress(OSError, ValueError):
        quota, period = _CPU_QUOTA_FILE.read_text().split()
        quota_cores = int(quota) // int(period)
        cores = min(cores, max(1, quota_cores))
    return cores


def get_process_identity(pid: int) -> str | None:
    """Return a string that identifies a process among all processes on all machines.

    It holds the boot id, the PID namespace, the PID and the start time. None if the
    process does not exist.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    # The second field, the command in parentheses, may hold spaces: count the fields
    # after it. Field 22 is the start time, in clock ticks since boot.
    start_time = stat.rpartition(")")[2].split()[19]
    return f"{boot_id.strip()} {namespace} {pid} {start_time}"


def is_dead_local_process(identity: str) -> bool:
    """Return True if a process ran on this machine and is known to be dead.

    A process of another machine or PID namespace is never known to be dead.
    """
    own_identity = get_process_identity(os.getpid())
    fields = identity.split()
    if own_identity is None or len(fields) != 4:
        return False
    if own_identity.split()[:2] != fields[:2]:
        return False
    return get_process_identity(int(fields[2])) != identity
