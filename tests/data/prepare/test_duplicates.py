"""Equal images within a data set and across two."""

import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import shapes
from exif import orientation, with_segments
from hashed_sets import opened, write
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import encoded, picture

from distrain.data.decoding.image import decode_rgb
from distrain.data.decoding.pixel_hash import describe_pixel_hash
from distrain.data.prepare import duplicates
from distrain.data.prepare.commands import index, pack
from distrain.data.prepare.duplicates import (
    find_duplicates,
    find_equal_images,
)
from distrain.data.prepare.sample_names import NamedSample
from distrain.data.shards.manifest import MANIFEST_FILE


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 40, 60))


def png_of(data: bytes) -> bytes:
    return encoded(decode_rgb(data, 1 << 20), "PNG")


@pytest.fixture
def packed(tmp_path):
    """A training set with a copy, and a validation set with two leaks."""
    train = {
        f"{name}/{i}.jpg": jpeg(10 * k + i)
        for k, name in enumerate("ab")
        for i in range(3)
    }
    train["a/copy.png"] = png_of(train["a/2.jpg"])
    val = {
        f"{name}/v{i}.jpg": jpeg(50 + 10 * k + i)
        for k, name in enumerate("ab")
        for i in range(2)
    }
    val["a/leak.jpg"] = train["a/0.jpg"]
    val["b/leak.png"] = png_of(train["a/1.jpg"])
    for name, files in (("train", train), ("val", val)):
        geometry = "square:16" if name == "val" else "short:24"
        source = write(tmp_path / "photos" / name, files)
        pack(source, tmp_path / name, geometry=geometry, processes=1)
    return tmp_path


def test_images_in_both_sets_are_leaks_whatever_their_file_and_geometry(packed):
    report = find_duplicates(opened(packed / "val"), opened(packed / "train"))
    assert report.leaks is not None
    assert report.leaks.num_images == 2
    assert sorted(report.leaks.examples) == [
        "val a/leak.jpg = train a/0.jpg",
        "val b/leak.png = train a/1.jpg",
    ]
    assert (report.copies, report.notes) == ((0, []), [])
    assert report.other_copies is not None
    assert report.other_copies.num_images == 1
    assert sorted(report.other_copies.examples[0].split(" = ")) == [
        "train a/2.jpg",
        "train a/copy.png",
    ]
    assert report.conflicts == (1, ["train a/1.jpg (a) = val b/leak.png (b)"])


def test_one_set_alone(packed):
    report = find_duplicates(opened(packed / "train"))
    assert (report.leaks, report.other_copies, report.other_url) == (None, None, None)
    assert report.copies is not None
    assert report.copies.num_images == 1
    assert sorted(report.copies.examples[0].split(" = ")) == ["a/2.jpg", "a/copy.png"]
    assert report.conflicts == (0, [])


def test_no_image_of_the_other_set_is_read(packed):
    """Only its manifest, footers, and the columns of labels and names."""
    other = opened(packed / "train")
    shard = packed / "train" / other.manifest.shards[0].path
    data = bytearray(shard.read_bytes())
    (group,) = other.manifest.shards[0].groups
    data[group.start : group.start + 5000] = bytes(5000)
    shard.write_bytes(bytes(data))
    report = find_duplicates(opened(packed / "val"), other)
    assert report.leaks is not None
    assert "val a/leak.jpg = train a/0.jpg" in report.leaks.examples
    assert report.notes == []


def test_a_shard_that_cannot_be_read_is_named_and_its_images_by_their_rows(packed):
    other = opened(packed / "train")
    path = packed / "train" / other.manifest.shards[0].path
    path.unlink()
    report = find_duplicates(opened(packed / "val"), other)
    assert report.leaks is not None
    assert report.leaks.num_images == 2
    assert "= train shard-00000.parquet row group 0 row" in report.leaks.examples[0]
    assert report.conflicts == (0, [])
    (note,) = report.notes
    assert note.startswith(f"labels and names in {path} cannot be read, so classes of")


def test_classes_are_compared_by_name(tmp_path):
    """Their numbers differ, since the validation set has fewer classes."""
    train = write(
        tmp_path / "photos/train", {f"{c}/{c}.jpg": jpeg(ord(c)) for c in "abc"}
    )
    val = write(tmp_path / "photos/val", {f"{c}/x.jpg": jpeg(ord(c)) for c in "bc"})
    for name, source in (("train", train), ("val", val)):
        pack(source, tmp_path / name, geometry="keep", processes=1)
    report = find_duplicates(opened(tmp_path / "val"), opened(tmp_path / "train"))
    assert report.conflicts == (0, [])
    assert report.leaks is not None
    assert report.leaks.num_images == 2


