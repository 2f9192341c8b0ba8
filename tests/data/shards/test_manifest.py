"""Formats of the manifest: earlier ones open as they were, later ones are named."""

import json
from pathlib import Path

import numpy as np
import pytest
from photos import encoded, picture, write_set
from PIL import Image

from distrain.data.decoding.pixel_hash import describe_pixel_hash, hash_pixels
from distrain.data.prepare.commands import pack
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError

EARLIER = Path(__file__).parents[2] / "earlier/0.1.0"
# As distrain 0.1.0 computed them; runs and their quarantine are found by them.
FINGERPRINTS = {
    "packed": "4932804c441ea503516cdd9e20e0a8131325fc9e15ec0ad76d5465ca9d4d691a",
    "indexed": "37b8fb7b0a25ff5d239a0de391ca080b14632007aab8bce9f628da25839ed6b5",
}


@pytest.mark.parametrize("name", list(FINGERPRINTS))
def test_a_manifest_of_the_format_before_is_what_it_was(name):
    manifest = Manifest.load(Store(str(EARLIER / name)))
    assert manifest.reading == 1
    assert manifest.fingerprint == FINGERPRINTS[name]
    assert manifest.to_json() == (EARLIER / name / MANIFEST_FILE).read_text()


@pytest.fixture
def folder(tmp_path):
    write_set(tmp_path, [encoded(picture(i, 8, 8)) for i in range(3)])
    return tmp_path


def change(folder: Path, **fields) -> None:
    tree = json.loads((folder / MANIFEST_FILE).read_text())
    tree = {k: v for k, v in {**tree, **fields}.items() if v != "left out"}
    (folder / MANIFEST_FILE).write_text(json.dumps(tree))


def test_a_new_manifest_says_how_files_are_read(folder):
    tree = json.loads((folder / MANIFEST_FILE).read_text())
    assert (tree["format"], tree["reading"]) == ("distrain-shards-3", 2)
    manifest = Manifest.load(Store(str(folder)))
    assert manifest.reading == 2
    assert json.loads(manifest.to_json()) == tree
    change(folder, format="distrain-shards-2", reading="left out")
    old = Manifest.load(Store(str(folder)))
    assert old.reading == 1
    assert old.fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    "fields",
    [{"format": "distrain-shards-4"}, {"format": "distrain-shards-12"}, {"reading": 3}],
)
def test_a_newer_manifest_is_named(folder, fields):
    change(folder, **fields)
    with pytest.raises(UserError, match="written by a newer version of distrain: inst"):
        Manifest.load(Store(str(folder)))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": "distrain-shards-1"},
        {"format": "distrain-shards-"},
        {"format": 4},
        {"format": "4"},
        {"reading": "left out"},
        {"reading": 1},
        {"reading": "2"},
        {"reading": None},
    ],
)
def test_a_manifest_that_is_none_is_refused(folder, fields):
    change(folder, **fields)
    with pytest.raises(UserError, match="is not a distrain-shards-3 manifest: restore"):
        Manifest.load(Store(str(folder)))


@pytest.fixture
def hashed(tmp_path):
    """A set of which each image has a hash, in two row groups."""
    for i in range(150):
        name = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(encoded(picture(i, 4, 4), "PNG"))
    pack(tmp_path / "photos", tmp_path / "set", geometry="square:4", processes=1)
    return tmp_path / "set"


def test_hashes_are_those_of_the_rows(hashed):
    """In the order of the rows, whatever row group they are in."""
    dataset = Dataset.open(hashed)
    hashes = dataset.manifest.pixel_hashes
    assert hashes is not None
    assert hashes.shape == (150, 2)
    assert len(np.unique(hashes, axis=0)) == 150
    assert dataset.manifest.pixel_hash == describe_pixel_hash()
    expected = {
        hash_pixels(Image.open(path))
        for path in (hashed.parent / "photos").glob("*/*.png")
    }
    assert {row.tobytes() for row in hashes} == expected


def test_hashes_do_not_change_the_fingerprint(hashed):
    """So that a run resumes with a set that was packed again, to get them."""
    tree = json.loads((hashed / MANIFEST_FILE).read_text())
    before = Manifest.load(Store(str(hashed)))
    assert json.loads(before.to_json()) == tree
    del tree["pixel_hash"]
    for group in tree["shards"][0]["groups"]:
        del group["pixel_hashes"]
    (hashed / MANIFEST_FILE).write_text(json.dumps(tree))
    without = Manifest.load(Store(str(hashed)))
    assert without.pixel_hashes is None
    assert without.fingerprint == before.fingerprint
    assert json.loads(without.to_json()) == tree


@pytest.mark.parametrize("damage", ["missing", "short", "no definition"])
def test_hashes_that_do_not_fit_the_rows_are_refused(hashed, damage):
    tree = json.loads((hashed / MANIFEST_FILE).read_text())
    group = tree["shards"][0]["groups"][1]
    if damage == "missing":
        del group["pixel_hashes"]
    elif damage == "short":
        group["pixel_hashes"] = group["pixel_hashes"][4:]
    else:
        tree["pixel_hash"] = {"decoder": "x"}
    (hashed / MANIFEST_FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is not a distrain-shards-3 manifest"):
        Manifest.load(Store(str(hashed)))
