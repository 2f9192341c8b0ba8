"""Limits of control groups, from trees of files as the kernel and the runtimes show them."""

import pytest

from distrain.distributed.cgroup import read_cpu_limit, read_memory_limit

V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "31 23 0:28 {root} /sys/fs/cgroup/{name} rw shared:9 - cgroup cgroup rw,{name}"
UNLIMITED = 9223372036854771712


@pytest.fixture
def machine(tmp_path):
    """Make a tree of /proc and /sys from the groups, the mounts and the files of a process."""

    def make(groups, mounts, files):
        texts = {
            "proc/self/cgroup": groups,
            "proc/self/mountinfo": "\n".join(
                ["22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw", *mounts]
            ),
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        }
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return make


def v1_cpu(folder, quota, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("quota", "found"),
    [
        ("max 100000", None),
        ("max", None),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1000 100000", 1),
        ("400000 50000", 8),
        ("0 0", None),
        ("", None),
        ("nonsense here", None),
    ],
)
def test_a_quota_of_version_2(machine, quota, found):
    """`docker run --cpus=2` and a pod, with a namespace of their own: their group is the top."""
    root = machine("0::/", [V2.format(root="/")], {"cpu.max": quota})
    assert read_cpu_limit(root) == found


@pytest.mark.parametrize(
    ("quota", "found"), [(-1, None), (200000, 2), (150000, 2), (50000, 1), (0, None)]
)
@pytest.mark.parametrize("name", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_a_quota_of_version_1(machine, name, quota, found):
    root = machine(
        f"5:memory:/\n4:{name}:/\n3:cpuset:/other",
        [V1.format(root="/", name=name)],
        v1_cpu(name, quota),
    )
    assert read_cpu_limit(root) == found


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        (["max 100000", "400000 100000", "max 100000"], 4),
        (["200000 100000", "400000 100000", "max 100000"], 2),
        (["800000 100000", "max 100000", "300000 100000"], 3),
        (["max 100000", "max 100000", "max 100000"], None),
    ],
)
def test_the_smallest_limit_of_all_ancestors_counts(machine, limits, found):
    """A systemd slice, a pod's group above its container's, a job step's below its job's."""
    folders = ["a.slice", "a.slice/b.slice", "a.slice/b.slice/c.scope"]
    files = {
        f"{folder}/cpu.max": limit
        for folder, limit in zip(folders, limits, strict=True)
    }
    root = machine(f"0::/{folders[-1]}", [V2.format(root="/")], files)
    assert read_cpu_limit(root) == found


@pytest.mark.parametrize(
    ("group", "mounted", "folder"),
    [
        # Docker without a namespace: the group as the host sees it, mounted at the top.
        ("/docker/abc", "/docker/abc", "."),
        ("/docker/abc/job", "/docker/abc", "job"),
        ("/docker/abc/job", "/docker/abc", "."),
        # The host's whole tree is mounted.
        ("/docker/abc", "/", "docker/abc"),
        # As seen from other namespaces.
        ("/", "/docker/abc", "."),
        ("/../other", "/", "."),
        ("/", "/../..", "."),
        ("/docker/abcd", "/docker/abc", "."),
        # The group is not shown.
        ("/kubepods/pod1/abc", "/", "."),
    ],
)
def test_where_a_group_is_found(machine, group, mounted, folder):
    mounts = [V2.format(root=mounted)]
    root = machine(f"0::{group}", mounts, {f"{folder}/cpu.max": "300000 100000"})
    assert read_cpu_limit(root) == 3


def test_a_group_beside_ours_does_not_count(machine):
    files = {"other/cpu.max": "100000 100000", "ours/child/cpu.max": "100000 100000"}
    root = machine("0::/ours", [V2.format(root="/")], files)
    assert read_cpu_limit(root) is None


def test_both_versions_at_once(machine):
    """A hybrid machine: version 2 has the groups of systemd, but not the controllers."""
    mounts = [
        V1.format(root="/", name="cpu,cpuacct"),
        V1.format(root="/", name="memory"),
        V2.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
    ]
    groups = "7:cpu,cpuacct:/a\n6:memory:/m\n1:name=systemd:/x\n0::/x"
    files = {
        **v1_cpu("cpu,cpuacct/a", 300000),
        "memory/m/memory.limit_in_bytes": 5000,
        "memory/memory.limit_in_bytes": UNLIMITED,
        "unified/x/cpu.stat": "usage_usec 1",
    }
    root = machine(groups, mounts, files)
    assert read_cpu_limit(root) == 3
    assert read_memory_limit(root) == 5000


def test_a_mount_point_with_a_space(machine):
    mounts = [V2.format(root="/").replace("fs/cgroup ", r"fs/cgroup/my\040groups ")]
    root = machine("0::/", mounts, {"my groups/cpu.max": "300000 100000"})
    assert read_cpu_limit(root) == 3


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"a/memory.max": "max", "a/memory.high": "max"}, None),
        ({"a/memory.max": 4096, "a/memory.high": "max"}, 4096),
        ({"a/memory.max": 4096, "a/memory.high": 2048}, 2048),
        ({"a/b/memory.max": "max", "a/memory.max": 4096}, 4096),
        ({"a/b/memory.max": 8192, "a/memory.max": 4096}, 4096),
        ({}, None),
    ],
)
def test_memory_of_version_2(machine, files, found):
    root = machine("0::/a/b", [V2.format(root="/")], files)
    assert read_memory_limit(root) == found


@pytest.mark.parametrize(
    ("own", "above", "found"),
    [
        (UNLIMITED, UNLIMITED, None),
        (-1, UNLIMITED, None),
        (4096, UNLIMITED, 4096),
        (UNLIMITED, 4096, 4096),
    ],
)
def test_memory_of_version_1(machine, own, above, found):
    files = {
        "memory/a/b/memory.limit_in_bytes": own,
        "memory/a/memory.limit_in_bytes": above,
    }
    root = machine("4:memory:/a/b", [V1.format(root="/", name="memory")], files)
    assert read_memory_limit(root) == found


def test_a_system_without_groups(machine, tmp_path):
    assert read_cpu_limit(tmp_path / "none") is None
    assert read_memory_limit(tmp_path / "none") is None
    root = machine("0::/", [], {"cpu.max": "300000 100000"})
    assert read_cpu_limit(root) is None, "nothing is mounted"
