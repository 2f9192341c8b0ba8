"""The metrics of a run: their names, and that their numbers are those of the metrics file."""

import errno
import http.client
import json
import re
import socket
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

import distrain.monitor.endpoint
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import StorageCounters, Store
from distrain.distributed.world import World
from distrain.errors import RunError, UserError
from distrain.monitor.health import Watchdog
from distrain.monitor.metric_specs import COUNTERS, GAUGES, HISTOGRAMS
from distrain.monitor.prometheus import Metrics
from distrain.monitor.sinks import read_metrics
from distrain.rundir.files import QUARANTINE_FILE
from distrain.trainer import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def often(monkeypatch, tmp_path):
    monkeypatch.setattr(distrain.monitor.endpoint, "RENDER_INTERVAL_SECONDS", 0.05)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def measured(narrow):
    """A config with a page on a port that was free."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return lambda **changes: narrow(metrics={"port": port}, **changes)


def read(config):
    with closing(
        http.client.HTTPConnection("127.0.0.1", config.metrics.port, timeout=5)
    ) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {
                k: v for k, v in sample.labels.items() if k not in ("run", "node")
            }
            assert sample.labels["run"] == "run"
            found[(sample.name.removeprefix("distrain_"), *labels.values())] = (
                sample.value
            )
    return found


@pytest.fixture
def last(monkeypatch):
    """The page as it is when a run ends, by reading it once before and once while it lingers."""
    found = {}

    def follow(config):
        close = Metrics.close

        def closing_page(self, **options):
            read(config)
            thread = threading.Thread(target=lambda: close(self, **options))
            thread.start()
            while thread.is_alive():
                try:
                    found.update(read(config))
                except OSError:
                    break
                thread.join(0.1)
            thread.join()

        monkeypatch.setattr(Metrics, "close", closing_page)
        return found

    return follow


def test_names_are_in_base_units_and_labels_are_few():
    for name in (*GAUGES, *COUNTERS, *HISTOGRAMS):
        assert re.fullmatch("[a-z0-9_]+", name), name
        assert not re.search("_(ms|us|kb|mb|percent|total)$", name), name
    labels = {
        name: family.label_names
        for table in (GAUGES, COUNTERS, HISTOGRAMS)
        for name, family in table.items()
    }
    known = {
        "split",
        "phase",
        "rank",
        "node",
        "stage",
        "outcome",
        "kind",
        "version",
        "torch",
        "device",
        "gpu",
        "slow_rank",
    }
    assert {label for of_one in labels.values() for label in of_one} == known
    ranked = {name for name, of_one in labels.items() if "rank" in of_one}
    assert ranked == {"rank_data_wait_seconds", "rank_arrival_seconds"}, (
        "where they name a straggler"
    )


def test_the_numbers_of_a_run_are_those_of_its_metrics_file(
    measured, console, digits, last
):
    config = measured(
        epochs=2,
        data={"val": str(digits / "val")},
        log={"every": 11},
        checkpoint={"every": 11},
    )
    found = last(config)
    assert train(config, World(CPU), console).status == "finished"
    lines = read_metrics(Store(config.run))
    training, evaluation = (
        [r for r in lines if r.kind == kind][-1] for kind in ("train", "eval")
    )
    assert (
        found["steps_total",]
        == found["step",]
        == found["steps_planned",]
        == training.step
        == 44
    )
    assert found["epoch",] == 2
    assert found["steps_recomputed_total",] == 0
    assert found["samples_total", "good"] == 44 * 64
    assert found["samples_total", "bad"] == 0
    for split, record in (("train", training), ("val", evaluation)):
        assert found["loss", split] == record.loss
        assert found["top1_ratio", split] == record.top1
        assert found["top5_ratio", split] == record.top5
    assert found["learning_rate",] == training.lr
    assert found["images_per_second",] == training.images_per_second
    assert found["finished",] == 1
    for phase in (
        "data_wait",
        "transfer",
        "forward",
        "backward",
        "reduction",
        "optimizer",
    ):
        assert found["phase_seconds_count", phase] == 44, phase
        assert found["phase_seconds_sum", phase] > 0, phase
        logged = sum(r.phase_seconds[phase] for r in lines if r.kind == "train")
        assert logged == pytest.approx(found["phase_seconds_sum", phase], abs=1e-5)
    assert (
        found["phase_seconds_count", "checkpoint"]
        == found["checkpoint_write_seconds_count",]
        == 4
    )
    assert 0 < found["update_ratio",] < 1
    assert found["gradient_norm",] > 0
    assert found["weight_norm",] > 0
    assert found["store_bytes_total", "train"] > 100_000
    assert found["store_requests_total", "val"] > 0
    (newest,) = Path(config.run).glob("checkpoints/step-00000044*")
    assert found["checkpoint_bytes",] == sum(
        p.stat().st_size for p in newest.iterdir() if p.name != "manifest.json"
    )
    assert found["memory_bytes",] > 1 << 26
    assert found["open_files",] > 3
    assert json.loads(Store(config.run).read("targets.json")) == [
        {"targets": [f"127.0.0.1:{config.metrics.port}"], "labels": {}}
    ]
    with pytest.raises(OSError, match="refused"):
        read(config)


def test_the_gradient_norm_is_that_before_the_gradient_is_changed(
    measured, few_digits, console, last, tmp_path, monkeypatch
):
    """It is taken at the first step alone here, where it does not depend on the optimizer."""
    monkeypatch.setattr("distrain.monitor.norms.NORM_INTERVAL_SECONDS", 1e9)
    norms = []
    for rule in ({"name": "sgd"}, {"name": "sgd", "clip_norm": 1e-6}, {"name": "lars"}):
        config = measured(
            epochs=1,
            data={"train": str(few_digits / "train")},
            optimizer=rule,
            log={"every": 1},
            run=str(tmp_path / str(len(norms)) / "run"),
        )
        found = last(config)
        train(config, World(CPU), console)
        norms.append(found["gradient_norm",])
    assert norms == [norms[0]] * 3
    assert norms[0] > 0.01


def test_steps_that_are_done_again_count_and_are_told_apart(measured, console, last):
    """A run whose newest checkpoint is lost after its metrics file has told of later steps."""
    config = measured(log={"every": 1}, checkpoint={"every": 5, "keep": 9})
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set() if step == 11 else None
    assert train(config, world, console).step == 12
    del console.set_step
    Store(config.run).remove("checkpoints/step-00000012-attempt-001")
    found = last(config)
    assert train(config, World(CPU), console).status == "finished"
    assert found["attempt",] == 2
    assert found["steps_total",] == 22 - 10
    assert found["steps_recomputed_total",] == 12 - 10
    assert (found["restarts",], found["resizes",]) == (0, 0), "it was asked to end"


def test_restarts_and_resizes_are_counted_over_all_launches(measured, console, last):
    config = measured(checkpoint={"every": 5})

    def fail(step):
        if step == 7:
            raise OSError(errno.EIO, "a cable is out")

    console.set_step = fail
    for _ in range(2):
        with pytest.raises(OSError, match="a cable"):
            train(config, World(CPU), console)
        console.set_step = lambda step: fail(step - 5)
    del console.set_step
    store = Store(config.run)
    record = json.loads(store.read("attempts/001.json"))
    assert record["workers"] == 1
    store.write("attempts/001.json", json.dumps({**record, "workers": 3}).encode())
    found = last(config)
    train(config, World(CPU), console)
    assert (found["attempt",], found["restarts",], found["resizes",]) == (3, 2, 1)


def test_bad_samples_are_counted(measured, console, tmp_path, damaged_set, last):
    damaged_set(tmp_path / "set", bad={3, 7}, classes=10, rows=64)
    config = measured(
        data={"train": str(tmp_path / "set")}, global_batch=32, log={"every": 1}
    )
    found = last(config)
    train(config, World(CPU), console)
    assert (found["samples_total", "good"], found["samples_total", "bad"]) == (62, 2)
    assert found["bad_samples",] == 2


@pytest.mark.parametrize("cuda", ["cuda130", "cuda120"])
def test_quarantined_samples_are_counted(
    measured, console, tmp_path, damaged_set, last, monkeypatch, cuda
):
    """Of the same version of DALI, whichever CUDA it is built for."""
    damaged_set(tmp_path / "set", bad=set(), classes=10, rows=64)
    versions = {f"nvidia-dali-{cuda}": "9.9"}
    monkeypatch.setattr(
        "distrain.training.quarantine_sync.collect_environment", lambda _: versions
    )
    config = measured(data={"train": str(tmp_path / "set")}, global_batch=32)
    fingerprint = Manifest.load(Store(str(tmp_path / "set"))).fingerprint
    decoder = "dali 9.9 cpu"
    Store(config.run).write(
        QUARANTINE_FILE,
        json.dumps({f"{fingerprint} {decoder}": {"3": "killed it"}}).encode(),
    )
    found = last(config)
    train(config, World(CPU), console)
    assert (found["quarantined_samples",], found["bad_samples",]) == (1, 1)


def test_a_save_that_fails_is_counted(measured, console, last, monkeypatch):
    """Storage refuses the first file of the first checkpoint, and takes it half a second later."""
    write, refused = Store.write, []

    def refuse_once(self, path, *data):
        if path.endswith("model.safetensors") and not refused:
            refused.append(path)
            raise OSError(errno.EIO, "refused")
        return write(self, path, *data)

    monkeypatch.setattr(Store, "write", refuse_once)
    config = measured()
    found = last(config)
    train(config, World(CPU), console)
    assert (
        found["checkpoint_failures_total",],
        found["checkpoint_write_seconds_count",],
    ) == (1, 1)


def test_a_divergence_is_told(measured, console, last):
    config = measured(schedule={"name": "constant", "lr": 1e6}, log={"every": 1})
    found = last(config)
    with pytest.raises(RunError, match="diverged"):
        train(config, World(CPU), console)
    assert (found["diverged",], found["finished",]) == (1, 0)


def test_progress_is_the_watchdogs(narrow):
    metrics = Metrics(narrow().metrics, "runs/test", World(CPU), print)
    with Watchdog(60.0, lambda *_: None) as watchdog:
        metrics.track_watchdog(watchdog)
        watchdog.mark_progress("somewhere")
        watchdog._last_progress -= 40.0
        found = {
            s.name: s.value for family in metrics.collect() for s in family.samples
        }
    assert 39 < time.time() - found["distrain_last_progress_timestamp_seconds"] < 50
    metrics.close(final=True)


def test_no_page_where_none_is_wanted(narrow, console):
    config = narrow(metrics={"port": None})
    train(config, World(CPU), console)
    assert not [event for event in console.events if "metrics at" in event]
    assert not Store(config.run).exists("targets.json")


def test_an_address_that_is_not_ours_is_a_sentence(narrow, console):
    with pytest.raises(
        UserError,
        match=r"metrics cannot be served at 192\.0\.2\.1: .*choose another metrics\.address",
    ):
        train(narrow(metrics={"address": "192.0.2.1"}), World(CPU), console)


def test_metrics_change_no_bit(measured, narrow, few_digits, console, tmp_path):
    changes = {"data": {"train": str(few_digits / "train")}, "log": {"every": 2}}
    without = narrow(run=str(tmp_path / "without"), **changes)
    assert (
        train(measured(**changes), World(CPU), console).weights
        == train(without, World(CPU), console).weights
    )


@pytest.mark.parametrize(
    ("run", "label"),
    [
        ("s3://bucket/folder/my-run/", "my-run"),
        ("memory://HUNTER2@host", "host"),
        ("memory://host/my-run?sig=HUNTER2", "my-run"),
    ],
)
def test_a_secret_of_the_run_directory_is_in_no_label(narrow, run, label):
    metrics = Metrics(narrow(metrics={"port": None}).metrics, run, World(CPU), print)
    assert {
        s.labels["run"] for family in metrics.collect() for s in family.samples
    } == {label}
    metrics.close(final=True)


def test_phases_are_told_by_step_also_when_several_are_read_at_once(narrow):
    """As on a GPU, where they are read at log steps."""
    metrics = Metrics(
        narrow(metrics={"port": None}).metrics, "runs/test", World(CPU), print
    )
    metrics._device = torch.device("meta")
    for step in (1, 2, 3):
        with metrics.time_phase("forward"):
            pass
        metrics.count_step(step, 10, is_recomputed=False)
    metrics.record_timings()
    (family,) = metrics._histograms["phase_seconds"].collect()
    (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
    assert count == 3
    metrics.close(final=True)


class Event:
    """Stands in for a timing event of torch's on a GPU: each comes 10 ms after the one before."""

    made = 0

    def record(self, stream):
        assert stream == "of cuda:3"
        Event.made += 1
        self.at = Event.made

    def elapsed_time(self, later):
        return 10.0 * (later.at - self.at)


