import contextlib
import functools
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import kinds
from PIL import Image
from shapes import SHAPES, images, tar_of_tars
from waiting import await_that

from distrain.data.decoding.image import view_ppm_pixels
from distrain.data.decoding.jpeg_header import parse_jpeg_size
from distrain.data.prepare import pack as pack_module
from distrain.data.prepare.digits import pack_digits
from distrain.data.prepare.index import compute_color_statistics, index_dataset
from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import PackResult, pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.prepare.rejects import REJECTS_FILE
from distrain.data.prepare.source import Reject
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError

SQUARE = Geometry("square", 256)


def pack_folder(
    source, target, geometry=SQUARE, encoding="jpeg", **options
) -> PackResult:
    return pack_dataset(
        open_source(source).source, target, PackOptions(geometry, encoding), **options
    )


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Files and listings, as the standard library serves them, with ranges."""

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not wanted or not path.is_file():
            super().do_GET()
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        data = path.read_bytes()
        part = data[int(start) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header(
            "Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
        )
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def served(place) -> Iterator[str]:
    handler = functools.partial(RangeHandler, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("cat", 60), ("dog", 180)):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(rng.normal(colour, 20, (30 + i, 50, 3)), 0, 255).astype(
                np.uint8
            )
            Image.fromarray(pixels).save(
                tmp_path / "src" / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}"
            )
    return tmp_path / "src"


def test_a_folder_becomes_shards(folder, tmp_path):
    seen = []
    packed = pack_folder(
        str(folder),
        str(tmp_path / "dst"),
        geometry=Geometry("square", 24),
        on_progress=seen.append,
    )
    assert packed.rejects == []
    assert [(at.done, at.total) for at in seen] == [(0, 24), (24, 24)]
    store = Store(str(tmp_path / "dst"))
    manifest = Manifest.load(store)
    assert (manifest.classes, manifest.num_rows, manifest.image_size) == (
        ("cat", "dog"),
        24,
        (24, 24),
    )
    found = Dataset(store, manifest, memory_bytes=1 << 20, retry_seconds=0).read_rows(
        np.arange(24)
    )
    pixels = [np.asarray(Image.open(io.BytesIO(bytes(row.data)))) for row in found]
    assert {p.shape for p in pixels} == {(24, 24, 3)}
    for row, p in zip(found, pixels, strict=True):
        assert (p.mean() > 120) == row.label
    assert [row.label for row in found] != sorted(row.label for row in found), (
        "rows are permuted"
    )
    np.testing.assert_allclose(
        manifest.statistics.mean, np.mean([p.mean((0, 1)) for p in pixels], 0), atol=1
    )


def test_the_same_source_makes_the_same_bytes(folder, tmp_path):
    for name in ("one", "two"):
        pack_folder(str(folder), str(tmp_path / name), geometry=Geometry("square", 24))
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()}
        for n in ("one", "two")
    )
    assert one == two


def test_rejects_are_named(folder, tmp_path):
    (folder / "dog" / "zz.jpg").write_bytes(b"not an image")
    packed = pack_folder(
        str(folder), str(tmp_path / "dst"), geometry=Geometry("square", 24)
    )
    assert packed.manifest.num_rows == 24
    assert packed.rejects == [
        Reject("dog/zz.jpg", "the image format is not recognized")
    ]
    lines = (tmp_path / "dst" / REJECTS_FILE).read_text().splitlines()
    assert json.loads(lines[0])["path"] == "dog/zz.jpg"


def test_a_target_beside_the_folder_of_images(folder, tmp_path, monkeypatch):
    """`..` and links: what counts is where the target is, not how it is written."""
    monkeypatch.chdir(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    for target in ("shards", str(link / "shards"), "../link", "dog/../shards"):
        with pytest.raises(UserError, match="is in the folder of the images"):
            pack_folder(".", target)
    assert not pack_folder(".", "../shards", Geometry("square", 8)).rejects
    pack_folder(str(folder), f"{folder}/cat/../../more", Geometry("square", 8))


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
    with pytest.raises(
        UserError, match="holds one class, cat .the folder dog holds no"
    ):
        pack_folder(str(tmp_path / "one"), target)
    (tmp_path / "one" / "dog" / "b.jpg").write_bytes(b"x")
    with pytest.raises(
        UserError,
        match=r"none of the 2 images could be decoded .2 x the image format is not rec",
    ):
        pack_folder(str(tmp_path / "one"), target)
    for place in (folder, folder / "packed"):
        with pytest.raises(
            UserError, match="is in the folder of the images: choose a place"
        ):
            pack_folder(str(folder), str(place))
    pack_folder(str(folder), target, geometry=Geometry("square", 8))
    with pytest.raises(UserError, match="holds a data set already, of other images"):
        pack_folder(str(folder), target, geometry=Geometry("square", 9))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_packs_the_same_with_any_number_of_processes(
    tmp_path, monkeypatch, shape
):
    """Several shards, row groups cut between them, and an image that does not decode."""
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 5_000)
    found = images()
    found[13] = found[13]._replace(data=b"junk")
    url = SHAPES[shape](tmp_path, found)
    results = []
    for name, processes in (("one", 1), ("two", 2), ("three", 3)):
        packed = pack_folder(
            url, str(tmp_path / name), Geometry("square", 24), num_processes=processes
        )
        results.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
    assert results[0] == results[1] == results[2]
    assert len(packed.manifest.shards) > 2
    assert packed.manifest.num_rows == len(found) - 1
    assert [reject.reason for reject in packed.rejects] == [
        "the image format is not recognized"
    ]
    _, rows = files_of(tmp_path / "one")
    assert np.bincount([row.label for row in rows]).tolist() == [19, 20, 20]
    labels = [row.label for row in rows]
    assert sum(a == b for a, b in pairwise(labels)) < 40, (
        "rows are mixed: sorted by class, 56 neighbours are alike"
    )


KILLED = """
import os, signal, sys
import distrain.data.prepare.pack as module
from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack_options import Geometry, PackOptions

