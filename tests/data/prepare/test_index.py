import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from narrow import loader_sections
from photos import kinds, picture
from shapes import CLASSES, SHAPES, folder, hub, images, tar_of, webdataset

from distrain.data.batch import iter_evaluation_requests
from distrain.data.decoding.quarantine import InFlightRecorder
from distrain.data.loader import Loader
from distrain.data.prepare import index
from distrain.data.prepare.index import compute_color_statistics, index_dataset
from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.prepare.rejects import REJECTS_FILE
from distrain.data.prepare.source import Reject
from distrain.data.prepare.verify import summarize_dataset, verify_dataset
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import AttemptError, RunError, UserError
from distrain.training.quarantine_sync import sync_quarantine

CPU = torch.device("cpu")
FOREIGN = ["archive of archives", "webdataset", "hub"]


def made(url, to=None, **options):
    return index_dataset(*open_source(url), to and str(to), **options)


def opened(url, memory=1 << 24, patience=0.0):
    store = Store(str(url))
    return Dataset(
        store, Manifest.load(store), memory_bytes=memory, retry_seconds=patience
    )


def rows_of(dataset):
    rows = dataset.read_rows(np.arange(dataset.manifest.num_rows))
    return sorted((row.label, bytes(row.data), row.image_size) for row in rows)


@pytest.mark.parametrize("shape", FOREIGN)
def test_foreign_sets_are_read_as_they_are(tmp_path, shape):
    found = images()
    url = SHAPES[shape](tmp_path, found)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    indexed = made(url, tmp_path / "index", num_processes=2)
    assert indexed.rejects == []
    assert {p: p.stat().st_mtime_ns for p in before} == before
    names = sorted(p.name for p in (tmp_path / "index").iterdir())
    assert names == [MANIFEST_FILE, "plan.json"]
    dataset = opened(tmp_path / "index")
    assert dataset.manifest.num_rows == len(found)
    assert rows_of(dataset) == sorted(
        (im.label, im.data, (40 + int(im.name[-8:-5]), 60)) for im in found
    )
    assert verify_dataset(dataset.store, dataset.manifest).problems == []
    assert summarize_dataset(dataset).rows_per_class == dict.fromkeys(
        dataset.manifest.classes, 20
    )
    assert summarize_dataset(dataset).heights == (40, 49, 59)


def test_a_summary_is_of_the_images_that_decode(tmp_path):
    files = [(f"{i}.jpg", image.data) for i, image in enumerate(images(2))]
    files[0] = ("0.jpg", b"no image")
    labels = [(f"{i}.cls", b"%d" % (i % 2)) for i in range(len(files))]
    (tmp_path / "x.tar").write_bytes(tar_of([*files, *labels]))
    assert len(made(str(tmp_path / "x.tar")).rejects) == 1
    summary = summarize_dataset(opened(tmp_path))
    assert summary.rows_per_class == {"0": 2, "1": 3}
    assert summary.heights == (40, 41, 41)


@pytest.mark.parametrize("shape", FOREIGN)
def test_they_train_on_the_same_pixels_as_packed_ones(narrow, tmp_path, shape):
    """Every image of the set, resized and cut to its centre, against the same files packed byte for byte."""
    found = images(8)
    url = SHAPES[shape](tmp_path, found)
    made(url, tmp_path / "index")
    pack_dataset(
        open_source(folder(tmp_path, found)).source,
        str(tmp_path / "packed"),
        PackOptions(Geometry("keep")),
    )
    config = narrow(augment={"crop": 64, "short_side": 72})

    def seen(place):
        dataset = opened(tmp_path / place)
        requests = iter_evaluation_requests(dataset.manifest.num_rows, 8, 0, 1)
        statistics = opened(tmp_path / "packed").manifest.statistics
        options = {
            **loader_sections(config),
            "batch_size": 8,
            "device": CPU,
            "use_augmentation": False,
        }
        with Loader(dataset, statistics, requests, **options) as loader:
            return sorted(
                (label, image.numpy().tobytes())
                for batch in loader
                for label, image in zip(
                    batch.labels.tolist(), batch.images, strict=True
                )
            )

    assert seen("index") == seen("packed")