def test_on_a_gpu_one_step_of_eleven_is_timed_for_all_and_on_the_ranks_own(
    narrow, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    monkeypatch.setattr(Event, "made", 0)
    metrics = Metrics(
        narrow(metrics={"port": None}).metrics,
        "runs/test",
        World(torch.device("cuda", 3)),
        print,
    )
    for step in range(1, 34):
        with metrics.time_arrival():
            for _ in range(4):
                with metrics.time_phase("forward"):
                    pass
        with metrics.time_phase("checkpoint"):  # of the host
            pass
        metrics.count_step(step, 10, is_recomputed=False)
        if step == 27:
            metrics.record_timings()
            assert metrics.pop_mean_arrival_seconds() == 0.0, (
                "two steps of one rank are no reason to call it slow"
            )
    assert Event.made == 3 * 10, "steps 6, 17 and 28"
    metrics.record_timings()
    (family,) = metrics._histograms["phase_seconds"].collect()
    found = {
        (s.name.rpartition("_")[2], s.labels["phase"]): s.value
        for s in family.samples
        if "le" not in s.labels
    }
    assert found["count", "forward"] == found["count", "checkpoint"] == 33
    assert found["sum", "forward"] == pytest.approx(33 * 4 * 0.01)
    assert "arrival" not in {phase for _, phase in found}
    seconds = metrics.pop_phase_seconds()
    assert seconds.keys() == {"forward", "checkpoint"}
    assert seconds["forward"] == pytest.approx(33 * 4 * 0.01)
    assert metrics.pop_phase_seconds() == {}
    assert metrics.pop_mean_arrival_seconds() == pytest.approx(0.09)
    assert metrics.pop_mean_arrival_seconds() == 0.0, "nothing was timed since"
    assert metrics._counters[
        "rank_arrival_seconds", ("0", socket.gethostname())
    ] == pytest.approx(33 * 0.09)
    metrics.close(final=True)


def test_more_bad_samples_than_allowed_are_on_the_page(
    measured, console, tmp_path, damaged_set, last
):
    damaged_set(tmp_path / "set", bad={3, 7}, classes=10, rows=64)
    data = {"train": str(tmp_path / "set"), "max_bad_samples": 0}
    config = measured(data=data, global_batch=32, log={"every": 1})
    found = last(config)
    with pytest.raises(RunError, match="bad samples are more than"):
        train(config, World(CPU), console)
    assert found["bad_samples",] > found["bad_samples_limit",] == 0


def test_storage_is_told_as_it_counts(narrow):
    metrics, counts = (
        Metrics(narrow().metrics, "runs/test", World(CPU), print),
        StorageCounters(),
    )
    metrics.track_storage("train", counts)
    counts.num_requests, counts.bytes_read, counts.num_retries = 3, 1000, 1
    counts.errors_by_kind["timeout"] += 2
    found = {
        (s.name, *list(s.labels.values())[1:]): s.value
        for family in metrics.collect()
        for s in family.samples
    }
    assert found["distrain_store_bytes_total", "train"] == 1000
    assert found["distrain_store_retries_total", "train"] == 1
    assert found["distrain_store_errors_total", "train", "timeout"] == 2
    metrics.close(final=True)