if __name__ == "__main__":
    url, target, processes, at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    module._TARGET_SHARD_BYTES = 40_000
    def progress(now):
        if now.done >= at:
            os.kill(os.getpid(), signal.SIGKILL)
    treatment = PackOptions(Geometry("square", 48))
    module.pack_dataset(open_source(url).source, target, treatment, num_processes=processes, on_progress=progress)
"""


@pytest.mark.parametrize("shape", ["folder", "hub"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pack_that_is_killed_goes_on_and_makes_the_same_bytes(
    tmp_path, plain_environment, shape, processes
):
    """Killed twice; finished shards are not made again, and no process and no half file is left."""
    url, target = SHAPES[shape](tmp_path, images(100)), tmp_path / "killed"
    (tmp_path / "killed.py").write_text(KILLED)
    mark = f"MARK_OF_TEST={tmp_path}"
    environment = {**plain_environment, **dict([mark.split("=")])}

    def run(place, at):
        command = [
            sys.executable,
            str(tmp_path / "killed.py"),
            url,
            str(place),
            str(processes),
            str(at),
        ]
        return subprocess.run(command, env=environment, check=False).returncode

    assert run(tmp_path / "whole", 10**9) == 0
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    kept = {}
    for at in (120, 220):
        assert run(target, at) == -signal.SIGKILL
        shards = {p.name: p.stat().st_mtime_ns for p in target.glob("*.parquet")}
        noted = {p.stem for p in (target / ".pack").glob("shard-*.json")}
        assert len(noted) > len(kept)
        assert not (target / "manifest.json").exists()
        assert all(shards[name] == time for name, time in kept.items())
        kept = {
            name: time
            for name, time in shards.items()
            if name.removesuffix(".parquet") in noted
        }
    (target / "shard-00009.parquet.abcd.partial").write_bytes(b"half")
    assert run(target, 10**9) == 0
    assert {p.name: p.read_bytes() for p in target.iterdir()} == wanted
    assert all(
        (target / name).stat().st_mtime_ns == time for name, time in kept.items()
    )
    await_that(
        lambda: not processes_with(mark), "the processes of the killed packs to end", 30
    )


def processes_with(mark):
    """Ids of processes that have this in their environment, which children inherit."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_half_a_pack_is_not_taken_for_another(folder, tmp_path, monkeypatch):
    target = str(tmp_path / "dst")
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 2_000)

    class StopError(Exception):
        pass

    def stop(progress):
        if progress.done:
            raise StopError

    with pytest.raises(StopError):
        pack_folder(str(folder), target, Geometry("square", 24), on_progress=stop)
    with pytest.raises(UserError, match="holds an unfinished pack of other images"):
        pack_folder(str(folder), target, Geometry("square", 16))
    (folder / "cat" / "new.png").write_bytes((folder / "cat" / "01.png").read_bytes())
    with pytest.raises(UserError, match="holds an unfinished pack of other images"):
        pack_folder(str(folder), target, Geometry("square", 24))
    (folder / "cat" / "new.png").unlink()
    assert (
        pack_folder(str(folder), target, Geometry("square", 24)).manifest.num_rows == 24
    )
    with pytest.raises(UserError, match="holds a data set already"):
        pack_folder(str(folder), target, Geometry("square", 16))


