"""Curves over the steps of a run, or of several: loss, accuracy, rate, speed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.monitor.records import EvalRecord, TrainRecord
from distrain.reports.charts import COLORS, FAINT, Chart, open_chart
from distrain.reports.history import RunHistory
from distrain.reports.html_page import render_figure
from distrain.reports.thinning import thin_curve

# Below it, points are drawn, too: a line of one point is invisible.
_MAX_MARKED_POINTS = 40

# Kinds of events, and how their lines are dashed.
_EVENT_STYLES: tuple[tuple[str, Any], ...] = (
    ("restart", "--"),
    ("resume", ":"),
    ("resize", "-."),
)


class _Curve(NamedTuple):
    """Curve of a run: a name, and what it takes from which records."""

    label: str
    get_value: Callable[[TrainRecord | EvalRecord], float]
    from_evals: bool = False


class _CurveChart(NamedTuple):
    """Chart of curves that share a unit."""

    name: str
    title: str
    y_label: str
    curves: tuple[_Curve, ...]
    from_zero: bool = False
    """True: the vertical axis begins at 0."""


def _percent(name: str) -> Callable[[TrainRecord | EvalRecord], float]:
    return lambda record: 100 * float(getattr(record, name))


def _value(name: str) -> Callable[[TrainRecord | EvalRecord], float]:
    return lambda record: float(getattr(record, name))


_RESULT_CHARTS = (
    _CurveChart(
        "loss",
        "Loss",
        "mean loss per image",
        (
            _Curve("training", _value("loss")),
            _Curve("validation", _value("loss"), True),
        ),
    ),
    _CurveChart(
        "top1",
        "Top-1 accuracy",
        "top-1 (% of images)",
        (
            _Curve("training", _percent("top1")),
            _Curve("validation", _percent("top1"), True),
        ),
    ),
    _CurveChart(
        "top5",
        "Top-5 accuracy",
        "top-5 (% of images)",
        (
            _Curve("training", _percent("top5")),
            _Curve("validation", _percent("top5"), True),
        ),
    ),
    _CurveChart(
        "rate",
        "Learning rate",
        "learning rate",
        (_Curve("learning rate", _value("lr")),),
        from_zero=True,
    ),
)
_SPEED_CHARTS = (
    _CurveChart(
        "throughput",
        "Throughput",
        "images per second",
        (_Curve("training", _value("images_per_second")),),
        from_zero=True,
    ),
    _CurveChart(
        "waits",
        "Waiting for data",
        "share of the time (%)",
        (_Curve("rank 0", _percent("data_wait")),),
        from_zero=True,
    ),
)
_COMPARED_CHARTS = (
    *((chart, 0) for chart in _RESULT_CHARTS),
    *((chart, 1) for chart in _RESULT_CHARTS[:3]),
    (_SPEED_CHARTS[0], 0),
)


def render_result_charts(history: RunHistory) -> str:
    """Return loss, accuracies and learning rate over the steps of a run."""
    return _render_charts(history, _RESULT_CHARTS)


def render_speed_charts(history: RunHistory, first_figure: str) -> str:
    """Return a figure, and throughput and waits over the steps of a run."""
    return _render_charts(history, _SPEED_CHARTS, first_figure)


def render_compared_charts(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    """Return the curves of several runs, laid over each other.

    Args:
        runs: the runs.
        names: of the runs in the legends.
    """
    figures = list[str]()
    for chart, number in _COMPARED_CHARTS:
        curve = chart.curves[number]
        split = f" in {curve.label}" if len(chart.curves) > 1 else ""
        title = f"{chart.title}{split}"
        name = f"{chart.name}-{number}"
        with open_chart(name, title, "step", chart.y_label) as drawn:
            notes = [
                note
                for i, (run, label) in enumerate(zip(runs, names, strict=True))
                if (
                    note := _draw_curve(drawn, run, curve, label, COLORS[i % 8], i // 8)
                )
            ]
            if not drawn.axes.lines:
                continue
            _finish(drawn, chart)
            svg = drawn.to_svg(f"{len(runs)} runs over the steps: {', '.join(names)}")
        figures.append(render_figure(title, svg, " ".join(notes)))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _render_charts(
    history: RunHistory, charts: Sequence[_CurveChart], first_figure: str = ""
) -> str:
    figures = [first_figure] if first_figure else []
    for chart in charts:
        with open_chart(chart.name, chart.title, "step", chart.y_label) as drawn:
            notes = [
                note
                for i, curve in enumerate(chart.curves)
                if (note := _draw_curve(drawn, history, curve, curve.label, COLORS[i]))
            ]
            if not drawn.axes.lines:
                continue
            _draw_events(drawn, history)
            _add_epochs(drawn, history)
            _finish(drawn, chart)
            svg = drawn.to_svg(_describe(history, chart))
        figures.append(render_figure(chart.title, svg, " ".join(notes)))
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _finish(drawn: Chart, chart: _CurveChart) -> None:
    """Set what depends on all curves."""
    if chart.from_zero:
        drawn.axes.set_ylim(bottom=0)
    drawn.axes.legend()


def _draw_curve(
    chart: Chart,
    history: RunHistory,
    curve: _Curve,
    label: str,
    color: str,
    dashes: int = 0,
) -> str:
    """Draw one curve, if there is a record; return what a reader must know of it."""
    steps, values = _collect(history, curve)
    if not len(steps):
        return ""
    thinned = thin_curve(steps, values)
    # matplotlib hides labels that begin with an underscore.
    shown_label = f"\u200b{label}" if label.startswith("_") else label
    marker = "o" if len(thinned.steps) <= _MAX_MARKED_POINTS else ""
    chart.axes.plot(
        thinned.steps,
        thinned.values,
        color=color,
        label=shown_label,
        marker=marker,
        markersize=3,
        linestyle=("-", "--", ":", "-.")[dashes % 4],
    )
    notes = []
    if len(thinned.steps) < thinned.num_points:
        notes.append(
            f"{label}: {len(thinned.steps):,} of {thinned.num_points:,} points, with "
            "the lowest and highest of each stretch."
        )
    if thinned.num_not_finite:
        notes.append(
            f"{label}: {thinned.num_not_finite:,} values are not finite (crosses)."
        )
        steps = thinned.steps[np.isnan(thinned.values)]
        # At the lower edge, whatever the scale.
        chart.axes.plot(
            steps,
            np.full(len(steps), 0.02),
            "x",
            color=color,
            transform=chart.axes.get_xaxis_transform(),
        )
    return " ".join(notes)


def _collect(
    history: RunHistory, curve: _Curve
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return steps and values of a curve, both of shape (n,)."""
    records: Sequence[TrainRecord | EvalRecord]
    records = history.evals if curve.from_evals else history.train
    steps = np.array([record.step for record in records], np.int64)
    values = np.array([curve.get_value(record) for record in records], np.float64)
    return steps, values


