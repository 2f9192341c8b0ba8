"""What pack says of images that it divides."""

import numpy as np

from distrain.cli.pack_report import describe_split
from distrain.data.prepare.validation_rows import SplitCounts


def write_images(folder, count):
    """Three images of each picture, in a format that no codec's version changes."""
    for i in range(count):
        pixels = np.random.default_rng(i // 3).bytes(12 * 12 * 3)
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.ppm").write_bytes(b"P6 12 12 255\n" + pixels)


def test_pack_divides_a_folder(distrain, tmp_path):
    write_images(tmp_path / "src", 24)
    (tmp_path / "src/a/junk.jpg").write_bytes(b"junk")
    target = tmp_path / "dst"
    command = ("pack", str(tmp_path / "src"), str(target), "--val", "0.4")
    code, out, err = distrain(*command, "--geometry", "square:8", "--max-rejects", "1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    stages = [line.partition(":")[0] for line in lines[1:] if "left" in line]
    assert [*dict.fromkeys(stages)] == ["hashing", "training", "validation"]
    start = next(i for i, line in enumerate(lines) if "in 1 shard" in line)
    assert lines[start:] == [
        f"18 images of 2 classes in 1 shard in {target}/train",
        f"6 images of 2 classes in 1 shard in {target}/val",
        "validation   6 of 24 images (25.0%)",
        "validation   3 of 12 images (25.0%): a",
        "validation   3 of 12 images (25.0%): b",
        "note         16 images follow an equal one, so that no image is on both sides",
        f"train with data.train={target}/train data.val={target}/val",
        "rejected     1 x the image format is not recognized: a/junk.jpg",
        f"1 rejected in total, listed in {target}/train/rejects.jsonl",
    ]

    # Once more, and with another fraction.
    code, out, err = distrain(*command, "--geometry", "square:8")
    assert code == 1
    assert out.count("complete already") == 2
    assert "1 rejected in total" in err
    code, _, err = distrain(*command[:-1], "0.2", "--geometry", "square:8")
    assert (code, "holds a data set already" in err) == (2, True)


def test_a_percentage_is_no_fraction(distrain, tmp_path):
    code, _, err = distrain("pack", "src", str(tmp_path), "--val", "10%")
    assert code == 2
    assert "10% is no number: use a fraction, such as 0.1" in " ".join(err.split())
    code, _, err = distrain("pack", "src", str(tmp_path), "--val", "10")
    assert code == 2
    assert "val 10.0 is not valid: use a fraction between 0 and 1, such as 0.1" in err
    code, _, err = distrain("pack", "src", str(tmp_path), "--val-dst", "val")
    assert code == 2
    assert "there are no images for val: set the fraction" in err


def test_many_classes_are_a_summary():
    classes = [f"c{i}" for i in range(30)]
    counts = SplitCounts((9,) * 24 + (10,) * 6, (1,) * 23 + (3,) + (0,) * 6, 0)
    assert describe_split(counts, classes) == [
        "validation   26 of 302 images (8.6%)",
        "validation   per class: 0.0% to 25.0%, median 10.0%",
        "note         6 classes have no validation image: c24, c25, c26, c27, c28, ...",
    ]


def test_classes_without_an_image_of_a_side_are_named():
    lines = describe_split(SplitCounts((0, 3, 5, 0), (2, 0, 1, 0), 1), list("abcd"))
    assert lines == [
        "validation   3 of 11 images (27.3%)",
        "validation   2 of 2 images (100.0%): a",
        "validation   0 of 3 images (0.0%): b",
        "validation   1 of 6 images (16.7%): c",
        "note         1 image follows an equal one, so that no image is on both sides",
        "note         1 class has no validation image: b",
        "note         1 class has no training image: a",
    ]
