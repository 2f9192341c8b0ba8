"""One source packed into a training and a validation set."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from photos import encoded, picture
from PIL import Image
from shapes import CLASSES, SHAPES, images, tar_of
from shapes import Image as Labeled

import distrain
from distrain.data.prepare import pack as pack_module
from distrain.data.prepare.rejects import REJECTS_FILE
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError

# One process, and JPEGs are stored byte for byte, by which they are recognized.
pack = partial(distrain.pack, geometry="keep", processes=1)


def rows_of(place: Path) -> dict[bytes, int]:
    """Label of each image of a data set, by its bytes."""
    found = {}
    for file in sorted(place.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            found[row["image"]["bytes"]] = row["label"]
    return found


def names_of(place: Path) -> list[str]:
    return [
        row["image"]["path"]
        for file in sorted(place.glob("*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def files_in(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def is_for_validation(data: bytes, fraction: float) -> bool:
    """The rule, written once more."""
    return int(xxhash.xxh3_128_hexdigest(data)[:16], 16) < fraction * 2**64


def reencoded(data: bytes) -> bytes:
    """A PNG of the same pixels."""
    sink = io.BytesIO()
    Image.open(io.BytesIO(data)).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_file_decides_and_equal_pixels_follow_the_first(tmp_path, shape):
    """In every shape: no image is lost, labels stay, and no duplicate is on both sides."""
    found = images(12)
    copies = [
        Labeled(2, f"z{i}.JPEG", reencoded(image.data) if i % 2 else image.data)
        for i, image in enumerate(found[:20])
    ]
    url = SHAPES[shape](tmp_path, [*found, *copies])
    packed = pack(url, tmp_path / "dst", val=0.4)
    assert packed.val is not None
    assert packed.split is not None

    wanted = {image.data for image in found if is_for_validation(image.data, 0.4)}
    train = rows_of(tmp_path / "dst/train")
    val = rows_of(tmp_path / "dst/val")
    assert not train.keys() & val.keys()
    originals = {image.data for image in found}
    assert val.keys() & originals == wanted
    # A PNG is stored as another JPEG than that of which it is a copy.
    num_val_copies = sum(image.data in wanted for image in found[:20])
    numbers = (packed.manifest.num_rows, packed.val.manifest.num_rows)
    assert numbers == (56 - len(wanted) - num_val_copies, len(wanted) + num_val_copies)
    for image in found[20:]:
        assert {**train, **val}[image.data] == image.label
    assert packed.manifest.classes == packed.val.manifest.classes
    assert len(packed.manifest.classes) == 3
    assert packed.split.num_followers == 20
    assert (sum(packed.split.train), sum(packed.split.val)) == numbers
    assert packed.split.val[1] == sum(
        image.data in wanted for image in found if image.label == 1
    )
    assert packed.rejects == packed.val.rejects == []


def test_copies_would_be_apart_if_each_decided_for_itself():
    """So the test above tells."""
    apart = [
        is_for_validation(image.data, 0.4)
        != is_for_validation(reencoded(image.data), 0.4)
        for image in images(12)[1:20:2]
    ]
    assert any(apart)


def test_more_images_and_other_names_keep_the_sides(tmp_path):
    found = images(20)
    few = SHAPES["folder"](tmp_path / "few", found[::2])
    renamed = [
        image._replace(name=f"{i}.jpg") for i, image in enumerate(reversed(found))
    ]
    many = SHAPES["folder"](tmp_path / "many", renamed)
    for name, url in (("few", few), ("many", many)):
        pack(url, tmp_path / name, val=0.3)
    for side in ("train", "val"):
        before = rows_of(tmp_path / "few" / side)
        after = rows_of(tmp_path / "many" / side)
        assert before
        assert before.items() <= after.items()


def test_the_fraction_is_met_in_every_class(tmp_path):
    """Within five standard deviations, of 2,000 images."""
    rng = np.random.default_rng(0)
    files = [
        (f"{'ab'[i % 2]}/{i}.ppm", b"P6 2 2 255\n" + rng.bytes(12)) for i in range(2000)
    ]
    (tmp_path / "photos.tar").write_bytes(tar_of(files))
    packed = distrain.pack(
        tmp_path / "photos.tar",
        tmp_path / "dst",
        val=0.1,
        geometry="square:2",
        encoding="raw",
        processes=1,
    )
    split = packed.split
    assert split is not None
    assert [a + b for a, b in zip(split.train, split.val, strict=True)] == [1000, 1000]
    limit = 5 * (1000 * 0.1 * 0.9) ** 0.5
    assert all(abs(count - 100) < limit for count in split.val)
    names = [*names_of(tmp_path / "dst/train"), *names_of(tmp_path / "dst/val")]
    assert len(set(names)) == len(names) == 2000


def test_two_folders_may_be_named(tmp_path):
    url = SHAPES["folder"](tmp_path, images(8))
    packed = pack(url, tmp_path / "train", val=0.3, val_dst=tmp_path / "other/val")
    assert packed.val is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "other",
        "photos",
        "train",
    ]
    for place, part in (("train", packed), ("other/val", packed.val)):
        manifest = Manifest.load(Store(str(tmp_path / place)))
        assert manifest.to_json() == part.manifest.to_json()
        assert not list((tmp_path / place).glob(".pack"))


@pytest.mark.parametrize("shape", ["folder", "hub"])
def test_what_does_not_decode_is_rejected_once(tmp_path, shape):
    found = images(10)
    for i in range(0, 30, 4):
        found[i] = found[i]._replace(data=b"junk %d" % i)
    packed = pack(SHAPES[shape](tmp_path, found), tmp_path / "dst", val=0.5)
    assert packed.val is not None
    assert len(packed.rejects) == 8
    assert {reject.reason for reject in packed.rejects} == {
        "the image format is not recognized"
    }
    assert packed.val.rejects == []
    assert packed.manifest.num_rows + packed.val.manifest.num_rows == 22
    assert not (tmp_path / "dst/val" / REJECTS_FILE).exists()


def test_a_file_outside_the_classes_is_rejected_once(tmp_path):
    url = SHAPES["folder"](tmp_path, images(8))
    (Path(url) / "stray.jpg").write_bytes(images(1)[0].data)
    packed = pack(url, tmp_path / "dst", val=0.3)
    assert packed.val is not None
    assert [reject.name for reject in packed.rejects] == ["stray.jpg"]
    assert packed.val.rejects == []


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 20_000)
    url = SHAPES["hub"](tmp_path, images(16))
    for processes in (1, 2):
        pack(url, tmp_path / str(processes), val=0.3, processes=processes)
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")
    assert len(list((tmp_path / "1/train").glob("*.parquet"))) > 2


def test_a_finished_one_is_found_complete(tmp_path):
    url = SHAPES["folder"](tmp_path, images(8))
    first = pack(url, tmp_path / "dst", val=0.3)
    before = files_in(tmp_path / "dst")
    seen = []
    again = pack(url, tmp_path / "dst", val=0.3, on_progress=seen.append)
    assert again.val is not None
    assert (again.was_complete, again.val.was_complete) == (True, True)
    assert again.manifest.to_json() == first.manifest.to_json()
    assert [(at.done, at.total) for at in seen] == [(24, 24)]
    assert files_in(tmp_path / "dst") == before
    # If one side was deleted, only that one is made again.
    for side in ("val", "train"):
        for path in (tmp_path / "dst" / side).iterdir():
            path.unlink()
        part = pack(url, tmp_path / "dst", val=0.3)
        assert part.val is not None
        assert (part.was_complete, part.val.was_complete) == (
            side == "val",
            side == "train",
        )
        assert files_in(tmp_path / "dst") == before
    for other in (0.4, None):
        with pytest.raises(UserError, match="holds a data set already, of other"):
            pack(url, tmp_path / "dst" / ("train" if other is None else ""), val=other)


KILLED = """
import os, signal, sys
import distrain
import distrain.data.prepare.pack as module

