import io
import json
from pathlib import Path

import numpy as np
import pytest
from photos import kinds
from PIL import Image

from distrain.data.decode import jpeg_size, ppm_pixels
from distrain.data.digits import pack_digits
from distrain.data.manifest import Manifest
from distrain.data.pack import REJECTS, Geometry, Packed, Treatment, pack
from distrain.data.shards import Dataset
from distrain.data.sources import open_source
from distrain.data.store import Store
from distrain.errors import UserError

SQUARE = Geometry("square", 256)


def pack_folder(source, target, geometry=SQUARE, encoding="jpeg", **options) -> Packed:
    return pack(open_source(source).source, target, Treatment(geometry, encoding), **options)


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
    packed = pack_folder(str(folder), str(tmp_path / "dst"), geometry=Geometry("square", 24), progress=seen.append)
    assert packed.rejects == []
    assert [(at.done, at.total) for at in seen] == [(0, 24), (24, 24)]
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


def files_of(target):
    store = Store(str(target))
    manifest = Manifest.load(store)
    return manifest, Dataset(store, manifest, memory=1 << 24, patience=0).rows(np.arange(manifest.rows))


@pytest.fixture
def kinds_folder(tmp_path):
    """One file of each kind, in two classes."""
    for i, (name, data) in enumerate(kinds(40, 60).items()):
        place = tmp_path / "kinds" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name.replace(' ', '-')}.JPEG").write_bytes(data)
    return tmp_path / "kinds"


def test_keep_stores_what_can_be_trained_on_byte_for_byte(kinds_folder, tmp_path):
    packed = pack_folder(str(kinds_folder), str(tmp_path / "dst"), geometry=Geometry("keep"))
    assert packed.rejects == []
    manifest, rows = files_of(tmp_path / "dst")
    assert manifest.size is None
    assert manifest.proved
    originals = set(kinds(40, 60).values())
    assert sum(bytes(row.data) in originals for row in rows) == 10, "RGB and grey JPEGs that stand upright"
    for row in rows:
        assert jpeg_size(row.data) == row.size, "all are JPEG now"
        assert Image.open(io.BytesIO(bytes(row.data))).mode in ("RGB", "L")
    assert (60, 40) in [row.size for row in rows], "the rotated one is turned"


def test_short_keeps_the_aspect(kinds_folder, tmp_path):
    pack_folder(str(kinds_folder), str(tmp_path / "dst"), geometry=Geometry("short", 20))
    manifest, rows = files_of(tmp_path / "dst")
    assert manifest.size is None
    assert {min(row.size) for row in rows} == {20}
    assert (20, 30) in [row.size for row in rows]
    assert (20, 1600) in [row.size for row in rows]


def test_raw_pixels_are_ppm_files(kinds_folder, tmp_path):
    target = tmp_path / "dst"
    pack_folder(str(kinds_folder), str(target), geometry=Geometry("square", 20), encoding="raw")
    manifest, rows = files_of(target)
    assert (manifest.size, manifest.encoding) == ((20, 20), "raw")
    for row in rows:
        image = Image.open(io.BytesIO(bytes(row.data)))
        assert image.format == "PPM"
        view = ppm_pixels(row.data, 20, 20)
        assert np.array_equal(np.asarray(image), view)
        assert np.shares_memory(view, row.data)
    with pytest.raises(UserError, match="raw pixels need one size"):
        pack_folder(str(kinds_folder), str(tmp_path / "other"), geometry=Geometry("keep"), encoding="raw")


def test_a_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    for name, level in (("a", 10_000), ("b", 50_000)):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.fromarray(np.full((30, 30), level, np.uint16)).save(tmp_path / "src" / name / "x.png")
    pack_folder(str(tmp_path / "src"), str(tmp_path / "dst"), geometry=Geometry("square", 20), encoding="raw")
    _, rows = files_of(tmp_path / "dst")
    assert {int(row.data[-1]) for row in rows} == {39, 195}


def test_colour_statistics_are_those_of_the_stored_pixels(kinds_folder, tmp_path):
    """Mean, covariance and principal axes, against numpy on all pixels."""
    pack_folder(str(kinds_folder), str(tmp_path / "dst"), geometry=Geometry("square", 24), encoding="raw")
    manifest, rows = files_of(tmp_path / "dst")
    pixels = np.concatenate([ppm_pixels(row.data, 24, 24).reshape(-1, 3) for row in rows]).astype(np.float64)
    np.testing.assert_allclose(manifest.statistics.mean, pixels.mean(0), rtol=1e-12)
    covariance = np.cov(pixels.T, bias=True)
    np.testing.assert_allclose(manifest.statistics.covariance, covariance, rtol=1e-9)
    axes = manifest.statistics.principal_axes()
    np.testing.assert_allclose(axes @ axes.T, covariance, rtol=1e-9)
    lengths = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose((axes**2).sum(0), lengths, rtol=1e-9)


@pytest.mark.parametrize("text", ["square", "square:0", "short:-1", "keep:3", "wide:9", ""])
def test_a_geometry_that_is_none(text):
    with pytest.raises(UserError, match="is none of keep, short:N and square:N"):
        Geometry.parse(text)
