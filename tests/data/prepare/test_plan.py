"""A finished data set is recognized by what it was made from."""

import json
import shutil
from pathlib import Path

import pytest
from shapes import folder, images, webdataset

from distrain.data.prepare.commands import index, pack
from distrain.data.prepare.open import open_source
from distrain.data.prepare.plan import PLAN_FILE, encode_plan
from distrain.errors import UserError


@pytest.fixture
def photos(tmp_path):
    """Two classes, and a file that is no image."""
    url = folder(tmp_path, images(2))
    (Path(url) / "n01440764" / "bad.jpg").write_bytes(b"x")
    return url


def test_a_finished_pack_is_found_complete(photos, tmp_path):
    target = tmp_path / "dst"
    first = pack(photos, target, geometry="square:8", processes=1)
    before = {p.name: p.stat().st_mtime_ns for p in target.iterdir()}
    seen = []
    again = pack(
        photos, target, geometry="square:8", processes=1, on_progress=seen.append
    )
    assert (first.was_complete, again.was_complete) == (False, True)
    assert again.manifest.fingerprint == first.manifest.fingerprint
    assert again.rejects == first.rejects
    assert len(again.rejects) == 1
    assert {p.name: p.stat().st_mtime_ns for p in target.iterdir()} == before
    assert [(progress.done, progress.total) for progress in seen] == [(7, 7)]


@pytest.mark.parametrize("change", ["options", "images", "plan", "shard"])
def test_anything_else_is_refused_as_before(photos, tmp_path, change):
    target = tmp_path / "dst"
    pack(photos, target, geometry="square:8", processes=1)
    geometry = "square:9" if change == "options" else "square:8"
    if change == "images":
        (Path(photos) / "n01440764" / "bad.jpg").unlink()
    if change == "plan":
        (target / PLAN_FILE).unlink()
    if change == "shard":
        (target / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match="holds a data set already"):
        pack(photos, target, geometry=geometry, processes=1)


def test_a_finished_index_is_found_complete(tmp_path):
    url = Path(webdataset(tmp_path, images(2)))
    first = index(url, processes=1)
    assert "sha256" in json.loads((url / PLAN_FILE).read_text())
    again = index(url, processes=1)
    assert (first.was_complete, again.was_complete) == (False, True)
    assert again.manifest.fingerprint == first.manifest.fingerprint
    shutil.copy(url / "train-0000.tar", url / "train-0001.tar")
    with pytest.raises(UserError, match="already, of other files, options or versions"):
        index(url, processes=1)


@pytest.mark.parametrize("name", ["READING", "describe_codecs", "HASH_NAME", "classes"])
def test_a_plan_changes_with_all_that_the_shards_depend_on(photos, monkeypatch, name):
    source = open_source(photos).source
    before = encode_plan(source, {})
    assert encode_plan(source, {}) == before
    if name == "classes":
        source.classes = source.classes[::-1]
    else:
        other = (lambda: "other") if name == "describe_codecs" else "other"
        monkeypatch.setattr(f"distrain.data.prepare.plan.{name}", other)
    assert encode_plan(source, {}) != before