def _draw_events(chart: Chart, history: RunHistory) -> None:
    """Mark restarts, resumes, resizes, and steps where bad samples were found."""
    axes = chart.axes
    transform = axes.get_xaxis_transform()
    for kind, style in _EVENT_STYLES:
        steps = [event.step for event in history.events if event.kind == kind]
        if steps:
            axes.vlines(
                steps,
                0,
                1,
                colors=FAINT,
                linestyles=style,
                linewidth=1,
                label=kind,
                transform=transform,
            )
    bad_steps = find_bad_sample_steps(history)
    if bad_steps:
        axes.plot(
            bad_steps,
            np.full(len(bad_steps), 0.97),
            "v",
            color=COLORS[4],
            markersize=4,
            label="bad samples found",
            transform=transform,
        )


def find_bad_sample_steps(history: RunHistory) -> list[int]:
    """Return the log steps at which more bad samples were known than before."""
    steps = []
    known = 0
    for record in history.train:
        if record.bad_samples > known:
            steps.append(record.step)
        known = record.bad_samples
    return steps


def _add_epochs(chart: Chart, history: RunHistory) -> None:
    """Add an axis of epochs at the top, if the steps of an epoch are known."""
    size = history.steps_per_epoch
    if not size:
        return

    def to_epoch(step: Any) -> Any:
        return step / size

    def to_step(epoch: Any) -> Any:
        return epoch * size

    axis = chart.axes.secondary_xaxis("top", functions=(to_epoch, to_step))
    axis.set_xlabel("epoch")


def _describe(history: RunHistory, chart: _CurveChart) -> str:
    """Return first and last value of each curve, for screen readers."""
    sentences = []
    for curve in chart.curves:
        steps, values = _collect(history, curve)
        if len(steps):
            sentences.append(
                f"{curve.label}: {values[0]:.4g} at step {steps[0]:,}, "
                f"{values[-1]:.4g} at step {steps[-1]:,}"
            )
    return f"{chart.y_label} over steps; {'; '.join(sentences)}"
