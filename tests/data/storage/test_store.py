import errno
import os
import zipfile
from pathlib import Path

import fsspec
import pytest
from stores import behaves_as_a_folder

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store
from distrain.errors import UserError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        yield Store(str(tmp_path / "folder"))
        return
    yield Store("memory://bucket/folder")
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_a_store_behaves_as_a_folder(store):
    behaves_as_a_folder(store)


def test_a_link_is_what_it_leads_to_and_the_rest_is_nothing_to_read(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "to folder").symlink_to("folder")
    (tmp_path / "to file").symlink_to("file")
    (tmp_path / "to nowhere").symlink_to("gone")
    (tmp_path / "in a circle").symlink_to("in a circle")
    os.mkfifo(tmp_path / "pipe")
    store = Store(str(tmp_path))
    assert store.list_entries() == [
        DirectoryEntry("file", 3, False),
        DirectoryEntry("folder", None, True),
        DirectoryEntry("in a circle", None, False, is_special=True),
        DirectoryEntry("pipe", None, False, is_special=True),
        DirectoryEntry("to file", 3, False),
        DirectoryEntry("to folder", None, True),
        DirectoryEntry("to nowhere", None, False, is_special=True),
    ]
    assert not store.exists("to nowhere")
    assert not store.exists("in a circle")
    assert not store.exists("x" * 300)
    store.remove("to folder")
    assert store.list_names() == [
        "file",
        "folder",
        "in a circle",
        "pipe",
        "to file",
        "to nowhere",
    ]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EACCES, False), (errno.EIO, True), (errno.ESTALE, True)],
)
def test_what_may_not_be_seen_is_absent_and_what_cannot_be_known_is_said(
    tmp_path, monkeypatch, number, raised
):
    def fail(path):
        raise OSError(number, os.strerror(number), path)

    store = Store(str(tmp_path))
    monkeypatch.setattr(os, "stat", fail)
    if not raised:
        assert not store.exists("x")
        return
    with pytest.raises(OSError, match="Errno"):
        store.exists("x")


def test_paths_and_ranges_that_no_file_has_are_errors_of_the_system(tmp_path):
    (tmp_path / "x").write_bytes(b"123")
    store = Store(str(tmp_path))
    for path, start, end in (
        ("a\0b", 0, 1),
        ("x", 1 << 70, (1 << 70) + 1),
        ("x", 0, 1 << 63),
    ):
        with pytest.raises(OSError, match="Errno"):
            store.read(path, start, end)
    assert store.read("x", 2, 1 << 40) == b"3"
    assert store.read("x", 5, 9) == b""


@pytest.mark.parametrize("name", ["/", "."])
def test_the_root_and_the_working_directory(name):
    store = Store(name)
    assert store.local_path == os.path.abspath(name)
    assert store.resolve_path("x") == os.path.join(os.path.abspath(name), "x")
    assert store.is_folder("")


def test_what_can_only_be_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/b.bin", b"hello")
    store = Store(f"zip://::{tmp_path}/set.zip")
    assert (store.read("a/b.bin"), store.list_names(), store.list_names("a")) == (
        b"hello",
        ["a"],
        ["b.bin"],
    )
    for act in (store.write, store.create_exclusive):
        with pytest.raises(OSError, match="is read-only"):
            act("c", b"")


def test_nothing_half_written_is_left(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(TypeError):
        store.write("file", 3)
    assert store.list_names() == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_is_no_failure_of_the_disk(tmp_path, monkeypatch, moment):
    """Python raises it between any two calls: before the rename, or right after it."""
    replace = os.replace

    def interrupted(source, target):
        if moment == "after":
            replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store(str(tmp_path)).write("a", b"1")
    names = [path.name for path in tmp_path.iterdir()]
    assert names == (["a"] if moment == "after" else [])


def test_names_survive_a_power_failure(tmp_path, monkeypatch):
    """The file before its name, then the folder that has the name; new folders too."""
    events = []
    sync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def note_rename(source, target):
        events.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    (tmp_path / "run").mkdir()
    store = Store(str(tmp_path / "run"))
    store.write("checkpoints/new/state", b"x")
    (_, partial) = events.pop(2)
    assert partial.endswith(".partial")
    assert events == [
        ("sync", "checkpoints"),
        ("sync", "run"),
        ("rename", "state"),
        ("sync", "new"),
    ]
    events.clear()
    store.create_exclusive("lease", b"x")
    assert events == [("sync", "lease"), ("sync", "run")]


@pytest.mark.parametrize("how", ["write", "create_exclusive"])
def test_a_full_disk_keeps_no_name_without_content(tmp_path, full_disk, how):
    store = Store(str(tmp_path))
    with full_disk(3), pytest.raises(OSError, match="too large") as caught:
        getattr(store, how)("file", b"12345")
    assert caught.value.filename.startswith(f"{tmp_path}/file")
    assert store.list_names() == []


def test_names_hide_secrets():
    assert Store("memory://user:password@host/x").redacted_url == "memory://host/x"


def test_unknown_schemes():
    with pytest.raises(UserError, match="cannot open nope://x"):
        Store("nope://x")


def test_errors_of_clients_hold_no_secret(monkeypatch):
    store = Store("https://someone:PASSWORD@example.invalid/data?sig=SIGNED")
    failures = iter(
        [
            FileNotFoundError(store.url),
            ConnectionResetError(store.url),
            ValueError(f"403 of {store.url}"),
        ]
    )

    def fail(*_, **__):
        raise next(failures)

    for name in ("cat_file", "info", "ls"):
        monkeypatch.setattr(store.fsspec_filesystem, name, fail)
    kinds = [FileNotFoundError, OSError, OSError]
    for kind, act in zip(
        kinds, (store.read, store.get_size, store.list_entries), strict=True
    ):
        with pytest.raises(kind) as caught:
            act("x")
        assert "example.invalid" in str(caught.value)
        assert "PASSWORD" not in str(caught.value)
        assert "SIGNED" not in str(caught.value)
