"""What verify and inspect print of equal images."""

import json
import sys

import pytest
from hashed_sets import write
from photos import encoded, picture

from distrain.data.prepare.commands import pack
from distrain.data.shards.manifest import MANIFEST_FILE


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed, 40, 60))


@pytest.fixture
def sets(tmp_path):
    train = {f"{c}/{i}.jpg": jpeg(ord(c) + 40 * i) for c in "ab" for i in range(3)}
    val = {f"{c}/{i}.jpg": jpeg(1000 + ord(c)) for c in "ab" for i in range(1)}
    for name, files in (("train", train), ("clean", val)):
        pack(
            write(tmp_path / "photos" / name, files),
            tmp_path / name,
            geometry="square:16",
            processes=1,
        )
    leaking = {**val, "a/x.jpg": train["a/1.jpg"], "b/y.jpg": train["a/1.jpg"]}
    source = write(tmp_path / "photos/leaking", leaking)
    pack(source, tmp_path / "leaking", geometry="square:16", processes=1)
    return tmp_path


def test_a_leak_ends_with_exit_code_1(distrain, sets, monkeypatch):
    monkeypatch.chdir(sets)
    code, out, err = distrain("verify", "leaking", "--against", "train")
    assert code == 1
    assert (
        "error: 2 images are in both leaking and train, see above: remove them" in err
    )
    # After the line of the progress.
    leaks, copies, other_copies, conflicts, size = out.splitlines()[1:]
    assert leaks.startswith("leaks        2 images of leaking also in train: leaking ")
    assert "leaking a/x.jpg = train a/1.jpg" in leaks
    assert copies.startswith(
        "duplicates   1 image of leaking equal to an earlier one: "
    )
    assert other_copies == "duplicates   0 images of train equal to an earlier one"
    # One of the three images is of the other class, and the first may be that one.
    assert conflicts.startswith("conflicts    ")
    assert "leaking b/y.jpg (b)" in conflicts
    assert size == "4 images in 1 shard: 0 problems"


def test_sets_without_a_common_image_end_with_exit_code_0(distrain, sets, monkeypatch):
    monkeypatch.chdir(sets)
    code, out, err = distrain("verify", "clean", "--against", "train")
    assert (code, err) == (0, "")
    assert out.splitlines()[1:] == [
        "leaks        0 images of clean also in train",
        "duplicates   0 images of clean equal to an earlier one",
        "duplicates   0 images of train equal to an earlier one",
        "conflicts    0 images equal to an earlier one of another class",
        "2 images in 1 shard: 0 problems",
    ]


def test_duplicates_within_a_set_are_no_problem(distrain, sets, monkeypatch):
    monkeypatch.chdir(sets)
    for command in (["verify", "leaking"], ["inspect", "leaking"]):
        code, out, err = distrain(*command)
        assert (code, err) == (0, "")
        (copies,) = [line for line in out.splitlines() if line.startswith("dup")]
        assert copies.startswith(
            "duplicates   1 image of leaking equal to an earlier one: "
        )
        (conflicts,) = [line for line in out.splitlines() if line.startswith("conf")]
        assert (
            "conflicts    1 image equal to an earlier one of another class: "
            in conflicts
        )


def test_near_duplicates_are_printed_when_asked_for(distrain, sets, monkeypatch):
    monkeypatch.chdir(sets)
    code, out, err = distrain("verify", "clean", "--against", "train", "--near")
    assert (code, err) == (0, "")
    assert "near leaks   0 images of clean similar to one of train" in out.splitlines()
    assert "near         0 images of clean similar to another one" in out.splitlines()
    code, out, err = distrain("inspect", "clean", "--near")
    assert (code, err) == (0, "")
    assert "near         0 images of clean similar to another one" in out.splitlines()
    monkeypatch.setitem(sys.modules, "imagehash", None)
    for command in (["verify", "clean"], ["inspect", "clean"]):
        code, out, err = distrain(*command, "--near")
        assert (code, out) == (2, "")
        assert "needs ImageHash: pip install 'distrain[near]'" in err


def test_a_set_without_hashes_is_a_note_or_cannot_be_compared(
    distrain, sets, monkeypatch
):
    monkeypatch.chdir(sets)
    tree = json.loads((sets / "train" / MANIFEST_FILE).read_text())
    del tree["pixel_hash"]
    (sets / "train" / MANIFEST_FILE).write_text(json.dumps(tree))
    sentence = (
        "train has no hashes of pixels, by which equal images are found: pack or index "
        "it again"
    )
    for command in ("verify", "inspect"):
        code, out, err = distrain(command, "train")
        assert (code, err) == (0, "")
        assert f"note         {sentence}" in out.splitlines()
        assert "duplicates" not in out
    for urls in (("clean", "train"), ("train", "clean")):
        code, out, err = distrain("verify", urls[0], "--against", urls[1])
        assert (code, out) == (2, "")
        assert sentence in err


def test_problems_come_before_leaks(distrain, sets, monkeypatch):
    """And images that look alike are not looked for in damaged files."""
    monkeypatch.chdir(sets)
    (sets / "leaking/shard-00000.parquet").write_bytes(b"x")
    code, out, err = distrain("verify", "leaking", "--against", "train", "--near")
    assert code == 1
    assert "leaks        2 images of leaking also in train: " in out
    assert "near-duplicates were not looked for, since leaking has problems" in out
    assert "leaking does not match its manifest" in err
