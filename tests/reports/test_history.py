import math

import pytest
from records import eval_record, train_record
from run_dirs import write_run

from distrain.errors import UserError
from distrain.reports import history as history_module
from distrain.reports.history import read_history


def test_a_later_attempt_replaces_what_it_rolled_back(tmp_path):
    run = write_run(
        tmp_path / "run",
        [
            [train_record(step=s, loss=1.0) for s in (2, 4, 6)] + [eval_record(step=6)],
            [train_record(step=4, loss=2.0)],
        ],
        starts=[0, 2],
    )
    history = read_history(str(run))
    assert [(r.step, r.loss) for r in history.train] == [(2, 1.0), (4, 2.0)]
    assert history.evals == ()
    assert history.steps_per_epoch == 10
    (event,) = history.events
    assert (event.step, event.attempt, event.kind) == (2, 2, "restart")
    assert "power <cut>" in event.text
    assert history.state == "finished: 40 steps"


@pytest.mark.parametrize("logged", [[], [8]])
def test_what_is_computed_again_counts_only_when_it_was_logged(tmp_path, logged):
    run = write_run(
        tmp_path / "run",
        [
            [train_record(step=s) for s in (2, 4, 6)],
            [train_record(step=s) for s in logged],
        ],
        starts=[0, 2],
    )
    assert [r.step for r in read_history(str(run)).train] == [2, *logged]


def test_resizes_and_resumes_are_told_apart(tmp_path):
    run = write_run(tmp_path / "run", [[], []], starts=[0, 5], workers=3)
    (event,) = read_history(str(run)).events
    assert (event.kind, event.text.split(";")[0]) == (
        "resize",
        "attempt 2 starts after step 5 on 3 workers, instead of 1",
    )


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
def test_damaged_lines_are_counted_and_the_others_read(
    tmp_path, monkeypatch, read_bytes
):
    monkeypatch.setattr(history_module, "_READ_BYTES", read_bytes)
    records = [train_record(step=1), train_record(step=2, loss=math.nan)]
    run = write_run(tmp_path / "run", [records])
    with (run / "metrics-001.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"kind": "train"}\n{"kind": "tr')
    history = read_history(str(run))
    assert [r.step for r in history.train] == [1, 2]
    assert math.isnan(history.train[1].loss)
    assert history.num_damaged_lines == 4
    assert "4 lines of the metrics files are damaged and left out" in history.problems


def test_a_run_that_has_only_a_config_is_one(tmp_path):
    run = write_run(tmp_path / "run", [])
    history = read_history(str(run))
    assert (history.train, history.steps_per_epoch, history.state) == (
        (),
        None,
        "not started",
    )
    assert history.problems == ("there is no complete checkpoint",)
    assert history.config["schedule.lr"] == 0.1


@pytest.mark.parametrize("text", ["a: [", "", "\xff", "just text"])
def test_a_damaged_config_is_a_problem(tmp_path, text):
    run = write_run(tmp_path / "run", [[train_record(step=1)]])
    (run / "config.yaml").write_bytes(text.encode("latin-1"))
    history = read_history(str(run))
    assert history.config == {}
    assert history.problems[0].startswith("config.yaml")
    (run / "config.yaml").unlink()
    assert read_history(str(run)).problems[0] == "config.yaml is missing"


def test_divergence_and_secrets(tmp_path):
    run = write_run(tmp_path / "run", [[train_record(step=1)]])
    (run / "not-finite-step-00000002.json").write_text("{}")
    with (run / "config.yaml").open("a") as file:
        file.write("log:\n  mlflow: http://me:secret@host/x\n")
    history = read_history(str(run))
    assert history.problems[-1] == (
        "training diverged: not-finite-step-00000002.json holds the evidence"
    )
    assert history.config["log.mlflow"] == "http://host/x"


def test_a_trained_run_is_read(trained):
    history = read_history(str(trained.run))
    assert list(history.evals) == trained.records
    assert history.problems == ()
    assert history.checkpoint_state["step"] == history.evals[-1].step
    assert history.steps_per_epoch == history.evals[0].step


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_is_a_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name} is not a run directory"):
        read_history(str(tmp_path / name))


def test_an_exported_model_has_no_history(tmp_path):
    for name in ("config.yaml", "export.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="is an exported model, which has no history"):
        read_history(str(tmp_path))