def test_images_that_cannot_be_stored_are_named(folder, tmp_path):
    """A side that JPEG cannot say; and what would be enormous when its short side is resized."""
    for name, size in (
        ("long", (70_000, 4)),
        ("thin", (3_000, 10)),
        ("strip", (1_000_000, 1)),
    ):
        Image.new("RGB", size).save(folder / "cat" / f"{name}.png")
    kept = pack_folder(str(folder), str(tmp_path / "keep"), Geometry("keep"))
    reason = "{} x {} pixels: a side of a JPEG has at most 65500"
    assert sorted(kept.rejects) == [
        Reject("cat/long.png", reason.format(70_000, 4)),
        Reject("cat/strip.png", reason.format(1_000_000, 1)),
    ]
    short = pack_folder(str(folder), str(tmp_path / "short"), Geometry("short", 256))
    assert sorted(short.rejects) == [
        Reject(
            "cat/long.png",
            "resized to 4480000 x 256 pixels, the image is over the limit of 50000000",
        ),
        Reject(
            "cat/strip.png",
            "resized to 256000000 x 256 pixels, the image is over the limit of 50000000",
        ),
        Reject("cat/thin.png", reason.format(76_800, 256)),
    ]
    assert (
        pack_folder(
            str(folder), str(tmp_path / "square"), Geometry("square", 24)
        ).rejects
        == []
    )


def test_a_name_that_is_no_text(folder, tmp_path):
    path = os.fsencode(folder / "cat") + b"/x\xff.png"
    Path(os.fsdecode(path)).write_bytes((folder / "cat" / "01.png").read_bytes())
    packed = pack_folder(
        str(folder), str(tmp_path / "dst"), Geometry("square", 24), num_processes=2
    )
    assert packed.manifest.num_rows == 25
    names = (
        pq.read_table(tmp_path / "dst" / "shard-00000.parquet")["image"]
        .combine_chunks()
        .field("path")
        .to_pylist()
    )
    assert "cat/x\\udcff.png" in names


