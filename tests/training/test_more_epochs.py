"""`epochs` is raised where the learning rate of a step does not depend on it: 2 + 1 epochs are 3 epochs."""

import json

import pytest
import torch
import yaml

import distrain.training.validate
from distrain.config import parse_config, to_yaml
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.monitor.records import record_to_dict
from distrain.monitor.sinks import read_metrics
from distrain.optim.schedule import ConstantSchedule, Schedule, StepSchedule
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import train
from distrain.training.checkpoint_state import CheckpointState
from distrain.training.evaluate import EvalResult

SCHEDULES = {
    "constant": {"name": "constant", "lr": 0.05, "warmup_epochs": 2.5},
    "step": {"name": "step", "lr": 0.05, "drop_epochs": [1, 2], "warmup_epochs": 0.5},
    "plateau": {"name": "plateau", "lr": 1e-9, "patience": 1, "drops": 2},
}


class Declared(ConstantSchedule):
    """Inherits the rate, and with it what is declared."""


class Forgetful(StepSchedule):
    """Computes the rate anew, and declares nothing."""

    def compute_lr_factor(self, position):
        return 1 - position.decay_fraction


class OwnConstant(Schedule):
    depends_on_length = False

    def compute_lr_factor(self, position):
        return 0.5


def extended(config, epochs):
    tree = yaml.safe_load(to_yaml(config))
    return parse_config(tree, "test", [f"epochs={epochs}"])


@pytest.fixture
def make(narrow, tmp_path, damaged_set):
    """Makes configs of runs on noise, 5 steps an epoch: (name of the run, epochs, further changes)."""
    for split, rows in (("train", 40), ("val", 12)):
        damaged_set(tmp_path / split, bad=set(), rows=rows)

    def config(folder, epochs, **changes):
        return narrow(
            run=str(tmp_path / folder),
            epochs=epochs,
            global_batch=8,
            virtual_workers=2,
            data={"train": str(tmp_path / "train"), "val": str(tmp_path / "val")},
            **changes,
        )

    return config


def stop_at(console, step):
    """A world that is asked to stop after a step."""
    world = World(torch.device("cpu"))
    # A request within a step is heeded after the next one.
    console.set_step = lambda done: (
        world.stop_requested.set() if done == step - 1 else None
    )
    return world


def run(config, console):
    return train(config, World(torch.device("cpu")), console)


def outcome(config):
    """What a run has become, but for the attempts that it took and the time."""
    store = Store(config.run)
    state = load_newest_checkpoint(store)[0].state
    best = json.loads(store.read("checkpoints/best.json"))
    assert store.exists(f"checkpoints/{best['checkpoint']}/manifest.json")
    best["checkpoint"] = best["checkpoint"].partition("-attempt")[0]
    records = {}
    for record in read_metrics(store):
        values = record_to_dict(record)
        names = ("lr", "loss", "top1_count", "top5_count", "samples")
        found = {name: values[name] for name in names if name in values}
        records[record.step, record.kind] = found
    parsed = CheckpointState.from_dict(state)
    return {
        "best": best,
        "state": (parsed.best, parsed.scheduled_best, parsed.plateau, parsed.cursor),
        "result": parsed.result,
        "records": records,
    }


@pytest.mark.parametrize("name", SCHEDULES)
def test_two_epochs_and_one_are_three(make, console, name):
    settings = {
        "schedule": SCHEDULES[name],
        "optimizer": {"name": "sgd", "form": "paper"},
        "log": {"every": 1},
    }

    # Without an end in between.
    whole = make("whole", 3, **settings)
    wanted = run(whole, console).weights

    # Two epochs, then one more that is stopped in its middle.
    config = make("parts", 2, **settings)
    assert run(config, console).status == "finished"
    console.events.clear()
    longer = extended(config, 3)
    stopped = train(longer, stop_at(console, 12), console)
    assert (stopped.status, stopped.step, stopped.steps) == ("stopped", 12, 15)
    assert "epochs is raised from 2 to 3" in console.events
    del console.set_step
    summary = run(longer, console)
    assert (summary.status, summary.weights) == ("finished", wanted)
    assert outcome(longer) == outcome(whole)

    # The run directory says what the run is now, and each attempt's record stays.
    store = Store(config.run)
    assert yaml.safe_load(store.read("config.yaml"))["epochs"] == 3
    attempts = [
        json.loads(store.read(f"attempts/{i:03d}.json"))["steps"] for i in (1, 2, 3)
    ]
    assert attempts == [10, 15, 15]