def test_sets_of_one_name_are_told_apart(packed):
    other = shutil.copytree(packed / "train", packed / "other/train")
    report = find_duplicates(opened(packed / "train"), opened(other))
    assert report.leaks is not None
    left, right = report.leaks.examples[0].split(" = ")
    assert left.startswith(f"{packed / 'train'} ")
    assert right.startswith(f"{other} ")


def test_an_indexed_set_is_compared_with_a_packed_one(packed):
    """A turned JPEG equals the upright image; a bad image equals nothing."""
    upright = decode_rgb(jpeg(0), 1 << 20)
    turned = with_segments(
        encoded(np.rot90(upright), "JPEG", quality=95), orientation(6)
    )
    members = [
        member
        for i, data in enumerate(
            [jpeg(0), b"junk", b"junk", jpeg(80), turned, png_of(turned)]
        )
        for member in ((f"{i}.jpg", data), (f"{i}.cls", b"%d" % (i % 2)))
    ]
    write(packed / "wds", {"x.tar": shapes.tar_of(members)})
    index(packed / "wds", processes=1)
    report = find_duplicates(opened(packed / "wds"), opened(packed / "train"))
    assert report.leaks == (1, ["wds x.tar row group 0 row 0 = train a/0.jpg"])
    assert report.copies == (
        1,
        ["wds x.tar row group 0 row 5 = wds x.tar row group 0 row 4"],
    )


def test_other_decoders_are_named(packed, monkeypatch):
    path = packed / "train" / MANIFEST_FILE
    tree = json.loads(path.read_text())
    tree["pixel_hash"]["decoder"] = "Pillow 1"
    path.write_text(json.dumps(tree))
    report = find_duplicates(opened(packed / "val"), opened(packed / "train"))
    (note,) = report.notes
    assert f"{packed / 'train'} (Pillow 1) were decoded by different versions" in note
    assert f"({describe_pixel_hash().decoder})" in note
    assert report.leaks is not None
    assert report.leaks.num_images == 2


@pytest.mark.parametrize("definition", [None, "md5"])
def test_a_set_without_hashes_is_said(packed, definition):
    path = packed / "train" / MANIFEST_FILE
    tree = json.loads(path.read_text())
    tree["pixel_hash"]["definition"] = definition
    if definition is None:
        del tree["pixel_hash"]
    path.write_text(json.dumps(tree))
    report = find_duplicates(opened(packed / "train"))
    assert report.copies is None
    (note,) = report.notes
    assert "pixels" in note
    assert note.endswith(", by which equal images are found: pack or index it again")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=2))
def test_groups_are_those_of_a_plain_search(sets):
    expected = defaultdict(list)
    for i, value in enumerate(value for values in sets for value in values):
        # Value 0 is no hash; 1 and 2 differ in the second half alone.
        if value:
            expected[(value + 1) // 2, value % 2].append(i)
    hashes = [
        np.array([[(v + 1) // 2, v % 2] for v in values], np.uint64).reshape(-1, 2)
        for values in sets
    ]
    equal = find_equal_images(hashes)
    found = defaultdict(list)
    for i, group in zip(equal.ids.tolist(), equal.groups.tolist(), strict=True):
        found[group].append(i)
    assert sorted(found) == list(range(len(found)))
    assert sorted(found.values()) == sorted(
        ids for ids in expected.values() if len(ids) > 1
    )


def test_a_class_without_letters_is_a_class():
    """Tables may have a class whose name is the empty text."""
    equal = find_equal_images([np.ones((3, 2), np.uint64)])
    samples = [NamedSample("x", ""), NamedSample("y", None), NamedSample("z", "cat")]
    found = duplicates._find_conflicts(equal, samples)
    assert found == (1, ["z (cat) = x ()"])


def test_three_examples_are_enough(tmp_path):
    files = {f"{c}/{i}.jpg": jpeg(0) for c in "ab" for i in range(4)}
    pack(
        write(tmp_path / "photos", files),
        tmp_path / "set",
        geometry="keep",
        processes=1,
    )
    report = find_duplicates(opened(tmp_path / "set"))
    assert report.copies is not None
    assert report.conflicts is not None
    assert (report.copies.num_images, report.conflicts.num_images) == (7, 4)
    assert len(report.copies.examples) == len(report.conflicts.examples) == 3
    assert duplicates.MAX_EXAMPLES == 3
