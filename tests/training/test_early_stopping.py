"""A run ends when validation has not improved for some epochs, and is trained on when more are allowed."""

import json
from pathlib import Path

import pytest
import torch

import distrain.training.validate
from distrain.config import override_config
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.launch.launcher import log_summary
from distrain.monitor.run_state import read_run_state
from distrain.optim.early_stopping import StopConfig, StopState
from distrain.trainer import train
from distrain.training.evaluate import EvalResult

# Correct images after each epoch: the highest count so far is that of the epochs 1, 2 and 6.
COUNTS = [3, 5, 5, 4, 5, 6, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("patience", "ends_after"),
    [(1, 3), (2, 4), (3, 5), (4, 10), (6, 12), (7, None), (None, None)],
)
def test_when_it_is_over(patience, ends_after):
    state = StopState()
    ends = []
    for epoch, count in enumerate(COUNTS, 1):
        state = state.update(count)
        if state.is_over(StopConfig(patience=patience)):
            ends.append(epoch)
    assert (ends or [None])[0] == ends_after


@pytest.fixture
def evaluated(monkeypatch):
    """The steps of evaluations, which give the counts above at the ends of epochs, and more in between."""
    steps = []

    def evaluate(job, dataset):
        step = job.progress.step
        steps.append(step)
        count = COUNTS[step // 5 - 1] if step % 5 == 0 else 9
        return EvalResult(12, count, 10, 1.0, {})

    monkeypatch.setattr(distrain.training.validate, "evaluate_dataset", evaluate)
    return steps


@pytest.fixture
def make(narrow, tmp_path, damaged_set, evaluated):
    """Makes configs of runs on noise, 5 steps an epoch: (name of the run, patience, further changes)."""
    for split, rows in (("train", 40), ("val", 12)):
        damaged_set(tmp_path / split, bad=set(), rows=rows)

    def config(folder, patience, **changes):
        settings = {
            "run": str(tmp_path / folder),
            "epochs": 12,
            "global_batch": 8,
            "virtual_workers": 2,
            "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")},
            "stop": {"patience": patience},
        }
        return narrow(**{**settings, **changes})

    return config


def run(config, console):
    return train(config, World(torch.device("cpu")), console)


def test_a_run_ends_early_and_stays_ended(make, console, evaluated):
    config = make("run", 2)
    summary = run(config, console)
    assert (summary.status, summary.step, summary.steps) == ("finished early", 20, 60)
    assert evaluated == [5, 10, 15, 20]
    store = Store(config.run)
    best = json.loads(store.read("checkpoints/best.json"))
    assert best["checkpoint"] == "step-00000010-attempt-001"
    assert store.exists("checkpoints/step-00000020-attempt-001/manifest.json")
    assert read_run_state(store).text == "finished early: 20 of 60 steps"

    again = run(config, console)
    assert (again.status, again.step) == ("already finished", 20)
    assert again.weights == summary.weights
    assert evaluated == [5, 10, 15, 20]


def test_how_it_is_said(make, console):
    config = make("run", 2)
    log_summary(console, run(config, console), None)
    assert "finished early, after step 20 of 60; this attempt took 0 min" in "\n".join(
        console.events
    )
    log_summary(console, run(config, console), None)
    assert (
        f"{config.run} is already finished: it ended early after step 20 of 60, since "
        "validation did not improve (to train on, raise stop.patience). To start afresh, "
        "name another run directory: run=..."
    ) in console.events


def test_a_raised_patience_is_a_run_of_that_patience(make, console):
    """Step by step; more epochs alone change nothing, since the patience is over."""
    whole = run(make("whole", 4), console)
    assert (whole.status, whole.step) == ("finished early", 50)
    parts = make("parts", 2)
    assert run(parts, console).step == 20
    more = override_config(parts, ["epochs=13"])
    assert (run(more, console).status, run(more, console).step) == (
        "already finished",
        20,
    )
    for patience, step in ((3, 25), (4, 50)):
        summary = run(override_config(parts, [f"stop.patience={patience}"]), console)
        assert (summary.status, summary.step) == ("finished early", step)
    assert summary.weights == whole.weights
    # Without any, to the end; and a lower one finds that it is over.
    summary = run(override_config(parts, ["stop.patience=null"]), console)
    assert (summary.status, summary.step) == ("finished", 60)


@pytest.mark.parametrize("stops_at", [7, 12, 15, 19])
def test_a_resume_ends_at_the_same_step(make, console, stops_at):
    """Evaluations within epochs do not count, however often they are."""
    whole = run(make("whole", 2), console)
    config = make("parts", 2, evaluate={"every": 4}, checkpoint={"every": 100})
    world = World(torch.device("cpu"))
    console.set_step = lambda done: (
        world.stop_requested.set() if done == stops_at - 1 else None
    )
    assert train(config, world, console).status == "stopped"
    found = run(config, console)
    assert (found.status, found.step) == ("finished early", 20)
    assert found.weights == whole.weights
    # Its last step is saved, although no checkpoint is due.
    last = f"{config.run}/checkpoints/step-00000020-attempt-002/manifest.json"
    assert Path(last).exists()


def test_another_validation_set_begins_to_count_anew(
    make, console, tmp_path, damaged_set
):
    config = make("run", 2)
    assert run(config, console).step == 20
    damaged_set(tmp_path / "other", bad=set(), rows=11)
    other = override_config(config, [f"data.val={tmp_path}/other"])
    # The counts of the epochs 5, 6, 7 and 8 are 5, 6, 1 and 2.
    summary = run(other, console)
    assert (summary.status, summary.step) == ("finished early", 40)


def test_it_wants_a_validation_set(make):
    with pytest.raises(UserError) as caught:
        make("run", 2, data={"train": "a"})
    assert str(caught.value).endswith(
        "stop: patience counts epochs without better validation: set data.val"
    )
    with pytest.raises(
        UserError, match="stop.patience: must be greater than or equal to 1"
    ):
        make("run", 0)
