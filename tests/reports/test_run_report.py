"""Reports as HTML; `test_browser` looks at them in Chromium."""

import math
import re

import pytest
from records import eval_record, train_record
from run_dirs import write_run

import distrain
from distrain.errors import UserError


def make_records(n=10):
    return [
        record
        for step in range(1, n + 1)
        for record in (
            train_record(
                step=step, epoch=step // 10, loss=1 / step, bad_samples=step // 5
            ),
            eval_record(step=step, top1=step / 100),
        )
    ]


def test_the_page_has_the_numbers_that_the_run_logged(tmp_path):
    run = write_run(
        tmp_path / "run", [make_records(4), make_records(10)], starts=[0, 2]
    )
    written = distrain.report(run, to=tmp_path / "x.html")
    page = written.path.read_text()
    assert written.numbers.val_top1 == 0.1
    assert (written.numbers.step, written.numbers.best_step) == (10, 10)
    assert "10.00%" in page
    assert "at step 10" in page
    for name in ("loss", "top1", "top5", "rate", "throughput", "waits"):
        assert f'id="{name}-figure_1"' in page
    # What happened to the run, in the legends and in the table.
    assert ">restart<" in page
    assert ">bad samples found<" in page
    assert "power &lt;cut&gt;" in page
    assert "power <cut>" not in page


def test_a_run_of_an_early_version_has_no_phases(tmp_path):
    run = write_run(tmp_path / "old", [[train_record(step=1, phase_seconds={})]])
    page = distrain.report(run, to=tmp_path / "x.html").path.read_text()
    assert "did not log the time of phases" in page
    assert "Throughput" in page


def test_ids_are_unique_and_references_lead_somewhere(tmp_path):
    run = write_run(tmp_path / "run", [make_records()])
    page = distrain.report(run, to=tmp_path / "x.html").path.read_text()
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(#|href="#)([^")]*)', page)
    assert references
    assert set(references) <= set(ids)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run", [make_records()])
    first = distrain.report(run, to=tmp_path / "x.html").path.read_bytes()
    assert distrain.report(run, to=tmp_path / "y.html").path.read_bytes() == first


@pytest.mark.parametrize("losses", [[1.0, math.nan], [math.inf], []])
def test_diverged_and_unfinished_runs_are_reported(tmp_path, losses):
    records = [train_record(step=i + 1, loss=x) for i, x in enumerate(losses)]
    run = write_run(tmp_path / "run", [records], ended=False)
    (run / "not-finite-step-00000002.json").write_text("{}")
    written = distrain.report(run, to=tmp_path / "x.html")
    page = written.path.read_text()
    assert "running: attempt 1" in page
    assert "training diverged" in page
    assert "there is no complete checkpoint" in page
    has_crosses = "training: 1 values are not finite (crosses)." in page
    assert has_crosses == (len(losses) > 0)
    assert ("The run has logged no step yet." in page) == (len(losses) == 0)


def test_names_and_values_cannot_add_markup(tmp_path):
    folder = tmp_path / "<script>alert(1)</script>"
    run = write_run(folder, [make_records(2)])
    with (run / "config.yaml").open("a") as file:
        file.write("data:\n  train: '<b>&\"'\n")
    page = distrain.report(run, to=tmp_path / "x.html").path.read_text()
    assert "<script" not in page
    assert "&lt;b&gt;&amp;&quot;" in page


def test_where_it_is_written(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", [make_records(2)])
    monkeypatch.chdir(tmp_path)
    assert distrain.report(run).path.resolve() == tmp_path / "run-report.html"
    with pytest.raises(UserError, match="is a folder: name an HTML file in it"):
        distrain.report(run, to=tmp_path)
    with pytest.raises(UserError, match="no folder .*nowhere for the report"):
        distrain.report(run, to=tmp_path / "nowhere/x.html")