def test_the_manifest_beside_the_files(tmp_path):
    url = webdataset(tmp_path, images(4))
    indexed = made(url)
    assert indexed.manifest.shards_url is None
    assert Manifest.load(Store(url)).fingerprint == indexed.manifest.fingerprint
    elsewhere = made(str(Path(url) / "*.tar"), tmp_path / "index")
    assert elsewhere.manifest.shards_url == url
    assert elsewhere.manifest.fingerprint == indexed.manifest.fingerprint, (
        "where it lies does not matter"
    )
    again = made(url)
    assert again.was_complete
    assert again.manifest.fingerprint == indexed.manifest.fingerprint
    message = f"has a {MANIFEST_FILE} already, of other files, options or versions: tra"
    with pytest.raises(UserError, match=message):
        made(url, pixel_limit=1_000_000)
    shutil.move(url, tmp_path / "moved")
    assert len(rows_of(opened(tmp_path / "moved"))) == 12
    (tmp_path / "moved" / MANIFEST_FILE).write_text("{")
    with pytest.raises(UserError, match="not JSON.*: restore it, or delete it"):
        made(str(tmp_path / "moved"))


def bad_set(tmp_path):
    """Good files, one that does not decode, one that is cut, and one of each kind that needs PIL."""
    files = [(i % 3, im.data) for i, im in enumerate(images(4))]
    files[3], files[7] = (0, b"junk"), (1, files[7][1][:700])
    files += [
        (0, data)
        for name, data in kinds().items()
        if name in ("cmyk", "alpha png", "16-bit png", "grey")
    ]
    members = [part for i, (label, data) in enumerate(files)
               for part in ((f"{i:03d}.jpg", data), (f"{i:03d}.cls", b"%d" % label))]  # fmt: skip
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x.tar").write_bytes(tar_of(members))
    return str(tmp_path / "tars"), files


def test_what_does_not_decode_keeps_its_place_and_has_no_weight(narrow, tmp_path):
    url, files = bad_set(tmp_path)
    indexed = made(url)
    assert [reject.name for reject in indexed.rejects] == [
        "x.tar/003.jpg",
        "x.tar/007.jpg",
    ]
    lines = (tmp_path / "tars" / REJECTS_FILE).read_text().splitlines()
    assert json.loads(lines[0]) == {
        "path": "x.tar/003.jpg",
        "reason": "the image format is not recognized",
    }
    dataset = opened(url)
    assert set(dataset.bad_samples) == {3, 7}
    assert dataset.manifest.num_rows == len(files)
    assert verify_dataset(dataset.store, dataset.manifest).problems == [], (
        "they are what the manifest says"
    )
    config = narrow(augment={"crop": 64, "short_side": 72})
    requests = iter_evaluation_requests(len(files), 8, 0, 1)
    options = {
        **loader_sections(config),
        "batch_size": 8,
        "device": CPU,
        "use_augmentation": False,
    }
    with Loader(dataset, dataset.manifest.statistics, requests, **options) as loader:
        assert loader._recorder is not None, (
            "what kills DALI is found: PIL's verdict is not DALI's"
        )
        batches = list(loader)
    weights = torch.cat([batch.sample_weights for batch in batches])
    assert np.flatnonzero(weights.numpy() == 0).tolist() == [3, 7]
    assert set().union(*(batch.bad_samples for batch in batches)) == {3, 7}


def test_a_file_that_crashes_the_decoder_ends_the_run_with_its_name(
    narrow, tmp_path, monkeypatch
):
    """A shell script stands in for the child that decodes the suspects and crashes."""
    url = webdataset(tmp_path, images(4))
    made(url)
    dataset = opened(url)
    config = narrow(run=str(tmp_path / "run"))
    recorder = InFlightRecorder(config.run, dataset, num_slots=2, batch_size=2)
    recorder.record_fed(np.array([4, 5]))
    recorder._file.close()  # as the kernel does when a process dies
    child = tmp_path / "child"
    child.write_text(
        '#!/bin/sh\n[ -e "$0.crashed" ] && { echo null; cat; exit; }\n'
        'touch "$0.crashed"; kill -SEGV $$'
    )
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    told: list[str] = []
    store = Store(str(tmp_path / "run"))
    for _ in range(2):  # the second time from the verdict that is remembered
        with pytest.raises(
            RunError, match=r"these samples .*: 4 \(.*\): crashes the d"
        ):
            sync_quarantine(
                config, World(CPU), [dataset], store, told.append, told.append
            )
    assert "2 files (4: " in told[0]
    assert told[1:] == ["verdict 2 of 2"]
    assert dataset.bad_samples == {}


