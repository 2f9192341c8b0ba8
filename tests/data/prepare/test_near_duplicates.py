"""Images that look alike."""

import itertools
import json
import shutil
import sys

import numpy as np
import pytest
from hashed_sets import opened, write
from hypothesis import given, settings
from hypothesis import strategies as st
from photos import encoded, picture
from PIL import Image, ImageEnhance

from distrain.data.prepare import near_duplicates
from distrain.data.prepare.commands import pack
from distrain.data.prepare.duplicates import find_duplicates
from distrain.data.prepare.near_duplicates import (
    add_near_duplicates,
    find_near_matches,
    find_near_pairs,
    load_perceptual_hash,
)
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.errors import UserError

BITS = st.integers(0, 63)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.sets(BITS, max_size=5)), max_size=8),
)
def test_pairs_are_those_of_a_plain_search(base, changes):
    """Also pairs whose three bits lie in three bands."""
    values = list(base)
    for i, bits in changes:
        values.append(base[i % len(base)] ^ sum(1 << bit for bit in bits))
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(len(values)), 2)
        if (values[i] ^ values[j]).bit_count() <= 3
    }
    found = set()
    for firsts, seconds in find_near_pairs(np.array(values, np.uint64)):
        pairs = zip(firsts.tolist(), seconds.tolist(), strict=True)
        found |= {(min(pair), max(pair)) for pair in pairs}
    assert found == expected


NEAR_VALUES = st.sampled_from([0, 1, 0b111, 0b1111, 1 << 63, 2**64 - 1])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(NEAR_VALUES, min_size=1, max_size=6),
    st.none() | st.lists(NEAR_VALUES, min_size=1, max_size=6),
)
def test_a_match_is_another_image_and_an_equal_hash_if_there_is_one(own, others):
    found = find_near_matches(
        np.array(own, np.uint64), others and np.array(others, np.uint64)
    )
    for i, (value, match) in enumerate(zip(own, found.tolist(), strict=True)):
        targets = own if others is None else others
        distances = [(value ^ target).bit_count() for target in targets]
        if others is None:
            distances[i] = 64
        if match < 0:
            assert min(distances) > 3
        else:
            assert distances[match] <= 3
            assert distances[match] == 0 or min(distances) > 0


def test_hashes_that_are_the_same_are_compared_once(monkeypatch):
    """The pairs of a hundred thousand frames without a picture would take hours."""
    compared = []

    def find_pairs(hashes):
        compared.append(len(hashes))
        return iter(())

    monkeypatch.setattr(near_duplicates, "find_near_pairs", find_pairs)
    assert find_near_matches(np.zeros(4, np.uint64)).tolist() == [3, 3, 3, 0]
    across = find_near_matches(np.zeros(2, np.uint64), np.zeros(3, np.uint64))
    assert across.tolist() == [2, 2]
    assert compared == [1, 1]


@pytest.fixture
def packed(tmp_path):
    """A re-encoded and a brighter image in the other set, and one twice in its own."""
    files = [encoded(picture(i, 120, 160), quality=95) for i in range(8)]
    brighter = ImageEnhance.Brightness(Image.fromarray(picture(1, 120, 160))).enhance(
        0.95
    )
    train = {f"{'ab'[i % 2]}/{i}.jpg": files[i] for i in range(4)}
    val = {f"{'ab'[i % 2]}/{i}.jpg": files[i] for i in range(4, 8)}
    val["a/equal.jpg"] = files[2]
    val["a/again.jpg"] = encoded(picture(0, 120, 160), quality=50)
    val["b/brighter.jpg"] = encoded(np.asarray(brighter))
    val["b/small.png"] = encoded(
        np.asarray(Image.fromarray(picture(6, 120, 160)).resize((80, 60))), "PNG"
    )
    for name, images in (("train", train), ("val", val)):
        source = write(tmp_path / "photos" / name, images)
        pack(source, tmp_path / name, geometry="short:64", processes=1)
    return tmp_path


def test_images_that_look_alike_are_found_and_equal_ones_left_out(packed):
    val, train = opened(packed / "val"), opened(packed / "train")
    report = add_near_duplicates(find_duplicates(val, train), val, train)
    assert report.leaks == (1, ["val a/equal.jpg = train a/2.jpg"])
    assert report.near_leaks is not None
    assert report.near_leaks.num_images == 2
    assert sorted(report.near_leaks.examples) == [
        "val a/again.jpg ~ train a/0.jpg",
        "val b/brighter.jpg ~ train b/1.jpg",
    ]
    assert report.near_copies is not None
    assert sorted(report.near_copies.examples) == [
        "a/6.jpg ~ b/small.png",
        "b/small.png ~ a/6.jpg",
    ]


def test_plain_images_are_not_compared(tmp_path):
    """Their hashes say nothing: black, white and red would look alike."""
    plain = [0, 255, (255, 0, 0)]
    files = {
        f"a/{i}.png": encoded(np.full((20, 30, 3), color, np.uint8), "PNG")
        for i, color in enumerate(plain)
    }
    files["b/0.jpg"] = encoded(picture(0, 120, 160), quality=95)
    files["b/1.jpg"] = encoded(picture(0, 120, 160), quality=50)
    source = write(tmp_path / "photos", files)
    pack(source, tmp_path / "set", geometry="keep", processes=1)
    dataset = opened(tmp_path / "set")
    report = add_near_duplicates(find_duplicates(dataset), dataset)
    assert report.near_copies is not None
    assert sorted(report.near_copies.examples) == [
        "b/0.jpg ~ b/1.jpg",
        "b/1.jpg ~ b/0.jpg",
    ]
    (note,) = report.notes
    assert note.startswith(f"3 plain images of {dataset.url}, such as of one color, ")

    other = opened(shutil.copytree(tmp_path / "set", tmp_path / "other"))
    report = add_near_duplicates(find_duplicates(dataset, other), dataset, other)
    assert report.near_leaks == (0, [])
    assert [note.partition(",")[0] for note in report.notes] == [
        f"3 plain images of {url}" for url in (dataset.url, other.url)
    ]


def test_no_more_images_are_decoded_at_a_time_than_fit_into_memory(packed, monkeypatch):
    sizes = []

    def count_threads(max_pixels):
        sizes.append(max_pixels)
        return 1

    monkeypatch.setattr(near_duplicates, "count_decoding_threads", count_threads)
    val = opened(packed / "val")
    add_near_duplicates(find_duplicates(val), val)
    assert sizes == [64 * 85]


def test_sets_without_hashes_have_near_duplicates_too(packed):
    path = packed / "val" / MANIFEST_FILE
    tree = json.loads(path.read_text())
    del tree["pixel_hash"]
    path.write_text(json.dumps(tree))
    val = opened(packed / "val")
    report = add_near_duplicates(find_duplicates(val), val)
    assert report.copies is None
    assert report.near_copies is not None
    assert report.near_copies.num_images == 2


def test_without_the_library_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(
        UserError, match=r"needs ImageHash: pip install 'distrain\[near\]'"
    ):
        load_perceptual_hash()
