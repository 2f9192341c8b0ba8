import base64
import hashlib
import json

import numpy as np
import pytest
import shapes
from crc32c import crc32c
from photos import encoded, picture, write_set

from distrain.data.prepare import verify as verify_module
from distrain.data.prepare.commands import index
from distrain.data.prepare.examine import verify
from distrain.data.prepare.verify import (
    draw_contact_sheet,
    summarize_dataset,
    verify_dataset,
)
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store


@pytest.fixture
def dataset(tmp_path):
    files = [encoded(picture(i, 40 + i, 60)) for i in range(40)]
    return write_set(tmp_path / "set", files, group_rows=8, shard_groups=2)


def wrong_with(dataset):
    result = verify_dataset(dataset.store, Manifest.load(dataset.store))
    return [tuple(problem) for problem in result.problems]


def test_a_whole_set_has_nothing_wrong(dataset):
    seen = []
    assert verify_dataset(dataset.store, dataset.manifest, seen.append)[1:5] == (
        [],
        40,
        3,
        0,
    )
    assert [(at.done, at.total) for at in seen] == [
        (0, 40),
        (16, 40),
        (32, 40),
        (40, 40),
    ]


def test_threads_are_as_many_as_the_largest_images_of_a_group_allow(
    dataset, monkeypatch
):
    largest = []

    def count(max_pixels):
        largest.append(max_pixels)
        return 1

    monkeypatch.setattr(verify_module, "count_decoding_threads", count)
    assert wrong_with(dataset) == []
    # The last picture of each group of eight is the largest.
    assert largest == [60 * (40 + last) for last in (7, 15, 23, 31, 39)]


@pytest.mark.parametrize("place", ["group", "footer"])
def test_a_flipped_byte_is_found(dataset, tmp_path, place):
    shard = dataset.manifest.shards[1]
    path = tmp_path / "set" / shard.path
    data = bytearray(path.read_bytes())
    data[shard.groups[1].start + 100 if place == "group" else -20] ^= 1
    path.write_bytes(bytes(data))
    where = {"group": (f"{shard.path} row group 1", "does not match its CRC-32C")}
    last = where.get(
        place, (shard.path, "has a damaged footer, so its rows cannot be checked")
    )
    assert wrong_with(dataset) == [(shard.path, "does not match its SHA-256"), last]


def test_what_is_missing_or_cut_is_found(dataset, tmp_path):
    one, two, _ = dataset.manifest.shards
    (tmp_path / "set" / one.path).unlink()
    cut = (tmp_path / "set" / two.path).read_bytes()[:-10]
    (tmp_path / "set" / two.path).write_bytes(cut)
    assert wrong_with(dataset) == [
        (one.path, "is missing"),
        (two.path, f"has {len(cut)} bytes, not {two.bytes}"),
    ]


def test_only_what_was_read_counts(dataset, tmp_path):
    """A missing shard of 16 images, and a damaged row group of 8 in another."""
    one, two, three = dataset.manifest.shards
    (tmp_path / "set" / one.path).unlink()
    path = tmp_path / "set" / two.path
    data = bytearray(path.read_bytes())
    data[two.groups[0].start + 100] ^= 1
    path.write_bytes(bytes(data))
    progress = []
    result = verify_dataset(dataset.store, dataset.manifest, progress.append)
    assert (result.num_images, result.num_shards) == (16, 2)
    assert [(p.done, p.total, p.num_bytes) for p in progress] == [
        (0, 40, 0),
        (0, 40, 0),
        (8, 40, two.bytes),
        (16, 40, two.bytes + three.bytes),
    ]


def test_a_footer_that_was_damaged_before_it_was_indexed_is_found(dataset, tmp_path):
    """Its checksums fit, but it cannot be parsed."""
    shard = dataset.manifest.shards[0]
    path = tmp_path / "set" / shard.path
    data = bytearray(path.read_bytes())
    data[shard.footer_start : shard.footer_start + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))
    tree = json.loads((tmp_path / "set" / MANIFEST_FILE).read_text())
    entry = tree["shards"][0]
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    entry["footer_crc32c"] = crc32c(bytes(data[shard.footer_start :]))
    (tmp_path / "set" / MANIFEST_FILE).write_text(json.dumps(tree))
    ((where, what),) = wrong_with(dataset)
    assert where == shard.path
    assert what.startswith("has a footer that cannot be parsed, so its rows cannot be")


