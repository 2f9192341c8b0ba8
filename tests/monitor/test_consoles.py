"""What is written for another process is shown there as it would be here; and the log in the run directory."""

import io
import os
import sys

import pytest
from records import eval_record, train_record

from distrain.data.storage.store import Store
from distrain.errors import RunError
from distrain.monitor.consoles import JsonConsole, LogFileConsole, replay_line
from distrain.monitor.sinks import PlainConsole
from distrain.monitor.terminal import TerminalConsole

RECORDS = [train_record(), eval_record(loss=float("inf"))]


def told(console):
    console.log("hello {x}")
    console.start(step=0, steps=10, steps_per_epoch=5)
    console.set_step(2)
    for record in RECORDS:
        console.log_metrics(record)
    console.stop()


def test_a_replay_looks_the_same():
    here, written, there = io.StringIO(), io.StringIO(), io.StringIO()
    told(PlainConsole(here))
    told(JsonConsole(written))
    shown = PlainConsole(there)
    for text in written.getvalue().splitlines():
        replay_line(text, shown)
    assert there.getvalue() == here.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "Traceback",
        "3",
        "[1]",
        '{"other": 1}',
        "null",
        "{",
        "",
        '{"distrain": "celebrate"}',
        '{"distrain": "__init__"}',
        '{"distrain": ["stop"]}',
        '{"distrain": "event"}',
        '{"distrain": "start", "step": 1}',
        '{"distrain": "record", "record": {"kind": "train"}}',
        '{"distrain": "record", "record": 3}',
    ],
)
def test_what_others_write_is_shown_as_it_is(console, text):
    replay_line(text, console)
    assert console.events == [text]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("start", {"step": 0, "steps": 10, "steps_per_epoch": 5}),
        ("log_metrics", {"record": RECORDS[0]}),
        ("stop", {}),
    ],
)
@pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError, TypeError])
def test_an_error_of_the_console_is_raised(
    console, monkeypatch, call, arguments, error
):
    def fail(*_, **options):
        raise error

    written = io.StringIO()
    getattr(JsonConsole(written), call)(**arguments)
    monkeypatch.setattr(console, call, fail)
    with pytest.raises(error):
        replay_line(written.getvalue(), console)


@pytest.mark.parametrize("of", [PlainConsole, TerminalConsole])
def test_a_log_from_its_middle_has_a_line_for_each_record(monkeypatch, of):
    """As of `kubectl logs --tail`: the line that says how many steps there are is missing."""
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdout", shown)
    console = of(shown) if of is PlainConsole else of()
    written = io.StringIO()
    for record in RECORDS:
        JsonConsole(written).log_metrics(record)
    for text in written.getvalue().splitlines():
        replay_line(text, console)
    # Without the empty line that rich ends with where there is no terminal.
    assert shown.getvalue().splitlines() == [
        "epoch 0  step 3  loss 2.0000  top-1 50.0%  10 images/s  waits 0%",
        "epoch 0  step 3  validation loss inf  top-1 50.00%  top-5 75.00%",
    ]


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_the_log_has_all_lines_with_their_times(console, tmp_path, where):
    store = Store(str(tmp_path) if where == "disk" else f"memory://log-{tmp_path.name}")

    def train():
        with LogFileConsole(console, store) as logged:
            logged.log("before")
            assert not store.list_names(), (
                "nothing is written to a run directory that is not ours yet"
            )
            told(logged)
            raise RuntimeError("over")

    with pytest.raises(RuntimeError):
        train()
    (name,) = store.list_names()
    lines = store.read(name).decode().splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        "before",
        "hello {x}",
        "epoch 0  step 3/10  loss 2.0000  top-1 50.0%  10 images/s  waits 0%",
        "epoch 0  step 3/10  validation loss inf  top-1 50.00%  top-5 75.00%",
        "error: over",
    ]
    assert all(line[4] == "-" and line[19] == "Z" for line in lines)
    assert console.events == ["before", "hello {x}", "start 0/10", "stop"]
    assert console.records == RECORDS


def test_a_reader_that_has_ended_is_named_in_the_log(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    logged = LogFileConsole(PlainConsole(stream), Store(str(tmp_path)))
    logged.start(step=0, steps=1, steps_per_epoch=1)
    with pytest.raises(RunError, match=r"reader of the output .*to resume"), logged:
        logged.log("a line")
    with pytest.raises(BrokenPipeError):
        stream.close()
    (log,) = tmp_path.glob("log-*.txt")
    assert "error: the reader of the output has ended" in log.read_text()
