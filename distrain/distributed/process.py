"""Processes: cores and memory that this one may use, and which others are dead."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from distrain.distributed.cgroup import read_cpu_limit, read_memory_limit

_MEMORY_INFO_FILE = Path("/proc/meminfo")
# Parameters of glibc's mallopt(3), and the largest value that it takes for the second.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_MAX_MMAP_THRESHOLD_BYTES = 32 << 20
_KEPT_BYTES = 64 << 20


def count_available_cores() -> int:
    """Count the CPU cores that this process may use.

    Both its affinity and the quota of its container (cgroup) limit them.
    """
    cores = os.cpu_count() or 1
    # Not every system has affinities.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(cores, read_cpu_limit() or cores)


def count_available_memory() -> int:
    """Count the bytes of memory that this process may use.

    Both what the machine has available and the limit of its container (cgroup) count.
    """
    memory = _read_machine_memory()
    return min(memory, read_memory_limit() or memory)


def _read_machine_memory() -> int:
    """Return the bytes that the machine has available, or all that it has."""
    # Not Linux, or an old kernel.
    with suppress(OSError, StopIteration):
        lines = _MEMORY_INFO_FILE.read_text(encoding="utf-8").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Let this process keep 64 MiB of freed memory for its next allocations.

    By default, glibc gives the buffers of an image back to the system, which maps and
    clears their pages again for the next image: half of the CPU time of measuring
    photographs. Other C libraries have no such setting, and nothing is changed.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


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
