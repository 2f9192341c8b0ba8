import pytest
from records import eval_record, train_record
from run_dirs import write_run

import distrain
from distrain.errors import UserError


@pytest.fixture
def runs(tmp_path):
    records = [train_record(step=1), eval_record(step=1, top1=0.25)]
    better = [train_record(step=1), eval_record(step=1, top1=0.75)]
    return [
        write_run(tmp_path / "a", [records], lr=0.1),
        write_run(tmp_path / "b", [better], lr=0.2),
    ]


def test_numbers_and_what_differs_and_nothing_else(runs, tmp_path):
    comparison = distrain.compare(runs, to=tmp_path / "x.html")
    assert comparison.names == ("a", "b")
    assert [numbers.val_top1 for numbers in comparison.numbers] == [0.25, 0.75]
    ((key, values),) = comparison.differences
    assert (key, values) == ("schedule.lr", ("0.1", "0.2"))
    page = comparison.path.read_text()
    assert "75.00%" in page
    assert "schedule.lr" in page
    assert "schedule.name" not in page
    assert 'id="loss-1-figure_1"' in page


def test_runs_of_one_name_are_told_apart_by_their_urls(tmp_path):
    records = [train_record(step=1)]
    runs = [write_run(tmp_path / x / "run", [records]) for x in "ab"]
    comparison = distrain.compare(runs, to=tmp_path / "x.html")
    assert comparison.names == tuple(map(str, runs))
    assert comparison.differences == ()
    assert "The configs are the same." in comparison.path.read_text()


def test_a_comparison_needs_two_runs(runs):
    for one in (runs[:1], str(runs[0])):
        with pytest.raises(UserError, match="needs at least two runs"):
            distrain.compare(one)


def test_many_runs_and_runs_without_steps(tmp_path):
    runs = [write_run(tmp_path / f"r{i}", [[train_record(step=1)]]) for i in range(10)]
    empty = [write_run(tmp_path / f"e{i}", []) for i in range(2)]
    assert len(distrain.compare(runs, to=tmp_path / "x.html").numbers) == 10
    page = distrain.compare(empty, to=tmp_path / "x.html").path.read_text()
    assert "No run has logged a step yet." in page


def test_problems_name_the_run(runs, tmp_path):
    (runs[1] / "config.yaml").write_text("")
    problems = distrain.compare(runs, to=tmp_path / "x.html").problems
    assert any(p.startswith("b: config.yaml cannot be read") for p in problems)
