"""`distrain eval` and `distrain predict` as they are typed."""

import csv
import io
import json

import pytest

from distrain.cli.after_training import split_overrides
from distrain.data.shards.dataset import Dataset


@pytest.fixture
def run(trained):
    return str(trained.run)


@pytest.fixture
def images(digits, tmp_path):
    dataset = Dataset.open(digits / "val")
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(bytes(dataset[i].data))
    return folder


def test_eval_prints_what_training_reported(distrain, run, trained):
    code, out, err = distrain("eval", run)
    assert code == 0
    record = trained.records[-1]
    assert f"top-1     {record.top1:.2%}  (95% interval " in out
    assert f"loss      {record.loss:.4f}  (cross_entropy)" in out
    assert "359 of 359 images" in err
    assert "\nclasses " in out
    assert "\nconfused " in out
    paths = [run, str(trained.run.parent)]
    shown = [line for line in out.splitlines() if not any(p in line for p in paths)]
    assert max(map(len, shown)) <= 80


def test_json_alone_is_on_stdout_and_always_the_same(distrain, run):
    code, out, _ = distrain("eval", run, "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["images"] == 359
    again = distrain("eval", run, "--json", "lanes=1", "data.read_ahead=4")
    assert again[1] == out


def test_ten_crops_of_two_checkpoints(distrain, run, trained):
    folder = sorted((trained.run / "checkpoints").glob("step-*"))[0]
    code, out, _ = distrain("eval", run, str(folder), "--crops", "ten")
    assert code == 0
    assert out.count("model     ") == 2
    assert "crops     ten, averaged" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lanes=1"], "there is no model to evaluate"),
        (["RUN", "--checkpoint", "7"], "has no complete checkpoint of step 7"),
        (["RUN", "model.width=2"], "decides its weights"),
        (["RUN", "--data", "/nothing"], "no data set at /nothing"),
    ],
)
def test_mistakes_of_eval(distrain, run, arguments, message):
    arguments = [run if a == "RUN" else a for a in arguments]
    code, _, err = distrain("eval", *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


def test_predict_draws_bars(distrain, run, images):
    code, out, err = distrain("predict", run, str(images))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{images}/0.jpg"
    assert len(lines) == 3 * 6
    assert "#" in lines[1]
    assert max(len(line) for line in lines if str(images) not in line) <= 80


def test_predict_as_json_and_csv_has_the_same_numbers(distrain, run, images):
    _, out, _ = distrain("predict", run, str(images), "--json")
    trees = [json.loads(line) for line in out.splitlines()]
    assert [tree["image"] for tree in trees] == [f"{images}/{i}.jpg" for i in range(3)]
    _, out, _ = distrain("predict", run, str(images), "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    for tree, row in zip(trees, rows, strict=True):
        for i, one in enumerate(tree["classes"], 1):
            assert row[f"class_{i}"] == one["class"]
            assert float(row[f"probability_{i}"]) == one["probability"]


def test_predict_goes_on_after_what_is_no_image(distrain, run, images):
    (images / "1.jpg").write_bytes(b"junk" * 99)
    code, out, err = distrain("predict", run, str(images), "--csv")
    assert code == 1
    first, last = err.splitlines()
    assert first == f"{images}/1.jpg: the image format is not recognized"
    assert last.startswith("error: 1 of 3 images cannot be read")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [bool(row["problem"]) for row in rows] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jpg"], "nothing at none.jpg: check the path"),
        (["device=cpu"], "there is nothing to predict"),
        (["x.jpg", "--json", "--csv"], "--json and --csv exclude each other"),
    ],
)
def test_mistakes_of_predict(distrain, run, arguments, message):
    code, _, err = distrain("predict", run, *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert message in line


def test_overrides_among_paths():
    given = ["runs/a", "lanes=1", "./lr=0.1", "s3://b/x?y=1", "data.backend=torch"]
    assert split_overrides(given) == (
        ["runs/a", "./lr=0.1", "s3://b/x?y=1"],
        ["lanes=1", "data.backend=torch"],
    )
