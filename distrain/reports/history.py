"""History of a run, from the files of its run directory."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from distrain.data.storage.store import Store
from distrain.data.storage.url import redact_url
from distrain.errors import UserError
from distrain.monitor.records import (
    EvalRecord,
    MetricsRecord,
    TrainRecord,
    record_from_dict,
)
from distrain.monitor.run_state import read_run_state
from distrain.monitor.sinks import list_metrics_attempts
from distrain.parsing import parse_mapping
from distrain.rundir import files
from distrain.rundir.checkpoint_folder import (
    DamagedCheckpointError,
    read_verified_files,
)
from distrain.rundir.checkpoint_loading import find_newest_checkpoint
from distrain.rundir.export_folder import EXPORT_FILE
from distrain.rundir.lease import read_attempts

_STATE_FILE = "state.json"
_READ_BYTES = 1 << 20


class RunEvent(NamedTuple):
    """Restart or resize of a run."""

    step: int
    """Steps done when the attempt started."""
    attempt: int
    kind: str
    """restart, resume or resize."""
    text: str
    """Description of the event."""


@dataclass(frozen=True, eq=False)
class RunHistory:
    """Records, events and state of a run, as its directory holds them."""

    url: str
    """Run directory without credentials."""
    name: str
    """Last part of the URL."""
    state: str
    """Running, or how it ended: one sentence."""
    config: Mapping[str, Any]
    """Fields of the config by key, such as `data.train`; empty if it cannot be read."""
    checkpoint: str | None
    """Name of the newest complete checkpoint."""
    checkpoint_state: Mapping[str, Any]
    """Its `state.json`; empty without one, or if it is damaged."""
    train: tuple[TrainRecord, ...]
    """By step; what later attempts rolled back is not among them."""
    evals: tuple[EvalRecord, ...]
    """By step; likewise."""
    events: tuple[RunEvent, ...]
    steps_per_epoch: int | None
    """None if no attempt has recorded it."""
    num_damaged_lines: int
    """Lines of the metrics files that cannot be read."""
    problems: tuple[str, ...]
    """What is missing, damaged or diverged, one sentence each."""


def read_history(url: str) -> RunHistory:
    """Read the history of a run, finished or not.

    Args:
        url: run directory (path or URL).

    Raises:
        UserError: it is not a run directory.
        OSError: it cannot be read.
    """
    store = Store(url.rstrip("/") or url)
    shown = store.redacted_url
    metrics_attempts = list_metrics_attempts(store) if store.exists() else []
    if not store.exists(files.CONFIG_FILE) and not metrics_attempts:
        raise UserError(
            f"{shown} is not a run directory: it has neither {files.CONFIG_FILE} nor "
            "metrics; pass the one that training printed"
        )
    if store.exists(EXPORT_FILE):
        raise UserError(
            f"{shown} is an exported model, which has no history: name the run that it "
            "is of"
        )
    problems = list[str]()
    config = _read_config(store, problems)
    attempts = read_attempts(store)
    checkpoint, checkpoint_state = _read_checkpoint_state(store, problems)
    train, evals, num_damaged = _read_records(store, metrics_attempts, attempts)
    if num_damaged:
        problems.append(
            f"{num_damaged:,} lines of the metrics files are damaged and left out"
        )
    problems += _find_divergences(store)
    return RunHistory(
        url=shown,
        name=shown.rstrip("/").rpartition("/")[2] or shown,
        state=read_run_state(store).text,
        config=config,
        checkpoint=checkpoint,
        checkpoint_state=checkpoint_state,
        train=tuple(train),
        evals=tuple(evals),
        events=tuple(_list_events(attempts)),
        steps_per_epoch=_find_steps_per_epoch(attempts, config, checkpoint_state),
        num_damaged_lines=num_damaged,
        problems=tuple(problems),
    )


def _read_config(store: Store, problems: list[str]) -> dict[str, Any]:
    """Return the fields of `config.yaml`; a problem is added if it cannot be read."""
    try:
        text = store.read(files.CONFIG_FILE).decode()
        tree = parse_mapping(text, files.CONFIG_FILE)
    except FileNotFoundError:
        problems.append(f"{files.CONFIG_FILE} is missing")
        return {}
    except (ValueError, UserError) as error:
        cause = " ".join(str(error).split())
        problems.append(f"{files.CONFIG_FILE} cannot be read: {cause}")
        return {}
    return dict(_flatten(tree))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            is_url = isinstance(value, str) and "://" in value
            yield f"{prefix}{key}", redact_url(value) if is_url else value


def _read_checkpoint_state(
    store: Store, problems: list[str]
) -> tuple[str | None, dict[str, Any]]:
    """Return name and state of the newest complete checkpoint."""
    name = find_newest_checkpoint(store)
    if name is None:
        problems.append("there is no complete checkpoint")
        return None, {}
    try:
        contents = read_verified_files(store, name, (_STATE_FILE,))
        state: dict[str, Any] = json.loads(contents[_STATE_FILE])
    except (DamagedCheckpointError, ValueError) as error:
        problems.append(f"checkpoint {name} is damaged: {error}")
        return name, {}
    return name, state


def _read_records(
    store: Store, metrics_attempts: list[int], attempts: Mapping[int, Mapping[str, Any]]
) -> tuple[list[TrainRecord], list[EvalRecord], int]:
    """Read the records of all attempts; a later one replaces what it rolled back.

    Returns:
        Records of training and of evaluations, by step, and the number of damaged
        lines.
    """
    train = list[TrainRecord]()
    evals = list[EvalRecord]()
    num_damaged = 0
    for attempt in sorted({*metrics_attempts, *attempts}):
        # The step from which it resumed: what was logged beyond is computed again.
        start = attempts.get(attempt, {}).get("from_step")
        if start is not None:
            _drop_from(train, start + 1)
            _drop_from(evals, start + 1)
        # It has none before its first log step.
        if attempt not in metrics_attempts:
            continue
        for line in _iter_lines(store, files.metrics_path(attempt)):
            record = _parse_line(line)
            if isinstance(record, TrainRecord):
                _drop_from(train, record.step)
                train.append(record)
            elif isinstance(record, EvalRecord):
                _drop_from(evals, record.step)
                evals.append(record)
            else:
                num_damaged += 1
    return train, evals, num_damaged


def _drop_from(records: list[Any], step: int) -> None:
    while records and records[-1].step >= step:
        records.pop()


def _iter_lines(store: Store, path: str) -> Iterator[bytes]:
    """Yield the lines of a file, which is read in parts."""
    size = store.get_size(path)
    rest = b""
    for start in range(0, size, _READ_BYTES):
        data = rest + store.read(path, start, min(size, start + _READ_BYTES))
        *lines, rest = data.split(b"\n")
        yield from lines
    if rest:
        yield rest


def _parse_line(line: bytes) -> MetricsRecord | None:
    """Return the record of a line; None if it is damaged."""
    try:
        return record_from_dict(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


def _list_events(attempts: Mapping[int, Mapping[str, Any]]) -> Iterator[RunEvent]:
    """Yield how each attempt but the first one came about."""
    before: Mapping[str, Any] | None = None
    for number in sorted(attempts):
        record = attempts[number]
        step = record["from_step"]
        if step is None:
            # It was refused, or failed before its first step.
            continue
        if before is not None:
            workers = record.get("workers")
            has_failed = before.get("failed", not before["ended"])
            kind = "restart" if has_failed else "resume"
            text = f"attempt {number} starts after step {step:,} on {workers} workers"
            if before.get("workers") != workers:
                kind = "resize"
                text += f", instead of {before.get('workers')}"
            if has_failed:
                text += f"; before it: {before.get('error', 'killed')}"
            yield RunEvent(step, number, kind, text)
        before = record


def _find_steps_per_epoch(
    attempts: Mapping[int, Mapping[str, Any]],
    config: Mapping[str, Any],
    checkpoint_state: Mapping[str, Any],
) -> int | None:
    """Return the steps of an epoch, as far as files tell."""
    epochs = config.get("epochs")
    for number in sorted(attempts, reverse=True):
        steps = attempts[number].get("steps")
        if steps and isinstance(epochs, int) and steps % epochs == 0:
            return int(steps) // epochs
    cursor = checkpoint_state.get("cursor", {})
    if cursor.get("epoch"):
        done = int(checkpoint_state["step"]) - int(cursor["step"])
        return done // int(cursor["epoch"])
    return None


def _find_divergences(store: Store) -> list[str]:
    """Return a sentence per step that was not finite."""
    return [
        f"training diverged: {name} holds the evidence"
        for name in sorted(store.list_names())
        if name.startswith("not-finite-step-")
    ]