def test_images_that_do_not_decode_or_have_another_size_are_found(tmp_path):
    files = [encoded(picture(i, 40, 60)) for i in range(6)]
    files[2], files[4] = b"junk", encoded(picture(4, 40, 61))
    dataset = write_set(tmp_path / "set", files, (40, 60))
    assert wrong_with(dataset) == [
        (
            "shard-00000.parquet row group 0 row 2 (2.jpg)",
            "does not decode: the image format is not recognized",
        ),
        (
            "shard-00000.parquet row group 0 row 4 (4.jpg)",
            "is 61 x 40 pixels, not 60 x 40",
        ),
    ]


def test_a_row_whose_own_checksum_is_wrong_is_found(dataset, tmp_path):
    """The manifest was made for the damaged shard: only the row's own checksum tells."""
    import pyarrow.parquet as pq

    shard = dataset.manifest.shards[0]
    path = tmp_path / "set" / shard.path
    data = bytearray(path.read_bytes())
    data[shard.groups[0].start + 500] ^= 1
    path.write_bytes(bytes(data))
    tree = json.loads((tmp_path / "set" / MANIFEST_FILE).read_text())
    entry = tree["shards"][0]
    entry["sha256"] = hashlib.sha256(data).hexdigest()
    group = entry["groups"][0]
    group["crc32c"] = crc32c(bytes(data[group["start"] : group["end"]]))
    (tmp_path / "set" / MANIFEST_FILE).write_text(json.dumps(tree))
    assert pq.read_metadata(path).num_rows == 16
    ((where, what),) = wrong_with(dataset)
    assert where.startswith(f"{shard.path} row group 0 row 0")
    assert what == "does not match its CRC-32C"


def test_contents(dataset):
    found = summarize_dataset(dataset)
    assert found.rows_per_class == {"a": 14, "b": 13, "c": 13}
    assert (found.heights, found.widths) == ((40, 59, 79), (60, 60, 60))
    assert 0 < found.image_bytes[0] <= found.image_bytes[1] <= found.image_bytes[2]


def test_the_sheet_shows_samples(tmp_path):
    files = [encoded(np.full((30, 50, 3), i, np.uint8)) for i in range(10)]
    files[3] = b"junk"
    dataset = write_set(tmp_path / "set", files)
    shown = draw_contact_sheet(dataset, columns=4, rows=3)
    assert shown.shape == (3 * 96, 4 * 96, 3)
    tiles = shown.reshape(3, 96, 4, 96, 3).swapaxes(1, 2).reshape(12, 96 * 96, 3)
    levels = [tuple(tile[0]) for tile in tiles]
    assert sorted(level[0] for level in levels) == [
        0,
        1,
        2,
        4,
        5,
        6,
        7,
        8,
        9,
        200,
        255,
        255,
    ]
    assert Store(str(tmp_path / "set")).exists()


@pytest.mark.parametrize("decoder", ["same", "other"])
def test_pixels_that_are_not_those_of_the_index_are_found(tmp_path, decoder):
    """Only where the decoder is the same: others may decode other pixels."""
    members = [
        member
        for i in range(3)
        for member in (
            (f"{i}.jpg", encoded(picture(i, 40, 60)) if i else b"junk"),
            (f"{i}.cls", b"%d" % (i % 2)),
        )
    ]
    (tmp_path / "x.tar").write_bytes(shapes.tar_of(members))
    index(tmp_path, processes=1)
    assert verify(tmp_path).problems == []
    tree = json.loads((tmp_path / MANIFEST_FILE).read_text())
    (group,) = tree["shards"][0]["groups"]
    hashes = base64.b64decode(group["pixel_hashes"])
    assert hashes[:16] == bytes(16), "of the bad image"
    group["pixel_hashes"] = base64.b64encode(hashes[:-1] + b"x").decode()
    if decoder == "other":
        tree["pixel_hash"]["decoder"] = "Pillow 1"
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(tree))
    problem = (
        "x.tar row group 0 row 2",
        "has other pixels than when it was indexed",
    )
    assert verify(tmp_path).problems == ([problem] if decoder == "same" else [])
