"""Tables of a run: config, versions, hardware, attempts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distrain.reports.history import RunHistory
from distrain.reports.html_page import render_paragraph, render_table

# Where a run is stored, by which runs always differ.
_PLACE_KEYS = ("run",)


class ConfigDifference(NamedTuple):
    """Field of the config in which runs differ."""

    key: str
    """Such as `schedule.lr`."""
    values: tuple[str, ...]
    """Of each run; a dash where it has no such field."""


def render_config(history: RunHistory) -> str:
    """Return the table of the config's fields."""
    if not history.config:
        return render_paragraph("The config cannot be read.", "problem")
    rows = [(key, format_value(value)) for key, value in history.config.items()]
    return render_table("Config", ("field", "value"), rows, num_text_columns=2)


def render_origin(history: RunHistory, weights: str | None) -> str:
    """Return the table of data, weights, versions and hardware.

    Args:
        history: the run.
        weights: SHA-256 of the weights of the reported checkpoint, if it was opened.
    """
    state = history.checkpoint_state
    environment: Mapping[str, str] = state.get("environment") or {}
    rows = [
        ("run directory", history.url),
        ("checkpoint", history.checkpoint),
        ("weights, SHA-256", weights),
        ("reduction", state.get("reduction")),
        ("training data", history.config.get("data.train")),
        ("its fingerprint", history.config.get("data.fingerprint")),
        ("validation data", history.config.get("data.val")),
        ("its fingerprint", state.get("val")),
        ("hash of what the hardware computes", state.get("hardware")),
        *sorted(environment.items()),
    ]
    known = [(name, value) for name, value in rows if value is not None]
    return render_table(
        "Data, weights, versions, hardware",
        ("what", "value"),
        known,
        num_text_columns=2,
        fold=False,
    )


def render_events(history: RunHistory) -> str:
    """Return the table of restarts, resumes and resizes."""
    if not history.events:
        return render_paragraph("The run was neither interrupted nor resized.")
    rows = [
        (event.kind, event.text, f"{event.step:,}", event.attempt)
        for event in history.events
    ]
    return render_table(
        "Restarts, resumes and resizes",
        ("kind", "what happened", "step", "attempt"),
        rows,
        num_text_columns=2,
    )


def find_config_differences(runs: Sequence[RunHistory]) -> list[ConfigDifference]:
    """Return the fields in which the configs of runs differ, in their order.

    The run directory is not among them.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differences = []
    for key in keys:
        values = tuple(
            format_value(run.config[key]) if key in run.config else "–" for run in runs
        )
        if len(set(values)) > 1 and key not in _PLACE_KEYS:
            differences.append(ConfigDifference(key, values))
    return differences


def format_value(value: Any) -> str:
    """Return a value of a config as text, as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