def test_other_labels_are_another_pack(tmp_path, monkeypatch):
    """Two columns of labels with the same classes."""
    rows = [im.data for im in images(2)]
    columns = {"image": rows, "one": [0, 1, 2, 0, 1, 2], "two": [2, 1, 0, 2, 1, 0]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")

    def attempt(column, **options):
        source = open_source(str(tmp_path / "x.parquet"), label_column=column).source
        return pack_dataset(
            source,
            str(tmp_path / "dst"),
            PackOptions(Geometry("square", 24)),
            **options,
        )

    with monkeypatch.context() as patch:
        patch.setattr(
            pack_module,
            "_write_shard",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            attempt("one")
    with pytest.raises(UserError, match="holds an unfinished pack of other images"):
        attempt("two")


def test_rejects_of_an_earlier_try_go(folder, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / REJECTS_FILE).write_text("{}")
    pack_folder(str(folder), str(tmp_path / "dst"), Geometry("square", 24))
    assert not (tmp_path / "dst" / REJECTS_FILE).exists()


def test_a_pack_that_was_killed_at_its_very_end(folder, tmp_path, monkeypatch):
    """Between the manifest and the end of its notes."""
    with monkeypatch.context() as patch:
        patch.setattr(
            Store, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            pack_folder(str(folder), str(tmp_path / "dst"), Geometry("square", 24))
    assert (tmp_path / "dst" / "manifest.json").exists()
    assert (
        pack_folder(
            str(folder), str(tmp_path / "dst"), Geometry("square", 24)
        ).manifest.num_rows
        == 24
    )
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == [
        "manifest.json",
        "plan.json",
        "shard-00000.parquet",
    ]


def test_between_stores_of_other_kinds(folder, tmp_path):
    here = pack_folder(
        str(folder), str(tmp_path / "dst"), Geometry("square", 24)
    ).manifest
    files = fsspec.filesystem("memory")
    try:
        for path in folder.rglob("*.*"):
            files.pipe_file(f"/src/{path.relative_to(folder)}", path.read_bytes())
        there = pack_folder(
            "memory://src", "memory://dst", Geometry("square", 24), num_processes=2
        ).manifest
        assert there.fingerprint == here.fingerprint
        assert (
            files.cat_file("/dst/shard-00000.parquet")
            == (tmp_path / "dst" / "shard-00000.parquet").read_bytes()
        )
    finally:
        files.store.clear()
        files.pseudo_dirs[:] = [""]


def test_a_source_over_http_can_only_be_read(folder, tmp_path):
    """A server of plain files with a listing, and an archive whose parts are asked for by ranges."""
    here = pack_folder(
        str(folder), str(tmp_path / "dst"), Geometry("square", 24)
    ).manifest
    with served(tmp_path) as url:
        there = pack_folder(
            f"{url}/src",
            str(tmp_path / "again"),
            Geometry("square", 24),
            num_processes=2,
        ).manifest
        assert there.fingerprint == here.fingerprint
        tar_of_tars(tmp_path, images(4))
        source = open_source(f"{url}/ILSVRC2012_img_train.tar").source
        assert (
            pack_dataset(
                source, str(tmp_path / "tar"), PackOptions(Geometry("square", 24))
            ).manifest.num_rows
            == 12
        )
        with pytest.raises(OSError, match="is read-only"):
            pack_folder(str(folder), f"{url}/new", Geometry("square", 24))


def test_the_hubs_own_library_shows_images_and_names(kinds_folder, tmp_path):
    """`datasets.load_dataset` on our shards: decoded images, named labels."""
    import datasets

    packed = pack_folder(
        str(kinds_folder), str(tmp_path / "dst"), Geometry("square", 20)
    )
    files = str(tmp_path / "dst" / "*.parquet")
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == packed.manifest.num_rows == 20
    assert found.features["label"].names == ["a", "b"]
    assert isinstance(found.features["image"], datasets.Image)
    image = found[0]["image"]
    assert (image.size, image.mode) == ((20, 20), "RGB")
    assert found.features["label"].int2str(found[0]["label"]) in ("a", "b")
    rows = {
        row["path"]
        for row in found.cast_column("image", datasets.Image(decode=False))["image"]
    }
    assert rows == {
        str(p.relative_to(kinds_folder)) for p in kinds_folder.rglob("*.JPEG")
    }


def test_digits_are_whole_and_apart(digits, tmp_path):
    train, val = (Manifest.load(Store(str(digits / part))) for part in ("train", "val"))
    assert (train.num_rows, val.num_rows) == (1438, 359)
    assert train.classes == val.classes == tuple("0123456789")
    before = Path(digits / "train" / "manifest.json").stat().st_mtime_ns
    pack_digits(str(digits / "train"), str(digits / "val"))
    assert Path(digits / "train" / "manifest.json").stat().st_mtime_ns == before, (
        "packed once"
    )


def files_of(target):
    store = Store(str(target))
    manifest = Manifest.load(store)
    return manifest, Dataset(
        store, manifest, memory_bytes=1 << 24, retry_seconds=0
    ).read_rows(np.arange(manifest.num_rows))


@pytest.fixture
def kinds_folder(tmp_path):
    """One file of each kind, in two classes."""
    for i, (name, data) in enumerate(kinds(40, 60).items()):
        place = tmp_path / "kinds" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name.replace(' ', '-')}.JPEG").write_bytes(data)
    return tmp_path / "kinds"


def test_keep_stores_what_can_be_trained_on_byte_for_byte(kinds_folder, tmp_path):
    packed = pack_folder(
        str(kinds_folder), str(tmp_path / "dst"), geometry=Geometry("keep")
    )
    assert packed.rejects == []
    manifest, rows = files_of(tmp_path / "dst")
    assert manifest.image_size is None
    assert manifest.verified
    originals = set(kinds(40, 60).values())
    assert sum(bytes(row.data) in originals for row in rows) == 10, (
        "RGB and grey JPEGs that stand upright"
    )
    for row in rows:
        assert parse_jpeg_size(row.data) == row.image_size, "all are JPEG now"
        assert Image.open(io.BytesIO(bytes(row.data))).mode in ("RGB", "L")
    assert (60, 40) in [row.image_size for row in rows], "the rotated one is turned"


def test_short_keeps_the_aspect(kinds_folder, tmp_path):
    pack_folder(
        str(kinds_folder), str(tmp_path / "dst"), geometry=Geometry("short", 20)
    )
    manifest, rows = files_of(tmp_path / "dst")
    assert manifest.image_size is None
    assert {min(row.image_size) for row in rows} == {20}
    assert (20, 30) in [row.image_size for row in rows]
    assert (20, 1600) in [row.image_size for row in rows]


def test_raw_pixels_are_ppm_files(kinds_folder, tmp_path):
    target = tmp_path / "dst"
    pack_folder(
        str(kinds_folder), str(target), geometry=Geometry("square", 20), encoding="raw"
    )
    manifest, rows = files_of(target)
    assert (manifest.image_size, manifest.encoding) == ((20, 20), "raw")
    for row in rows:
        image = Image.open(io.BytesIO(bytes(row.data)))
        assert image.format == "PPM"
        view = view_ppm_pixels(row.data, 20, 20)
        assert np.array_equal(np.asarray(image), view)
        assert np.shares_memory(view, row.data)
    with pytest.raises(UserError, match="raw pixels need one size"):
        pack_folder(
            str(kinds_folder),
            str(tmp_path / "other"),
            geometry=Geometry("keep"),
            encoding="raw",
        )


def test_a_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    for name, level in (("a", 10_000), ("b", 50_000)):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.fromarray(np.full((30, 30), level, np.uint16)).save(
            tmp_path / "src" / name / "x.png"
        )
    pack_folder(
        str(tmp_path / "src"),
        str(tmp_path / "dst"),
        geometry=Geometry("square", 20),
        encoding="raw",
    )
    _, rows = files_of(tmp_path / "dst")
    assert {int(row.data[-1]) for row in rows} == {39, 195}


def test_colour_statistics_are_those_of_the_stored_pixels(kinds_folder, tmp_path):
    """Mean, covariance and principal axes, against numpy on all pixels."""
    pack_folder(
        str(kinds_folder),
        str(tmp_path / "dst"),
        geometry=Geometry("square", 24),
        encoding="raw",
    )
    manifest, rows = files_of(tmp_path / "dst")
    pixels = np.concatenate(
        [view_ppm_pixels(row.data, 24, 24).reshape(-1, 3) for row in rows]
    ).astype(np.float64)
    np.testing.assert_allclose(manifest.statistics.mean, pixels.mean(0), rtol=1e-12)
    covariance = np.cov(pixels.T, bias=True)
    np.testing.assert_allclose(manifest.statistics.covariance, covariance, rtol=1e-9)
    axes = manifest.statistics.compute_principal_axes()
    np.testing.assert_allclose(axes @ axes.T, covariance, rtol=1e-9)
    lengths = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose((axes**2).sum(0), lengths, rtol=1e-9)


@pytest.mark.parametrize(
    "text", ["square", "square:0", "short:-1", "keep:3", "wide:9", ""]
)
def test_a_geometry_that_is_none(text):
    with pytest.raises(UserError, match="is not valid: use keep, short:N or square:N"):
        Geometry.from_text(text)


def test_a_full_disk_is_told_at_once_and_waited_for(folder, tmp_path, full_disk):
    lines = []
    target = tmp_path / "set"
    with full_disk(3) as make_room:

        def log(line: str) -> None:
            lines.append(line)
            make_room()

        packed = pack_folder(str(folder), str(target), Geometry("square", 24), log=log)
    assert packed.manifest.num_rows > 0
    assert lines == [f"{target}: File too large: retrying for 60 s"]


def test_a_target_that_cannot_be_written_is_one_sentence(tmp_path):
    source = open_source(tar_of_tars(tmp_path, images(2))).source
    (tmp_path / "file").write_text("x")
    message = r"cannot write to .*file/set \(Not a directory\): choose another target"
    with pytest.raises(UserError, match=message):
        pack_dataset(source, str(tmp_path / "file" / "set"), PackOptions())


def test_a_damaged_row_group_counts_its_rows(tmp_path, monkeypatch):
    """Once, also where it is cut between shards."""
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 2_000)
    data = [im.data for im in images(10)]
    table = pa.table({"image": data, "label": [0, 1, 2] * 10})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=10, compression="snappy")
    start = open_source(str(path)).source.blocks[1].start
    assert start is not None
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 30] = bytes(30)
    path.write_bytes(bytes(damaged))

    source = open_source(str(path)).source
    options = PackOptions(Geometry("square", 24))
    (reject,) = pack_dataset(source, str(tmp_path / "dst"), options).rejects
    assert (reject.name, reject.num_images) == ("x.parquet row group 1 of 10 rows", 10)
    (reject,) = index_dataset(*open_source(str(path)), str(tmp_path / "index")).rejects
    assert reject.num_images == 10
    (reject,) = compute_color_statistics(source)[1]
    assert reject.num_images == 10
