"""Buckets, against a small S3 server of the tests."""

import pytest
from bucket_server import Answer
from stores import behaves_as_a_folder

from distrain.data.prepare.open import open_source
from distrain.data.storage.backend import DirectoryEntry
from distrain.data.storage.retry import RefusedError
from distrain.data.storage.store import Store


def test_a_store_in_a_bucket_behaves_as_a_folder(bucket):
    behaves_as_a_folder(Store("s3://b/deep/folder"))


# --- markers of folders


MARKERS = {
    "of consoles and mounts": ["p/", "p/a/", "p/b/", "p/b/deep/"],
    "of Hadoop": ["p_$folder$", "p/a_$folder$", "p/b_$folder$", "p/b/deep_$folder$"],
    "of the folder's own name": ["p", "p/a", "p/b", "p/b/deep"],
}


@pytest.mark.parametrize("markers", MARKERS.values(), ids=MARKERS)
@pytest.mark.parametrize("root", ["p/", ""], ids=["under a prefix", "at the root"])
def test_markers_of_folders_are_no_files(bucket, markers, root):
    bucket.objects = {"p/a/0.jpg": b"0", "p/b/1.jpg": b"1", "p/b/deep/2.jpg": b"2"}
    for marker in markers:
        bucket.objects[marker] = b""
    bucket.objects = {
        key.removeprefix("p/") if root == "" else key: data
        for key, data in bucket.objects.items()
    }
    store = Store(f"s3://b/{root}")
    names = store.list_names()
    assert [name for name in names if not name.startswith("p")] == ["a", "b"]
    assert store.list_entries("a") == [DirectoryEntry("0.jpg", 1, False)]
    assert store.list_names("b") == ["1.jpg", "deep"]
    source = open_source(store.url).source
    assert [block.path for block in source.blocks][:2] == ["a/0.jpg", "b/1.jpg"]
    assert not [reject for reject in source.rejects if "deep" not in reject.name]


def test_a_folder_of_a_marker_alone_is_there_and_empty(bucket):
    bucket.objects = {"p/": b"", "p/a/": b""}
    store = Store("s3://b/p")
    assert (store.exists(), store.is_folder("a")) == (True, True)
    assert (store.list_names(), store.list_names("a")) == (["a"], [])


def test_an_empty_file_is_no_marker(bucket):
    bucket.objects = {"p/a.jpg": b"", "p/a/x": b"1"}
    entries = Store("s3://b/p").list_entries()
    assert entries == [
        DirectoryEntry("a", None, True),
        DirectoryEntry("a.jpg", 0, False),
    ]


def test_removing_a_folder_with_a_marker_spares_the_object_of_its_name(bucket):
    bucket.objects = {"p/a": b"mine", "p/a/": b"", "p/a/x": b"1"}
    Store("s3://b/p").remove("a")
    assert "p/a/x" not in bucket.objects
    assert bucket.objects["p/a"] == b"mine"


# --- keys


ODD_KEYS = [
    "p/a//x.jpg",
    "p/a/../x.jpg",
    "p/a/./x.jpg",
    "p/a/..",
    "p/a/tab\tx.jpg",
    "p/a/new\nline.jpg",
    "p/a/bell\x07.jpg",
    "p/a/delete\x7f.jpg",
]


def test_keys_that_cannot_be_read_are_named_and_the_others_are_read(bucket):
    bucket.objects = {f"p/{c}/{i}.jpg": b"x" for c in "ab" for i in range(4)}
    bucket.objects |= dict.fromkeys([*ODD_KEYS, "p/a/", "p/a/deep/"], b"")
    source = open_source("s3://b/p").source
    assert len(source.blocks) == 8
    names = [r.name for r in source.rejects if "control character" in r.reason]
    assert len(names) == len(ODD_KEYS)
    for key in ODD_KEYS:
        assert any(key.startswith(f"p/{name}") for name in names)


def test_odd_keys_beside_the_classes_are_named(bucket):
    bucket.objects = {f"p/{c}/0.jpg": b"x" for c in "ab"}
    bucket.objects |= {"p//x.jpg": b"", "p/\t/x.jpg": b""}
    source = open_source("s3://b/p").source
    assert source.classes == ("a", "b")
    assert [reject.name for reject in source.rejects] == ["\t/", "/"]
    assert all("not a class folder" in reject.reason for reject in source.rejects)


def test_keys_from_the_root_with_a_slash_are_named(bucket):
    bucket.objects = {"a/0.jpg": b"x", "b/0.jpg": b"x", "/c/0.jpg": b"x"}
    source = open_source("s3://b").source
    assert [reject.name for reject in source.rejects] == ["/"]


@pytest.mark.parametrize(
    "name",
    [
        " spaces .jpg ",
        "100%.jpg",
        "%2F.jpg",
        "a+b&c=d.jpg",
        "#?.jpg",
        "*[x].jpg",
        "back\\slash.jpg",
        "quote'\".jpg",
        "é e\u0301 猫.jpg",
        "...",
        "x" * 900,
    ],
)
def test_other_keys_are_read(bucket, name):
    bucket.objects = {f"p/a/{name}": b"content"}
    store = Store("s3://b/p/a")
    assert store.list_names() == [name]
    assert store.read(name, 0, 3) == b"con"
    assert store.read(name) == b"content"


def test_without_botocore_the_key_is_said(bucket, monkeypatch):
    from distrain.data.storage import object_store

    monkeypatch.setattr(object_store, "list_with_botocore", lambda *_: None)
    bucket.objects = {"p/a//x.jpg": b""}
    store = Store("s3://b/p")
    for act in (store.list_names, store.read, store.remove):
        with pytest.raises(RefusedError, match=r"a key .*'p/a//.* empty part.*rename"):
            act("a" if act != store.read else "a//x.jpg")


def test_a_refused_listing_by_botocore_is_an_error(bucket):
    bucket.objects = {"p/a//x.jpg": b""}
    asked = []

    def refuse(request):
        asked.append(request)
        return None if len(asked) == 1 else Answer(403, "AccessDenied")

    bucket.refuse = refuse
    with pytest.raises(OSError, match="AccessDenied"):
        Store("s3://b/p/a").list_names()


def test_odd_keys_of_a_public_bucket_by_its_other_variables(bucket, clean_aws):
    """The listing of odd keys by botocore heeds what obstore does."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        clean_aws.delenv(name)
    clean_aws.setenv("AWS_ENDPOINT", bucket.url)
    clean_aws.setenv("AWS_ALLOW_HTTP", "true")
    clean_aws.setenv("AWS_SKIP_SIGNATURE", "true")
    bucket.objects = {"p/a//x.jpg": b"", "p/a/y.jpg": b"", "p/a/": b""}
    assert sorted(Store("s3://b/p/a").list_names()) == ["/", "y.jpg"]
    assert {request.access_key for request in bucket.requests} == {""}