def test_a_replaced_or_damaged_file_is_said(tmp_path):
    """A file of the same size and another content; and one of another size."""
    url = Path(hub(tmp_path, images(8)))
    made(str(url))
    first, second = sorted(url.glob("*.parquet"))[:2]
    data = bytearray(first.read_bytes())
    data[2000] ^= 1
    first.write_bytes(bytes(data))
    with pytest.raises(AttemptError, match="train-00000-of-00003.parquet is damaged"):
        opened(url).read_rows(np.arange(3))
    second.write_bytes(second.read_bytes() + b"more")
    manifest = Manifest.load(Store(str(url)))
    wrong = [
        tuple(problem) for problem in verify_dataset(Store(str(url)), manifest).problems
    ]
    size = manifest.shards[1].bytes
    assert wrong == [
        (f"{first.name} row group 0", "does not match its CRC-32C"),
        (second.name, f"has {size + 4} bytes, not {size}"),
    ]


def test_a_damaged_row_group_is_left_out_and_named(tmp_path):
    url = Path(hub(tmp_path, images(20)))
    (first, *_) = sorted(url.glob("*.parquet"))
    source = open_source(str(url)).source
    block = source.blocks[1]
    data = bytearray(first.read_bytes())
    data[block.start : block.start + 40] = b"\xff" * 40
    first.write_bytes(bytes(data))
    indexed = made(str(url))
    (refused,) = indexed.rejects
    assert refused.name == f"{first.name} row group 1 of 7 rows"
    assert indexed.manifest.num_rows == 53
    assert len(rows_of(opened(url))) == 53


def test_messages_name_the_number_of_a_row_group_in_its_file(tmp_path):
    """Also of those after a row group that index has left out."""
    url = Path(hub(tmp_path, images(20)))
    *_, last = sorted(url.glob("*.parquet"))
    _, left_out_start, start = (
        block.start for block in open_source(str(last)).source.blocks
    )
    data = bytearray(last.read_bytes())
    data[left_out_start : left_out_start + 40] = b"\xff" * 40
    last.write_bytes(bytes(data))
    made(str(url))
    dataset = opened(url)
    where = f"{last.name} row group 2"
    assert dataset.describe_sample(46) == f"{last.name} row group 0 row 6"
    assert dataset.describe_sample(47) == f"{where} row 0"

    tree = json.loads((url / MANIFEST_FILE).read_text())
    (url / MANIFEST_FILE).write_text(json.dumps({**tree, "classes": ["a", "b"]}))
    with pytest.raises(AttemptError, match=f"{where} row 0 has label 2, but"):
        opened(url)[47]

    data[start] ^= 1
    last.write_bytes(bytes(data))
    problems = verify_dataset(Store(str(url)), dataset.manifest).problems
    assert [tuple(problem) for problem in problems] == [
        (where, "does not match its CRC-32C")
    ]


def test_a_damaged_group_of_one_row_is_left_out_too(tmp_path):
    url = Path(hub(tmp_path, images(5)))
    (first, *_) = sorted(url.glob("*.parquet"))
    table = pq.read_table(first)
    pq.write_table(table, first, row_group_size=1, compression="snappy")
    block = open_source(str(first)).source.blocks[2]
    data = bytearray(first.read_bytes())
    data[block.start : block.start + 40] = b"\xff" * 40
    first.write_bytes(bytes(data))
    indexed = made(str(url))
    assert [reject.name for reject in indexed.rejects] == [
        f"{first.name} row group 2 of 1 rows"
    ]
    assert indexed.manifest.num_rows == len(rows_of(opened(url))) == 14


