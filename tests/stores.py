"""What every `Store` has to do, wherever its files are."""

import pytest

from distrain.data.storage.backend import Entry
from distrain.data.storage.store import Store


def behaves_as_a_folder(store: Store) -> None:
    """Write, read, list and remove in a folder that is not there yet."""
    assert not store.exists()
    assert store.list() == []
    assert not store.is_folder("a")

    # Written and read, whole and in ranges
    store.write("a/b.bin", b"hello ", memoryview(b"world"))
    store.write("c.bin", bytes(1000))
    assert store.read("a/b.bin") == b"hello world"
    assert store.read("a/b.bin", 2, 7) == b"llo w"
    assert store.read("a/b.bin", 6) == b"world"
    assert store.read("a/b.bin", None, 5) == b"hello"
    assert store.read("a/b.bin", 3, 3) == b""
    assert (store.counts.requests, store.counts.bytes, store.counts.errors) == (
        5,
        11 + 5 + 5 + 5,
        {},
    )

    # Listed
    assert store.entries() == [Entry("a", None, True), Entry("c.bin", 1000, False)]
    assert (store.list(), store.list("a"), store.list("none")) == (
        ["a", "c.bin"],
        ["b.bin"],
        [],
    )
    assert (store.list("c.bin"), store.list("c.bin/x")) == ([], []), (
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
    assert store.size("c.bin") == 1000

    # Written again
    store.write("a/b.bin", b"new")
    assert (store.read("a/b.bin"), store.list("a")) == (b"new", ["b.bin"])
    store.create("a/d.bin", b"first")
    with pytest.raises(FileExistsError):
        store.create("a/d.bin", b"second")
    assert store.read("a/d.bin") == b"first"

    # Removed
    store.remove("a/b.bin")
    assert (store.list("a"), store.exists("a/b.bin")) == (["d.bin"], False)
    for act in (store.read, store.size, store.version):
        with pytest.raises(FileNotFoundError):
            act("a/b.bin")
    assert store.counts.errors == {"FileNotFoundError": 1}
    store.remove("a")
    assert store.list() == ["c.bin"]