def test_the_end_of_a_shorter_run_leaves_no_trace_in_the_best(
    make, console, monkeypatch
):
    """It was evaluated only because it was the end; the best before it is kept and comes back."""
    counts = {4: 5, 8: 3, 10: 9, 12: 4, 15: 2}
    evaluated = []

    def evaluate(job, dataset):
        evaluated.append(job.progress.step)
        return EvalResult(12, counts[job.progress.step], 10, 1.0, {})

    monkeypatch.setattr(distrain.training.validate, "evaluate_dataset", evaluate)
    settings = {"evaluate": {"every": 4}, "checkpoint": {"keep": 1}}

    def best(config):
        found = json.loads(Store(config.run).read("checkpoints/best.json"))
        return found["checkpoint"].partition("-attempt")[0], found["top1"]

    whole = make("whole", 3, **settings)
    run(whole, console)
    assert evaluated == [4, 8, 12, 15]
    config = make("parts", 2, **settings)
    run(config, console)
    assert best(config) == ("step-00000010", 9)
    run(config, console)
    assert best(config) == ("step-00000010", 9), "it is still the end"
    run(extended(config, 3), console)
    assert outcome(config)["state"] == outcome(whole)["state"]
    assert best(config) == best(whole) == ("step-00000004", 5)
    names = [n for n in Store(config.run).list_names("checkpoints") if "step" in n]
    kept = [n.partition("-attempt")[0] for n in names]
    assert kept == ["step-00000004", "step-00000015"]


def test_a_run_that_is_not_finished_gets_more_epochs_too(make, console):
    wanted = run(make("whole", 2), console).weights
    train(make("parts", 1), stop_at(console, 3), console)
    del console.set_step
    assert run(make("parts", 2), console).weights == wanted


def refusal(config, console):
    with pytest.raises(UserError) as refused:
        run(config, console)
    return str(refused.value)


def test_fewer_epochs_are_refused(make, console):
    train(make("a", 2), stop_at(console, 1), console)
    del console.set_step
    assert refusal(make("a", 1), console) == (
        f"{make('a', 1).run} was trained with other settings:\n"
        "  - epochs: 2 before, 1 now (it may be raised, but not lowered)\n"
        "change them back to resume it, or start afresh in another run directory with run=..."
    )
    text = refusal(make("a", 3, seed=4), console)
    assert "seed: 0 before, 4 now" in text
    assert "epochs: " not in text


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine", "lr": 0.05},
        {"name": "polynomial", "lr": 0.05},
        {"name": "geometric", "lr": 0.05},
        {"name": f"{__name__}:Forgetful", "lr": 0.05, "drop_epochs": [1]},
    ],
)
def test_a_rate_that_depends_on_the_number_of_epochs(make, console, schedule, epochs):
    train(make("a", 2, schedule=schedule), stop_at(console, 1), console)
    del console.set_step
    text = refusal(make("a", epochs, schedule=schedule), console)
    name = schedule["name"]
    assert f"epochs: 2 before, {epochs} now (the learning rate of schedule {name} depends on it)\n" in text  # fmt: skip


def test_what_schedules_declare():
    registered = {
        name: kind.depends_on_length for name, kind in Schedule.registry.items()
    }
    independent = [name for name, depends in registered.items() if not depends]
    assert sorted(independent) == ["constant", "plateau", "step"]
    own = (Schedule, Declared, OwnConstant, Forgetful)
    assert [kind.depends_on_length for kind in own] == [True, False, False, True]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_rate_that_is_declared_independent_is(schedule):
    found = Schedule.parse_choice(schedule)
    rates = [
        [found.get_lr(step, 10, 10 * epochs, (15,)) for step in range(20)]
        for epochs in (2, 3, 90)
    ]
    assert rates[0] == rates[1] == rates[2]
