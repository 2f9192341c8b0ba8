"""What every `Store` has to do, wherever its files are."""

import pytest

from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.store import Store


def behaves_as_a_folder(store: Store) -> None:
    """Write, read, list and remove in a folder that is not there yet."""
    assert not store.exists()
    assert store.list_names() == []
    assert not store.is_folder("a")

    # Written and read, whole and in ranges
    store.write("a/b.bin", b"hello ", memoryview(b"world"))
    store.write("c.bin", bytes(1000))
    assert store.read("a/b.bin") == b"hello world"
    assert store.read("a/b.bin", 2, 7) == b"llo w"
    assert store.read("a/b.bin", 6) == b"world"
    assert store.read("a/b.bin", None, 5) == b"hello"
    assert store.read("a/b.bin", 3, 3) == b""
    assert (
        store.counters.num_requests,
        store.counters.bytes_read,
        store.counters.errors_by_kind,
    ) == (
        5,
        11 + 5 + 5 + 5,
        {},
    )

    # Listed
    assert store.list_entries() == [
        DirectoryEntry("a", None, True),
        DirectoryEntry("c.bin", 1000, False),
    ]
    assert (store.list_names(), store.list_names("a"), store.list_names("none")) == (
        ["a", "c.bin"],
        ["b.bin"],
        [],
    )
    assert (store.list_names("c.bin"), store.list_names("c.bin/x")) == ([], []), (
        "these are no folders"
    )
    assert [store.exists(path) for path in ("", "a", "a/b.bin", "none", "c.bin/x")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert [store.is_folder(path) for path in ("a", "c.bin", "none")] == [
        True,
        False,
        False,
    ]
    assert store.get_size("c.bin") == 1000

    # Written again
    store.write("a/b.bin", b"new")
    assert (store.read("a/b.bin"), store.list_names("a")) == (b"new", ["b.bin"])
    store.create_exclusive("a/d.bin", b"first")
    with pytest.raises(FileExistsError):
        store.create_exclusive("a/d.bin", b"second")
    assert store.read("a/d.bin") == b"first"

    # Removed
    store.remove("a/b.bin")
    assert (store.list_names("a"), store.exists("a/b.bin")) == (["d.bin"], False)
    for act in (
        store.read,
        store.get_size,
        store.get_etag,
    ):
        with pytest.raises(FileNotFoundError):
            act("a/b.bin")
    assert store.counters.errors_by_kind == {"FileNotFoundError": 1}
    store.remove("a")
    assert store.list_names() == ["c.bin"]
