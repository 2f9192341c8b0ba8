"""TensorBoard and MLflow are told what the metrics file has."""

import builtins
import threading

import pytest
import torch
from records import train_record

import distrain.monitor.trackers
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.monitor.sinks import read_metrics
from distrain.monitor.trackers import BackgroundTracker
from distrain.trainer import train

CPU = torch.device("cpu")


def twice(config, console):
    """A run whose newest checkpoint is lost after its metrics file has told of later steps, and its resume."""
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 11 else None
    assert train(config, world, console).step == 12
    del console.set_step
    Store(config.run).remove("checkpoints/step-00000012-attempt-001")
    summary = train(config, World(CPU), console)
    assert summary.status == "finished"
    return summary


def wanted(config):
    """(step, value) of each name, from the metrics file."""
    found = {}
    for record in read_metrics(Store(config.run)):
        for name, value in (
            ("loss", record.loss),
            ("top1", record.top1),
            ("top5", record.top5),
        ):
            found.setdefault(f"{record.split}/{name}", []).append((record.step, value))
    return found


def test_tensorboard_shows_each_step_once(narrow, console, digits):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = narrow(
        log={"every": 1, "tensorboard": True},
        checkpoint={"every": 5},
        data={"val": str(digits / "val")},
    )
    twice(config, console)
    events = EventAccumulator(f"{config.run}/tensorboard")
    events.Reload()
    for name, values in wanted(config).items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in values], name
    names = {"train/lr", "train/phase_seconds/forward", "val/samples"}
    assert names <= set(events.Tags()["scalars"])


@pytest.fixture
def mlflow_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlflow"


@pytest.mark.filterwarnings("ignore::FutureWarning:mlflow")
def test_mlflow_has_one_run_with_parameters_and_values(
    narrow, console, digits, mlflow_folder
):
    from mlflow.tracking import MlflowClient

    config = narrow(
        log={"every": 1, "mlflow": mlflow_folder},
        checkpoint={"every": 5},
        data={"val": str(digits / "val")},
    )
    twice(config, console)
    client = MlflowClient(mlflow_folder)
    (found,) = client.search_runs(
        [client.get_experiment_by_name("distrain").experiment_id]
    )
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["optimizer.momentum"] == str(config.optimizer.momentum)
    for name, values in wanted(config).items():
        history = {
            (metric.step, metric.value)
            for metric in client.get_metric_history(found.info.run_id, name)
        }
        assert history == set(values), (
            "steps that were computed again have the same values"
        )


def test_a_server_that_is_away_changes_nothing_but_a_warning(
    narrow, console, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    plain = train(narrow(run=str(tmp_path / "plain")), World(CPU), console)
    console.events.clear()
    summary = train(
        narrow(log={"every": 11, "mlflow": "http://127.0.0.1:9"}), World(CPU), console
    )
    assert summary.weights == plain.weights
    (told,) = (text for text in console.events if "did not reach" in text)
    assert told.startswith(
        "warning: the last 2 records did not reach mlflow: MlflowException: "
    )


def test_records_that_were_not_taken_come_again_in_order():
    class Sometimes:
        name = "sometimes"
        taken, calls, closed = [], 0, False

        def write_record(self, record):
            self.calls += 1
            if self.calls in (2, 3):
                raise ConnectionError("no route")
            self.taken.append(record.step)

        def close(self):
            self.closed = True

    tracker, told = Sometimes(), []
    follower = BackgroundTracker(tracker, told.append)
    for step in range(6):
        follower.write_record(train_record(step=step))
    follower.close()
    assert tracker.taken == list(range(6))
    assert tracker.closed
    assert not any("did not reach" in text for text in told)


def test_a_tracker_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(distrain.monitor.trackers, "_CLOSE_TIMEOUT_SECONDS", 0.2)
    release = threading.Event()

    class Hangs:
        name = "slow"

        def write_record(self, record):
            release.wait(60)

        def close(self):
            pass

    told = []
    follower = BackgroundTracker(Hangs(), told.append)
    for step in range(3):
        follower.write_record(train_record(step=step))
    follower.close()
    release.set()
    assert told == ["warning: the last 3 records did not reach slow: no answer for 0 s"]


@pytest.mark.parametrize(
    ("fails", "reason"),
    [(True, "ConnectionError: no route"), (False, "no answer for 30 s")],
)
def test_a_tracker_that_has_all_records_and_does_not_close(monkeypatch, fails, reason):
    is_closing = threading.Event()
    release = threading.Event()

    class StaysOpen:
        name = "open"

        def write_record(self, record):
            pass

        def close(self):
            if fails:
                raise ConnectionError("no route")
            is_closing.set()
            release.wait(60)

    told = []
    follower = BackgroundTracker(StaysOpen(), told.append)
    if not fails:
        # The time is over when the tracker is closing, however long that took.
        thread = follower._thread
        monkeypatch.setattr(thread, "join", lambda seconds: is_closing.wait())
    follower.write_record(train_record(step=1))
    follower.close()
    release.set()
    assert told == [f"warning: open has all records, but could not be closed: {reason}"]


def test_a_package_that_is_missing_is_a_sentence(narrow, console, monkeypatch):
    importing = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "mlflow":
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
        return importing(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UserError, match=r"mlflow is not installed: pip install 'distrain\[trackers\]'"
    ):
        train(narrow(log={"mlflow": "http://127.0.0.1:9"}), World(CPU), console)