def test_statistics_are_those_of_all_pixels(tmp_path):
    found = images(3)
    url = hub(tmp_path, found)
    indexed = made(url)
    pixels = np.concatenate([decoded(im.data) for im in found]).astype(np.float64)
    np.testing.assert_allclose(
        indexed.manifest.statistics.mean, pixels.mean(0), rtol=1e-12
    )
    np.testing.assert_allclose(
        indexed.manifest.statistics.covariance, np.cov(pixels.T, bias=True), rtol=1e-9
    )
    alone, refused = compute_color_statistics(
        open_source(str(Path(url) / "*.parquet")).source, num_processes=2
    )
    assert refused == []
    np.testing.assert_array_equal(
        alone.covariance, indexed.manifest.statistics.covariance
    )
    np.testing.assert_array_equal(
        alone.eigenvectors, indexed.manifest.statistics.eigenvectors
    )


def decoded(data):
    from distrain.data.decoding.image import decode_rgb

    return decode_rgb(data, 1 << 20).reshape(-1, 3)


def test_statistics_name_what_they_leave_out(tmp_path):
    found = images(3)
    place = Path(folder(tmp_path, found))
    (place / CLASSES[0] / "bad.jpg").write_bytes(b"x")
    _, refused = compute_color_statistics(open_source(str(place)).source)
    assert refused == [
        Reject(f"{CLASSES[0]}/bad.jpg", "the image format is not recognized")
    ]


def test_an_interruption_while_the_manifest_is_built_writes_nothing(
    tmp_path, monkeypatch
):
    found = images(2)
    found[0] = found[0]._replace(data=b"junk")
    url = hub(tmp_path, found)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "_build_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(url, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []
    monkeypatch.undo()
    assert len(made(url, tmp_path / "index").rejects) == 1
    assert (tmp_path / "index" / REJECTS_FILE).exists()


def test_what_cannot_be_indexed(tmp_path, monkeypatch):
    place = folder(tmp_path, images(2))
    with pytest.raises(UserError, match="is a folder of image files, and index takes"):
        made(place)
    url = webdataset(tmp_path, images(2))
    monkeypatch.setattr(
        Store,
        "write",
        lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")),
    )
    with pytest.raises(
        UserError, match="cannot write to .*set `to` to another folder for the manifest"
    ):
        made(url)
    monkeypatch.undo()
    source, columns = open_source(url)
    source.store.redacted_url = "s3://bucket"  # as if the URL had had a password
    with pytest.raises(UserError, match="contains a secret"):
        index_dataset(source, columns, str(tmp_path / "index"))
    junk = tar_of([("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"x"), ("1.cls", b"1")])
    (tmp_path / "junk.tar").write_bytes(junk)
    with pytest.raises(
        UserError, match="none of the 2 images in .* could be decoded .2 x the im"
    ):
        made(str(tmp_path / "junk.tar"), tmp_path / "other")


def test_ctrl_c_before_the_first_image_leaves_nothing(tmp_path, monkeypatch):
    """It comes between the two calls that try whether the target can be written."""
    url = webdataset(tmp_path, images(2))
    remove = Store.remove
    calls = []

    def interrupt_first(store, path):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(store, path)

    monkeypatch.setattr(Store, "remove", interrupt_first)
    with pytest.raises(KeyboardInterrupt):
        made(url, tmp_path / "index")
    assert list((tmp_path / "index").glob("*")) == []


def test_a_row_is_as_large_as_the_training_decoder_says(tmp_path):
    """A JPEG that EXIF turns is trained on upright."""
    from photos import rotated

    members = [
        ("0.jpg", rotated(picture(0, 40, 70), 6)),
        ("0.cls", b"0"),
        ("1.png", images(1)[0].data),
        ("1.cls", b"1"),
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    made(str(tmp_path / "x.tar"), tmp_path / "index")
    assert [
        row.image_size for row in opened(tmp_path / "index").read_rows(np.arange(2))
    ] == [
        (70, 40),
        (40, 60),
    ]
