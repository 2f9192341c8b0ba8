import io
import json
from dataclasses import replace

from records import TRAIN as RECORD
from records import eval_record, train_record

from distrain.data.storage.store import Store
from distrain.monitor.sinks import (
    MetricsFile,
    PlainConsole,
    format_record,
    list_metrics_attempts,
    read_metrics,
)

LONG = {"step": 1_234_567, "epoch": 89, "loss": 6.90776}
TRAIN = train_record(**LONG, images_per_second=51_234.5, data_wait=0.99)
EVAL = eval_record(**LONG, top1=1.0, top5=1.0, classes=1000)


def test_highest_attempt_wins(tmp_path):
    store = Store(str(tmp_path))
    for attempt, steps in ((1, range(5)), (2, range(3, 8))):
        metrics = MetricsFile(store, attempt, print)
        for step in steps:
            metrics.write_record(train_record(step=step, loss=float(attempt)))
        metrics.close()
    with (tmp_path / "metrics-001.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # kill -9 in the middle of a line
    assert list_metrics_attempts(store) == [1, 2]
    assert [r.loss for r in read_metrics(store)] == [1, 1, 1, 2, 2, 2, 2, 2]


def test_lines_are_on_disk_at_once_and_valid_json(tmp_path):
    metrics = MetricsFile(Store(str(tmp_path)), 1, print)
    assert not list(tmp_path.iterdir()), "nothing written, no file"
    metrics.write_record(train_record(loss=float("nan")))
    assert json.loads((tmp_path / "metrics-001.jsonl").read_text()) == {
        "kind": "train",
        **RECORD,
        "loss": None,
    }
    metrics.close()


def test_a_bucket_gets_the_whole_file(tmp_path):
    store = Store("memory://metrics-test/run")
    metrics = MetricsFile(store, 3, print)
    for step in range(3):
        metrics.write_record(train_record(step=step))
        metrics.upload()
        assert len(read_metrics(store)) == step + 1
    metrics.write_record(eval_record(step=2))
    metrics.close()
    assert len(read_metrics(store)) == 4


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path, full_disk):
    told = []
    metrics = MetricsFile(Store(str(tmp_path)), 1, told.append)
    with full_disk(500):  # in the middle of a line
        for step in range(10):
            metrics.write_record(train_record(step=step))
    assert len(read_metrics(Store(str(tmp_path)))) < 5
    metrics.write_record(train_record(step=10))
    metrics.close()
    assert [
        json.loads(text)["step"]
        for text in (tmp_path / "metrics-001.jsonl").read_text().splitlines()
    ] == [*range(11)]
    (warning,) = told
    assert warning.startswith(
        "warning: metrics-001.jsonl cannot be written for now: [Errno 27]"
    )


def test_records_that_are_lost_are_told(tmp_path, full_disk):
    told = []
    metrics = MetricsFile(Store(str(tmp_path)), 1, told.append)
    with full_disk(0):
        metrics.write_record(train_record(step=1))
        metrics.close()
    assert (
        told[-1] == f"warning: the last lines of {tmp_path}/metrics-001.jsonl are lost"
    )


def test_a_bucket_that_is_away_gets_the_whole_file_later(tmp_path):
    """A file in the way of the folder stands for it."""
    told, store = [], Store(f"local://{tmp_path}/run")
    store.backend.local_path = None
    (tmp_path / "run").write_text("")
    metrics = MetricsFile(store, 1, told.append)
    for step in (1, 2):
        metrics.write_record(train_record(step=step))
        metrics.upload()
    assert len(told) == 1
    (tmp_path / "run").unlink()
    (tmp_path / "run").mkdir()
    metrics.close()
    assert len(read_metrics(store)) == 2
    assert len(told) == 1


def test_lines_fit_80_columns():
    for record in (TRAIN, EVAL):
        assert (
            len(format_record(record, 9_999_999)) <= 100
        )  # a run of millions of steps
        small = replace(record, step=12_000)
        if record.kind == "train":
            small = replace(small, images_per_second=900.0)
        assert len(format_record(small, 99_999)) <= 80, format_record(small, 99_999)


def test_plain_lines():
    stream = io.StringIO()
    console = PlainConsole(stream)
    console.start(step=0, steps=10, steps_per_epoch=5)
    console.log_metrics(train_record(step=3, epoch=0, loss=6.90776))
    console.log("hello")
    console.stop()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("epoch 0  step 3/10  loss 6.9078  top-1 50.0%")
    assert second == "hello"
