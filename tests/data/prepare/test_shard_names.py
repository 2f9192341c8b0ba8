"""Which files of a folder are opened together, as their names tell."""

import shutil
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shapes import images, tar_of

from distrain.data.prepare.open import open_source
from distrain.data.prepare.shard_names import (
    check_one_set,
    get_shard_extension,
    strip_copy_mark,
)
from distrain.errors import UserError


def put_tars(root: Path, *names: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    members = [
        part
        for image in images(1)[:2]
        for part in (
            (f"{image.label}.jpg", image.data),
            (f"{image.label}.cls", b"%d" % image.label),
        )
    ]
    for name in names:
        (root / name).write_bytes(tar_of(members))
    return str(root)


def put_parquet(root: Path, *names: str) -> str:
    root.mkdir(parents=True, exist_ok=True)
    rows = images(1)[:2]
    table = pa.table(
        {"image": [im.data for im in rows], "label": [im.label for im in rows]}
    )
    for name in names:
        pq.write_table(table, root / name)
    return str(root)


PUT = {"tar": put_tars, "parquet": put_parquet}


@pytest.mark.parametrize("kind", PUT)
@pytest.mark.parametrize(
    ("names", "splits", "pattern", "num_files"),
    [
        (("train-000", "train-001", "val-000"), "train, val", "train-*", 2),
        (("train", "test"), "train, test", "train.{}", 1),
        (("in-train-000000", "in-train-000001", "in-val-000000"), "train, val", "in-train-*", 2),
        (("testing_1", "training_1", "training_2"), "training, testing", "training_*", 2),
        (("0-train", "1-train", "0-val"), "train, val", "*-train.*", 2),
        (("train-00000-of-00001", "test-00000-of-00001"), "train, test", "train-00000-of-00001.{}", 1),
        (("in-train-00000-of-00001", "in-val-00000-of-00001"), "train, val", "in-train-00000-of-00001.{}", 1),
        (("extra-0-of-1", "train-0-of-1"), "train, extra", "train-0-of-1.{}", 1),
    ],
)  # fmt: skip
def test_several_splits_are_refused_with_a_pattern_that_opens(
    tmp_path, kind, names, splits, pattern, num_files
):
    url = PUT[kind](tmp_path / "x", *(f"{name}.{kind}" for name in names))
    # What is beside them is no part of a split.
    (tmp_path / "x" / "train-notes.txt").write_text("x")
    (tmp_path / "x" / "train-labels.json").write_text("{}")
    pattern = pattern.format(kind)
    with pytest.raises(UserError) as raised:
        open_source(url)
    assert str(raised.value) == (
        f"{url} holds several splits ({splits}): take one of them, such as "
        f"'{url}/{pattern}'"
    )
    source = open_source(f"{url}/{pattern}").source
    assert len({block.path for block in source.blocks}) == num_files
    assert source.notes == []
    with pytest.raises(UserError, match="holds several splits"):
        open_source(f"{url}/*.{kind}")


def test_files_of_one_split_or_of_none_are_taken(tmp_path):
    for i, names in enumerate(
        [("train-0.tar", "extra-0.tar"), ("contest.tar", "traintrack.tar"), ("a.tar",)]
    ):
        source = open_source(put_tars(tmp_path / str(i), *names)).source
        assert len({block.path for block in source.blocks}) == len(names)


@pytest.mark.parametrize("kind", PUT)
def test_what_is_missing_of_a_numbered_set_is_named(tmp_path, kind):
    names = [f"train-{i:05d}-of-00007.{kind}" for i in (0, 2, 3)]
    url = PUT[kind](tmp_path / "x", *names)
    with pytest.raises(UserError) as raised:
        open_source(url)
    missing = ", ".join(f"train-{i:05d}-of-00007.{kind}" for i in (1, 4, 5, 6))
    assert str(raised.value) == (
        f"{url} lacks {missing}: download what is missing, or take the others on "
        f"purpose with a pattern such as '{url}/train-*'"
    )
    source = open_source(f"{url}/train-*").source
    assert len({block.path for block in source.blocks}) == 3
    assert source.notes == [f"a part of a set is taken: left out {missing}"]
    assert open_source(f"{url}/{names[0]}").source.notes == [], "it was named"


def check(*names, is_whole_folder=True):
    return check_one_set(names, [], "x", is_whole_folder=is_whole_folder)


def test_numbered_sets_of_other_forms():
    assert check("a-1-of-2.tar", "a-2-of-2.tar") == []
    assert check("00000-of-00002.tar", "00001-of-00002.tar") == []
    assert check("train-00000-of-00001-0a1b2c.parquet") == []
    with pytest.raises(UserError, match=r"lacks a-1-of-3.tar: download"):
        check("a-2-of-3.tar", "a-3-of-3.tar")
    with pytest.raises(
        UserError, match=r"lacks a_0_of_3.tar, a_2_of_3.tar: .* 'x/a_\*'$"
    ):
        check("a_1_of_3.tar")
    with pytest.raises(UserError, match=r"lacks .* and 99,999,999,9.. more: download"):
        check("a-0-of-99999999999.tar")


def test_leftovers_of_another_version_are_refused():
    with pytest.raises(
        UserError,
        match=r"^x holds a-0-of-2.tar and a-0-of-3.tar, which are of two versions of a",
    ):
        check("a-0-of-2.tar", "a-1-of-2.tar", "a-0-of-3.tar")
    with pytest.raises(
        UserError,
        match=r"a-0-of-2-f00.parquet and a-0-of-2-ba4.parquet, which are the same shard",
    ):
        check("a-0-of-2-f00.parquet", "a-0-of-2-ba4.parquet", "a-1-of-2-f00.parquet")


def test_a_set_as_a_whole_and_in_shards_is_refused():
    with pytest.raises(
        UserError,
        match=r"x holds a.parquet and a-0-of-1.parquet, which look like one set as a w",
    ):
        check("a-0-of-1.parquet", "a.parquet")
    assert check("a-0-of-1.parquet", "b.parquet") == []


def test_gaps_of_plain_numbers_are_noted():
    assert check("t-000.tar", "t-001.tar", "t-003.tar", "t-004.tar") == [
        "1 of the numbered files are missing, the first t-002.tar"
    ]
    assert check("t-0.tar", "t-1.tar", "t-2.tar", "a.tar", "u1.tar") == []
    assert check("20240101.tar", "20240301.tar") == [], "dates"


@pytest.mark.parametrize(
    "name",
    [
        "x (1).tar", "x(1).tar", "x - Copy.tar", "x - Copy (2).tar", "Copy of x.tar", "x copy.tar", "x copy 2.tar",
        "x (copy).tar", "x (another copy).tar", "x (3rd copy).tar", "x - Kopie.tar",
        "x (Ann's conflicted copy 2024-01-02).tar",
    ],
)  # fmt: skip
def test_a_copy_beside_its_original_is_refused(name):
    with pytest.raises(UserError) as raised:
        check("x.tar", name)
    assert str(raised.value) == (
        f"x holds {name!r}, which looks like a copy of 'x.tar': delete one of them, so "
        "that its images do not count twice"
    )
    assert check(name) == [], "without the original it is just a name"


def test_copies_of_hub_files_and_of_names_with_dots():
    name = "train-00000-of-00001"
    with pytest.raises(UserError, match="looks like a copy"):
        check(f"{name} (1).parquet", f"{name}.parquet")
    with pytest.raises(UserError, match="looks like a copy"):
        check("x.snappy.parquet", "x (1).snappy.parquet")
    assert strip_copy_mark("photocopy") is None
    assert strip_copy_mark("a(1)b") is None


# --- which files


def test_a_folder_named_like_a_file(tmp_path):
    """As Spark writes it, and an image folder called x.tar."""
    place = tmp_path / "train.parquet"
    put_parquet(place, "part-00000.snappy.parquet", "part-00001.snappy.parquet")
    for name in ("_SUCCESS", "_metadata", "._SUCCESS.crc", ".part-00000.parquet.crc"):
        (place / name).write_bytes(b"")
    for url in (str(place), f"{place}/"):
        source = open_source(url).source
        assert (source.format_name, len(source.blocks)) == ("Parquet", 2)
        assert source.notes == []
    for name in ("cat/1.jpg", "dog/1.jpg"):
        (tmp_path / "x.tar" / name).parent.mkdir(parents=True)
        (tmp_path / "x.tar" / name).write_bytes(b"x")
    for url in (str(tmp_path / "x.tar"), f"{tmp_path / 'x.tar'}/"):
        assert open_source(url).source.classes == ("cat", "dog")
    shutil.rmtree(tmp_path / "x.tar" / "dog")
    with pytest.raises(UserError, match="x.tar holds one class, cat"):
        open_source(str(tmp_path / "x.tar"))


def test_a_folder_named_like_a_file_in_a_store_of_objects(tmp_path):
    put_parquet(tmp_path, "part-0.parquet")
    files = fsspec.filesystem("memory")
    try:
        data = (tmp_path / "part-0.parquet").read_bytes()
        files.pipe_file("/b/train.parquet/part-0.parquet", data)
        files.pipe_file("/b/train.parquet/_SUCCESS", b"")
        for url in ("memory://b/train.parquet", "memory://b/train.parquet/"):
            assert len(open_source(url).source.blocks) == 1
    finally:
        files.store.clear()
        files.pseudo_dirs[:] = [""]


def test_other_spellings_of_the_extensions(tmp_path):
    assert get_shard_extension("X.TAR") == "tar"
    assert get_shard_extension("x.pq") == get_shard_extension("x.PARQ") == "parquet"
    assert get_shard_extension("tar") == get_shard_extension("x.tar.gz") == ""
    put_tars(tmp_path / "t", "X.TAR")
    put_parquet(tmp_path / "p", "a.pq", "b.PARQUET")
    for url in ("t", "t/X.TAR", "t/*.TAR", "p", "p/a.pq", "p/*"):
        source = open_source(str(tmp_path / url)).source
        assert source.format_name in ("WebDataset", "Parquet")
        assert len(source.classes) == 2


def test_files_of_two_kinds_are_refused(tmp_path):
    url = put_parquet(tmp_path, "a.parquet")
    put_tars(tmp_path, "a.tar")
    for place in (url, f"{url}/*"):
        with pytest.raises(UserError) as raised:
            open_source(place)
        assert str(raised.value) == (
            f"{url} holds files of several kinds (parquet, tar): take one kind, such "
            f"as '{url}/*.tar'"
        )
    assert open_source(f"{url}/*.tar").source.format_name == "WebDataset"


def test_what_may_hold_images_beside_shards_is_noted(tmp_path):
    url = put_tars(tmp_path, "a-0.tar", "a-1.tar")
    for name in ("README.md", "a-0.tar.md5", ".a-2.tar.part", "_SUCCESS"):
        (tmp_path / name).write_bytes(b"x")
    assert open_source(url).source.notes == []
    for name in ("a-2.tar.gz", "a-3.tar.crdownload", "a-0.tar.1"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "cat").mkdir()
    assert open_source(url).source.notes == [
        f"only .tar files are read in {url}: left out a-0.tar.1, a-2.tar.gz, "
        "a-3.tar.crdownload, cat"
    ]


def test_compressed_archives_alone_are_named(tmp_path):
    for name in ("a.tar.gz", "b.ZIP"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        UserError,
        match=r"holds compressed archives \(a.tar.gz, b.ZIP\): unpack them to a folder",
    ):
        open_source(str(tmp_path))


def test_what_a_folder_without_images_holds_is_said(tmp_path):
    for paths, found in (
        (("state.json", "data.arrow"), r"found: data.arrow, state.json"),
        (("cat/a.txt", "dog/b.csv"), r"2 folders hold no image, .* classes: cat, dog"),
        (("1.jpg",), r"first rejected: 1.jpg: an image outside the class folders"),
    ):
        place = tmp_path / found[:3]
        for path in paths:
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"no images in .*shards \({found}\)$"):
            open_source(str(place))


def test_a_pattern_in_the_middle_of_a_path_is_said(tmp_path):
    with pytest.raises(UserError, match="a pattern is for the last part of a path"):
        open_source(f"{tmp_path}/*/train.parquet")