if __name__ == "__main__":
    url, target, stage, at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    module._TARGET_SHARD_BYTES = 20_000
    def progress(now):
        if now.stage == stage and now.done >= at:
            os.kill(os.getpid(), signal.SIGKILL)
    distrain.pack(url, target, val=0.3, geometry="keep", processes=1, on_progress=progress)
"""


def test_one_that_is_killed_goes_on_and_makes_the_same_bytes(
    tmp_path, plain_environment, monkeypatch
):
    """At every stage; what was decided is not decided again."""
    url, target = SHAPES["hub"](tmp_path, images(40)), tmp_path / "killed"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    monkeypatch.setattr(pack_module, "_TARGET_SHARD_BYTES", 20_000)
    pack(url, tmp_path / "whole", val=0.3)
    wanted = files_in(tmp_path / "whole")
    sides = target / "val/.pack/sides.npz"
    decided = None
    for stage, at in (("hashing", 50), ("training", 60), ("validation", 1)):
        words = [sys.executable, str(script), url, str(target), stage, str(at)]
        done = subprocess.run(words, env=plain_environment, check=False)
        assert done.returncode == -signal.SIGKILL
        # Claimed before the images are read, and until it has finished.
        assert (target / "val/.pack/plan.json").exists()
        assert sides.exists() == (stage != "hashing")
        if stage == "hashing":
            assert (target / "train/.pack/plan.json").exists()
            other = tmp_path / "other"
            with pytest.raises(UserError, match="holds an unfinished pack of other"):
                pack(url, target / "train")
            with pytest.raises(UserError, match="holds an unfinished pack of other"):
                pack(url, other, val=0.4, val_dst=target / "val")
            # A refused target leaves the other one free.
            assert files_in(other) == {}
        elif decided is None:
            decided = os.stat(sides).st_mtime_ns
        else:
            assert os.stat(sides).st_mtime_ns == decided
            assert (target / "train/manifest.json").exists()
    seen = []
    packed = pack(url, target, val=0.3, on_progress=seen.append)
    assert packed.split is not None
    assert {progress.stage for progress in seen} == {"validation"}
    assert files_in(target) == wanted


@pytest.mark.parametrize("val", [0.05, 0.95])
def test_copies_of_one_image_cannot_be_divided(tmp_path, val):
    """No fraction would help."""
    copies = [Labeled(i % 3, f"{i}.JPEG", images(1)[0].data) for i in range(4)]
    url = SHAPES["folder"](tmp_path, copies)
    with pytest.raises(UserError, match="has a single image and 3 copies of it, and "):
        pack(url, tmp_path / "dst", val=val)
    assert files_in(tmp_path / "dst") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 1.5}, "val 1.5 is not valid: use a fraction between 0 and 1"),
        ({"val": 0}, "val 0 is not valid"),
        ({"val": 1}, "val 1 is not valid"),
        ({"val": -0.1}, "val -0.1 is not valid"),
        ({"val": float("nan")}, "val nan is not valid"),
        ({"val": "10%"}, "val 10% is not valid"),
        ({"val": True}, "val True is not valid"),
        ({"val_dst": "other"}, "no images for other: set the fraction"),
        ({"val": 1e-9}, "none of the 12 images in .* is for validation with val 1e-09"),
        ({"val": 1 - 1e-9}, "is for training with .*: use a smaller fraction"),
        ({"val": 0.1, "val_dst": "dst/"}, "is the place of the training and of the"),
        ({"val": 0.1, "val_dst": "photos"}, "is in the folder of the images"),
    ],
)
def test_wrong_options_are_a_sentence(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    SHAPES["folder"](Path("."), images(4))
    with pytest.raises(UserError, match=message):
        pack("photos", "dst", **options)
    # The next try may have other options.
    assert pack("photos", "dst", val=0.5).val is not None


def test_images_of_which_none_decodes(tmp_path):
    url = SHAPES["folder"](
        tmp_path, [image._replace(data=b"junk") for image in images(3)]
    )
    with pytest.raises(UserError, match="none of the 9 images in .* could be decoded"):
        pack(url, tmp_path / "dst", val=0.5)
    assert files_in(tmp_path / "dst") == {}


def test_a_damaged_row_group_is_rejected_once(tmp_path, monkeypatch):
    """As a whole, with its rows, by the training side."""
    url = SHAPES["hub"](tmp_path, images(20))
    # Bytes in the middle of the first row group's images.
    file = Path(url) / "train-00001-of-00003.parquet"
    data = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(0).column(1).data_page_offset
    data[start : start + 40] = bytes(40)
    file.write_bytes(data)
    packed = pack(url, tmp_path / "dst", val=0.4)
    assert packed.val is not None
    assert [reject.num_images for reject in packed.rejects] == [7]
    assert packed.val.rejects == []
    assert packed.manifest.num_rows + packed.val.manifest.num_rows == 53


def test_classes_of_another_data_set(tmp_path):
    """Both sides have its classes, one of which has no image here."""
    photos: Sequence[Labeled] = images(8)
    whole = SHAPES["folder"](tmp_path / "whole", photos)
    pack(whole, tmp_path / "reference")
    part = SHAPES["folder"](tmp_path / "part", [p for p in photos if p.label != 1])
    packed = pack(part, tmp_path / "dst", val=0.4, classes_of=tmp_path / "reference")
    assert packed.val is not None
    assert packed.manifest.classes == packed.val.manifest.classes == CLASSES
    assert {*rows_of(tmp_path / "dst/val").values()} <= {0, 2}


def test_turned_copies_are_equal(tmp_path):
    """Equal pixels are those of the upright image."""
    photos = tmp_path / "photos"
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(12):
        pixels = picture(i, 30, 40)
        for name, data in (
            ("a", encoded(pixels, "PNG")),
            ("b", encoded(pixels[::-1, ::-1], "PNG", exif=exif)),
        ):
            (photos / name).mkdir(parents=True, exist_ok=True)
            (photos / name / f"{i}.png").write_bytes(data)
    packed = pack(photos, tmp_path / "dst", val=0.5)
    assert packed.split is not None
    assert packed.split.num_followers == 12
    assert packed.split.val[0] == packed.split.val[1]
    for side in ("train", "val"):
        names = names_of(tmp_path / "dst" / side)
        assert {n[2:] for n in names if n < "b"} == {n[2:] for n in names if n > "b"}
