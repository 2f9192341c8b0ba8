"""The parts of a report that need the model and the data."""

import re
import shutil

import numpy as np
import pytest
from photos import STATISTICS, encoded, picture, true_size
from sets import SetWriter

import distrain
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.reports.model_sections import find_nearest


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    return distrain.report(trained.run, to=tmp_path_factory.mktemp("r") / "x.html")


@pytest.fixture(scope="module")
def page(written):
    return written.path.read_text()


@pytest.fixture(scope="module")
def evaluation(trained):
    return distrain.evaluate(trained.run)


def section(page, name):
    return page.partition(f'<section id="{name}"')[2].partition("</section>")[0]


def test_numbers_are_those_of_eval(written, page, evaluation):
    assert written.evaluation.to_dict() == evaluation.to_dict()
    assert written.problems == ()
    text = section(page, "classes")
    assert f"{evaluation.result.top1:.2%}" in text
    interval = evaluation.top1_interval
    assert f"{interval.low:.2%} to {interval.high:.2%}" in text
    pair = evaluation.count_confusions()[0]
    row = f"<td>{pair.label}</td><td>{pair.predicted}</td>"
    assert f'{row}<td class="number">{pair.num_samples}</td>' in text
    assert "confusion-figure_1" in text


def test_a_set_whose_images_must_be_resized(trained, tmp_path):
    files = [encoded(picture(i, 70 + 7 * i, 300 - 8 * i)) for i in range(20)]
    writer = SetWriter(Store(str(tmp_path / "set")), list("0123456789"), None)
    for i, data in enumerate(files):
        writer.add(data, i % 10, f"{i}.jpg", true_size(data))
    writer.finish(STATISTICS)
    written = distrain.report(
        trained.run, to=tmp_path / "x.html", data=tmp_path / "set"
    )
    assert written.problems == ()
    neighbors = section(written.path.read_text(), "neighbors")
    assert neighbors.count("<img") == 5 * 7


def test_best_worst_and_typical_images(page, evaluation):
    losses = np.sort(evaluation.images.losses)
    shown = re.findall(r"<small>loss ([\d.]+)</small>", section(page, "images"))
    middle = (len(losses) - 5) // 2
    expected = [*losses[:5], *losses[middle : middle + 5], *losses[::-1][:5]]
    assert shown == [f"{loss:.4f}" for loss in expected]


def test_suspicious_labels_say_where_they_are(page, evaluation, digits):
    images = evaluation.images
    wrong = np.flatnonzero(images.ranks > 0)
    first = wrong[images.top_probabilities[wrong, 0].argmax()]
    place = Dataset.open(digits / "val").describe_sample(int(images.sample_ids[first]))
    places = re.findall(r"<small>(.*?)</small>", section(page, "labels"))
    assert places[0] == place
    assert len(places) == 20


def test_neighbors_and_filters_are_shown(page):
    assert section(page, "neighbors").count("<img ") == 5 * 7
    assert 'alt="8 filters of 11 x 11 pixels"' in section(page, "filters")


def test_the_time_of_each_phase_was_logged(page):
    text = section(page, "time")
    phases = (
        "waiting for data",
        "transfer",
        "forward",
        "backward",
        "reduction",
        "optimizer",
        "checkpoint",
    )
    for phase in phases:
        assert f">{phase}</text>" in text, phase


def test_the_hash_of_the_weights_is_there(page, evaluation):
    assert evaluation.origins[0].weights in section(page, "origin")


def test_nearest_rows_without_the_row_itself():
    features = np.array([[0], [10], [1], [0], [-3]], np.float32)
    assert find_nearest(features, 0, 3) == [3, 2, 4]
    assert find_nearest(features, 1, 9) == [2, 0, 3, 4]


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained.run, tmp_path / "run")
    return tmp_path / "run"


def test_a_data_set_that_is_gone_is_said_and_the_rest_is_there(
    copied, tmp_path, digits
):
    (digits / "val").rename(digits / "val.away")
    try:
        written = distrain.report(copied, to=tmp_path / "x.html")
    finally:
        (digits / "val.away").rename(digits / "val")
    (problem,) = written.problems
    assert problem.startswith("there is no evaluation: ")
    assert written.evaluation is None
    page = written.path.read_text()
    assert 'id="filters"' in page
    assert 'id="labels"' not in page


def test_a_given_data_set_must_be_there(copied, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        distrain.report(copied, to=tmp_path / "x.html", data=tmp_path / "nowhere")
    assert not (tmp_path / "x.html").exists()


def test_another_data_set_and_checkpoint(copied, tmp_path, digits, trained):
    step = trained.records[0].step
    written = distrain.report(
        copied, to=tmp_path / "x.html", data=digits / "val", checkpoint=step
    )
    assert written.evaluation.result.top1 == trained.records[0].top1


def test_damaged_checkpoints_are_said(copied, tmp_path):
    for file in (copied / "checkpoints").glob("step-*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    written = distrain.report(copied, to=tmp_path / "x.html")
    assert written.problems[-1].startswith("the model is not shown: all checkpoints")
    assert 'id="filters"' not in written.path.read_text()


def test_curves_alone(copied, tmp_path):
    written = distrain.report(copied, to=tmp_path / "x.html", curves_only=True)
    assert written.evaluation is None
    assert written.problems == ()
    assert 'id="filters"' not in written.path.read_text()
