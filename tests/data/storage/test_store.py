import fsspec
import pytest

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


def test_write_read_list_remove(store):
    assert store.list() == []
    store.write("a/b.bin", b"0123456789")
    store.write("a/c.bin", b"x")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", 2, 5) == b"234"
    assert store.list("a") == ["b.bin", "c.bin"]
    assert store.is_folder("a")
    store.write("a/b.bin", b"new")
    assert store.read("a/b.bin") == b"new"
    store.remove("a/b.bin")
    assert store.list("a") == ["c.bin"]
    assert not store.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        store.read("a/b.bin")
    store.remove("a")
    assert not store.exists("a")


def test_nothing_half_written_is_left(tmp_path):
    store = Store(str(tmp_path))
    with pytest.raises(TypeError):
        store.write("file", 3)
    assert store.list() == []


@pytest.mark.parametrize("how", ["write", "create"])
def test_a_full_disk_keeps_no_name_without_content(tmp_path, full_disk, how):
    store = Store(str(tmp_path))
    with full_disk(3), pytest.raises(OSError, match="too large"):
        getattr(store, how)("file", b"12345")
    assert store.list() == []


def test_names_hide_secrets():
    assert Store("memory://user:password@host/x").name == "memory://host/x"


def test_unknown_schemes():
    with pytest.raises(UserError, match="cannot open nope://x"):
        Store("nope://x")


def test_errors_of_clients_hold_no_secret(monkeypatch):
    store = Store("https://someone:PASSWORD@example.invalid/data?sig=SIGNED")
    failures = iter([FileNotFoundError(store.url), ConnectionResetError(store.url), ValueError(f"403 of {store.url}")])

    def fail(*_, **__):
        raise next(failures)

    for name in ("cat_file", "info", "ls"):
        monkeypatch.setattr(store.file_system, name, fail)
    kinds = [FileNotFoundError, OSError, OSError]
    for kind, act in zip(kinds, (store.read, store.size, store.entries), strict=True):
        with pytest.raises(kind) as caught:
            act("x")
        assert "example.invalid" in str(caught.value)
        assert "PASSWORD" not in str(caught.value)
        assert "SIGNED" not in str(caught.value)
