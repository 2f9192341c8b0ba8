"""Limits of this process's control groups: those of its container, pod, job or slice.

Version 1 has a hierarchy of folders per controller, version 2 one for all of them; a
machine may have both. A limit of any ancestor holds too: the smallest counts.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_SYSTEM_ROOT = Path("/")


class _Mount(NamedTuple):
    """A mounted hierarchy."""

    version: int
    controllers: frozenset[str]
    """Controllers of version 1; version 2 has a single hierarchy for all."""
    root: PurePosixPath
    """Folder of the hierarchy that is mounted: not its top inside many containers."""
    mount_point: PurePosixPath


def read_cpu_limit(system_root: Path = _SYSTEM_ROOT) -> int | None:
    """Return the CPU cores that the process may use at most, None without a limit.

    A fraction is rounded up: 1.5 CPUs keep two processes busy.

    Args:
        system_root: folder that has the machine's /proc and /sys.
    """
    limits = []
    for version, folder in _find_own_folders("cpu", system_root):
        # No limit ("max" or -1), no such file (the top has none), or no right to read.
        with suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0 and period > 0:
                limits.append(-(-quota // period))
    return min(limits, default=None)


def read_memory_limit(system_root: Path = _SYSTEM_ROOT) -> int | None:
    """Return the bytes of memory that the process may use at most.

    None without a limit, which version 1 may also write as a number close to 2^63.

    Args:
        system_root: folder that has the machine's /proc and /sys.
    """
    # Beyond memory.high a process is not killed, but all but stopped.
    names = {1: ["memory.limit_in_bytes"], 2: ["memory.max", "memory.high"]}
    limits = []
    for version, folder in _find_own_folders("memory", system_root):
        for name in names[version]:
            with suppress(OSError, ValueError):
                limit = int((folder / name).read_text())
                if 0 < limit < 1 << 62:
                    limits.append(limit)
    return min(limits, default=None)


def _find_own_folders(controller: str, system_root: Path) -> Iterator[tuple[int, Path]]:
    """Yield the folders of the process's groups and of their ancestors.

    Args:
        controller: cpu or memory.
        system_root: folder that has the machine's /proc and /sys.

    Yields:
        The version (1 or 2), and the folder, which need not exist.
    """
    try:
        groups = (system_root / "proc/self/cgroup").read_text(encoding="utf-8")
        mounts = (system_root / "proc/self/mountinfo").read_text(encoding="utf-8")
    # Not Linux.
    except OSError:
        return
    for mount in _parse_mounts(mounts):
        if mount.version == 1 and controller not in mount.controllers:
            continue
        group = _parse_group(groups, controller if mount.version == 1 else "")
        if group is None:
            continue
        folder = _locate_group(group, mount)
        while True:
            yield mount.version, system_root / folder.relative_to("/")
            if folder == mount.mount_point:
                break
            folder = folder.parent


def _locate_group(group: PurePosixPath, mount: _Mount) -> PurePosixPath:
    """Return the folder of a group below a mount point.

    A group that is not below what is mounted is shown by the mount point at best: the
    two are written as seen from different places (namespaces).
    """
    is_visible = group.is_relative_to(mount.root) and ".." not in group.parts
    if not is_visible:
        return mount.mount_point
    return mount.mount_point / group.relative_to(mount.root)


def _parse_group(groups: str, controller: str) -> PurePosixPath | None:
    """Return the process's group from /proc/self/cgroup; controller "": version 2."""
    for line in groups.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/") and controller in controllers.split(","):
            return PurePosixPath(path)
    return None


def _parse_mounts(mounts: str) -> Iterator[_Mount]:
    """Yield the mounted hierarchies from /proc/self/mountinfo."""
    for line in mounts.splitlines():
        # Optional fields end with a dash; then come type, device and options.
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.partition(" ")
        if kind not in ("cgroup", "cgroup2"):
            continue
        _, _, _, root, mount_point = fields.split(" ")[:5]
        controllers = options.rpartition(" ")[2].split(",")
        yield _Mount(
            version=2 if kind == "cgroup2" else 1,
            controllers=frozenset(controllers),
            root=PurePosixPath(_unescape(root)),
            mount_point=PurePosixPath(_unescape(mount_point)),
        )


def _unescape(path: str) -> str:
    r"""Replace the octal escapes of /proc, such as \040 for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
