import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrain.data.manifest import Manifest
from distrain.data.pack import REJECTS, Geometry, pack_digits, pack_folder
from distrain.data.shards import Dataset
from distrain.data.store import Store
from distrain.errors import UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("cat", 60), ("dog", 180)):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(colour, 20, (30 + i, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "src" / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "src"


def test_a_folder_becomes_shards(folder, tmp_path):
    seen = []
    packed = pack_folder(
        str(folder), str(tmp_path / "dst"), geometry=Geometry("square", 24), progress=lambda d, t: seen.append((d, t))
    )
    assert packed.rejects == []
    assert seen == [(24, 24)]
    store = Store(str(tmp_path / "dst"))
    manifest = Manifest.load(store)
    assert (manifest.classes, manifest.rows, manifest.size) == (("cat", "dog"), 24, (24, 24))
    found = Dataset(store, manifest, memory=1 << 20, patience=0).rows(np.arange(24))
    pixels = [np.asarray(Image.open(io.BytesIO(bytes(row.data)))) for row in found]
    assert {p.shape for p in pixels} == {(24, 24, 3)}
    for row, p in zip(found, pixels, strict=True):
        assert (p.mean() > 120) == row.label
    assert [row.label for row in found] != sorted(row.label for row in found), "rows are permuted"
    np.testing.assert_allclose(manifest.statistics.mean, np.mean([p.mean((0, 1)) for p in pixels], 0), atol=1)


def test_the_same_source_makes_the_same_bytes(folder, tmp_path):
    for name in ("one", "two"):
        pack_folder(str(folder), str(tmp_path / name), geometry=Geometry("square", 24))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two


def test_rejects_are_named(folder, tmp_path):
    (folder / "dog" / "zz.jpg").write_bytes(b"not an image")
    packed = pack_folder(str(folder), str(tmp_path / "dst"), geometry=Geometry("square", 24))
    assert packed.manifest.rows == 24
    assert packed.rejects == [("dog/zz.jpg", "no image format is recognised")]
    lines = (tmp_path / "dst" / REJECTS).read_text().splitlines()
    assert json.loads(lines[0])["path"] == "dog/zz.jpg"


def test_what_cannot_be_packed(folder, tmp_path):
    target = str(tmp_path / "dst")
    with pytest.raises(UserError, match="no folder at"):
        pack_folder(str(tmp_path / "none"), target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        pack_folder(str(tmp_path / "empty"), target)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    (tmp_path / "one" / "cat" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="holds one class, cat"):
        pack_folder(str(tmp_path / "one"), target)
    (tmp_path / "one" / "dog").mkdir()
    with pytest.raises(UserError, match="none of the 1 images could be decoded"):
        pack_folder(str(tmp_path / "one"), target)
    pack_folder(str(folder), target, geometry=Geometry("square", 8))
    with pytest.raises(UserError, match="holds a data set already"):
        pack_folder(str(folder), target, geometry=Geometry("square", 8))


def test_digits_are_whole_and_apart(digits, tmp_path):
    train, val = (Manifest.load(Store(str(digits / part))) for part in ("train", "val"))
    assert (train.rows, val.rows) == (1438, 359)
    assert train.classes == val.classes == tuple("0123456789")
    before = Path(digits / "train" / "manifest.json").stat().st_mtime_ns
    pack_digits(str(digits / "train"), str(digits / "val"))
    assert Path(digits / "train" / "manifest.json").stat().st_mtime_ns == before, "packed once"
