"""What the commands say about images that are turned, or that are none."""

import json

import pytest
import shapes
from exif import orientation, with_segments
from photos import encoded, picture


def test_index_counts_the_images_that_it_turns(distrain, tmp_path):
    jpeg = encoded(picture(0, 40, 60))
    files = [
        jpeg,
        with_segments(jpeg, orientation(6)),
        encoded(picture(1, 9, 9), "PNG"),
    ]
    members = [
        member
        for i, data in enumerate(files)
        for member in ((f"{i}.jpg", data), (f"{i}.cls", b"%d" % (i % 2)))
    ]
    (tmp_path / "x.tar").write_bytes(shapes.tar_of(members))
    code, out, err = distrain("index", str(tmp_path / "x.tar"))
    assert (code, err) == (0, "")
    assert (
        "note         1 of 3 images turned upright by EXIF whenever they are read, which "
        "takes CPU time: distrain pack stores them so"
    ) in out.splitlines()


def test_what_is_no_image_is_named(distrain, tmp_path):
    files = {
        "a/empty.jpg": (b"", "no bytes"),
        "a/page.jpg": (b"<html>", "an HTML page, not an image: download it again"),
        "b/photo.heic": (
            b"\0\0\0\x18ftypheic" + bytes(20),
            "HEIC is not read: convert it to JPEG or PNG",
        ),
        "a/0.jpg": (encoded(picture(0, 40, 60)), None),
        "b/1.avif": (encoded(picture(1, 40, 60), "AVIF"), None),
    }
    for name, (data, _) in files.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(data)
    arguments = (str(tmp_path / "src"), str(tmp_path / "dst"), "--processes", "1")
    code, out, _ = distrain("pack", *arguments, "--max-rejects", "3")
    assert code == 0
    lines = (tmp_path / "dst/rejects.jsonl").read_text().splitlines()
    rejects = {tree["path"]: tree["reason"] for tree in map(json.loads, lines)}
    assert rejects == {k: reason for k, (_, reason) in files.items() if reason}
    assert "2 images of 2 classes in 1 shard" in out.splitlines()


@pytest.mark.parametrize("name", ["x.tar", "*.tar"])
def test_the_source_is_named_as_it_was_given(distrain, tmp_path, monkeypatch, name):
    """A file beside others, not their folder."""
    monkeypatch.chdir(tmp_path)
    members = [(f"{folder}/1.jpg", encoded(picture(0, 9, 9))) for folder in "ab"]
    (tmp_path / "x.tar").write_bytes(shapes.tar_of(members))
    (tmp_path / "y.parquet").write_bytes(b"x")
    _, out, _ = distrain("pack", name, "dst")
    first = out.splitlines()[0]
    assert first == f"archive of class folders: 2 images of 2 classes in {name}"
