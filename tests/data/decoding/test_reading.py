"""How files are read is versioned: sets indexed before keep their pixels, new ones are read as pack reads them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from exif import orientation, with_segments
from photos import STATISTICS, encoded, open_set, picture
from shapes import tar_of
from test_loader import by_id, deliver, requests

from distrain.data.decoding.image import decode_rgb
from distrain.data.prepare.commands import index, pack
from distrain.data.prepare.examine import verify
from distrain.data.shards.manifest import MANIFEST_FILE, READING

LIMIT = 1_000_000
AUGMENT = {"crop": 64, "short_side": 72}
BACKENDS = ("dali", "torch")


def cmyk_without_adobe(pixels: np.ndarray) -> bytes:
    """A CMYK JPEG without its APP14 segment: DALI and PIL make negatives of each other."""
    data = encoded(pixels, mode="CMYK", quality=95)
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return data[:start] + data[start + 2 + length :]


PLAIN = encoded(picture(0, 60, 90), quality=95)
FILES = {
    "upright": PLAIN,
    "turned": with_segments(encoded(picture(1, 60, 90), quality=95), orientation(6)),
    "mirrored": with_segments(encoded(picture(2, 60, 90), quality=95), orientation(2)),
    "upright by EXIF": with_segments(PLAIN, orientation(1)),
    "cmyk": cmyk_without_adobe(picture(3, 60, 90)),
    "png": encoded(picture(4, 60, 90), "PNG"),
}
NAMES = list(FILES)


def write_tar(folder: Path) -> str:
    folder.mkdir()
    members = [
        member
        for i, data in enumerate(FILES.values())
        for member in ((f"{i}.jpg", data), (f"{i}.cls", b"%d" % (i % 2)))
    ]
    (folder / "x.tar").write_bytes(tar_of(members))
    return str(folder / "x.tar")


def delivered(narrow, folder, backend: str) -> dict[int, torch.Tensor]:
    config = narrow(augment=AUGMENT, data={"backend": backend})
    dataset = open_set(folder)
    batches = deliver(config, dataset, requests(range(len(FILES)), 3), 3, False)
    return by_id(batches)


def make_old(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Rewrite a manifest as an earlier version wrote it for the same files."""
    from distrain.data.shards.entries import RowIndex

    tree = json.loads((folder / MANIFEST_FILE).read_text())
    assert tree.pop("reading") == READING
    tree["format"] = "distrain-shards-2"
    del tree["pixel_hash"]
    ((shard,),) = (tree["shards"],)
    (group,) = shard["groups"]
    del group["pixel_hashes"]
    found = RowIndex.from_dict(group["index"])
    fields = {
        **vars(found),
        "height": np.array(sizes)[:, 0],
        "width": np.array(sizes)[:, 1],
    }
    group["index"] = RowIndex(**fields).to_dict()
    (folder / MANIFEST_FILE).write_text(json.dumps(tree))


@pytest.fixture
def indexed(tmp_path):
    source = write_tar(tmp_path / "source")
    result = index(source, to=tmp_path / "new", processes=1)
    assert result.rejects == []
    assert result.num_turned == 2
    return tmp_path / "new"


def test_index_and_pack_give_the_same_pixels_in_both_backends(indexed, narrow):
    """As validation data are packed and training data indexed."""
    source = str(indexed.parent / "source" / "x.tar")
    pack(source, indexed.parent / "packed", geometry="keep", quality=100, processes=1)
    packed = delivered(narrow, indexed.parent / "packed", "torch")
    rows = open_set(indexed.parent / "packed").read_rows(np.arange(len(FILES)))
    # pack shuffles: find each file's row by its upright pixels.
    stored = [decode_rgb(bytes(row.data), LIMIT).astype(int) for row in rows]
    for backend in BACKENDS:
        found = delivered(narrow, indexed, backend)
        for i, data in enumerate(FILES.values()):
            upright = decode_rgb(data, LIMIT)
            distances = [
                np.abs(pixels - upright).mean()
                if pixels.shape == upright.shape
                else 255
                for pixels in stored
            ]
            difference = found[i] - packed[int(np.argmin(distances))]
            off = difference.abs().numpy() * STATISTICS.std[:, None, None]
            assert off.mean() < 2, (backend, NAMES[i])


def test_verify_knows_the_size_of_turned_images(indexed):
    assert verify(indexed).problems == []
    rows = open_set(indexed).read_rows(np.arange(len(FILES)))
    assert [row.image_size for row in rows] == [
        (90, 60) if name == "turned" else (60, 90) for name in NAMES
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_set_indexed_before_keeps_its_pixels(indexed, narrow, backend):
    """Whatever they were: sideways, and DALI's negative of CMYK."""
    new = delivered(narrow, indexed, backend)
    fingerprint = open_set(indexed).manifest.fingerprint
    make_old(indexed, [(60, 90)] * len(FILES))
    old = open_set(indexed)
    assert old.manifest.reading == 1
    assert old.manifest.fingerprint != fingerprint
    assert verify(indexed).problems == []
    found = delivered(narrow, indexed, backend)

    # The same as the files without their EXIF.
    turned_free = encoded(picture(1, 60, 90), quality=95)
    mirrored_free = encoded(picture(2, 60, 90), quality=95)
    plain = dict(FILES, turned=turned_free, mirrored=mirrored_free)
    members = [
        member
        for i, data in enumerate(plain.values())
        for member in ((f"{i}.jpg", data), (f"{i}.cls", b"%d" % (i % 2)))
    ]
    other = indexed.parent / "plain"
    other.mkdir()
    (other / "x.tar").write_bytes(tar_of(members))
    index(str(other / "x.tar"), to=other / "index", processes=1)
    expected = delivered(narrow, other / "index", backend)
    for i, name in enumerate(NAMES):
        if name != "cmyk":
            assert torch.equal(found[i], expected[i]), name
    is_changed = [not torch.equal(found[i], new[i]) for i in range(len(FILES))]
    cmyk_changes = backend == "dali"
    assert is_changed == [False, True, True, False, cmyk_changes, False]
