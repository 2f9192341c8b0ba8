"""Formats of the manifest: earlier ones open as they were, later ones are named."""

import json
from pathlib import Path

import pytest
from photos import encoded, picture, write_set

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
