"""`distrain report` and `distrain compare` as they are typed."""

import pytest


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(trained.run)
    return tmp_path


def test_a_report_is_written(distrain, folder):
    code, out, err = distrain("report", "a")
    assert code == 0
    assert "359 of 359 images" in err
    assert out.startswith("wrote a-report.html (0.")
    assert "</html>" in (folder / "a-report.html").read_text()


def test_a_comparison_is_printed_and_written(distrain, folder, trained):
    code, out, err = distrain("compare", "a", "b", "--to", "x.html")
    assert (code, err) == (0, "")
    top1 = f"{trained.records[-1].top1:.2%}"
    line = next(x for x in out.splitlines() if x.startswith("validation top-1"))
    assert line.split()[-2:] == [top1, top1]
    assert out.endswith("the configs are the same\nwrote x.html\n")
    assert (folder / "x.html").exists()


def test_problems_go_to_stderr(distrain, folder):
    (folder / "c").mkdir()
    (folder / "c/config.yaml").write_text("epochs: 3")
    code, out, err = distrain("report", "c")
    assert code == 0
    first, second = err.splitlines()
    assert first == "note: there is no complete checkpoint"
    assert second.startswith("note: the model is not shown: c has no complete check")
    code, out, err = distrain("compare", "a", "c")
    assert (code, err) == (0, "note: c: there is no complete checkpoint\n")
    assert "config" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["compare", "a"], "a comparison needs at least two runs"),
        (["compare", "a", "nowhere"], "nowhere is not a run directory"),
        (["report", "a", "--data", "nowhere"], "nowhere"),
        (["report", "a", "--to", "no/x.html"], "no folder no for the report"),
    ],
)
def test_bad_input_is_one_sentence(distrain, folder, arguments, message):
    code, out, err = distrain(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
