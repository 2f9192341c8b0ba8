"""Where the time of a run went, by phase of its steps."""

from collections import defaultdict
from typing import NamedTuple

from distrain.monitor.phases import Phase
from distrain.reports.charts import COLORS, open_chart
from distrain.reports.history import RunHistory
from distrain.reports.html_page import render_figure
from distrain.reports.numbers import format_percent, format_seconds

_TITLE = "Time by phase"
# What a reader calls them; the names in the files are those of the metrics.
_LABELS = {
    Phase.DATA_WAIT: "waiting for data",
    Phase.TRANSFER: "transfer",
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward",
    Phase.REDUCTION: "reduction",
    Phase.OPTIMIZER: "optimizer",
    Phase.CHECKPOINT: "checkpoint",
}


class PhaseTime(NamedTuple):
    """Time that rank 0 spent in a phase, summed over its lanes."""

    phase: str
    seconds: float
    share: float
    """Of the time in all phases."""


def sum_phase_times(history: RunHistory) -> list[PhaseTime]:
    """Sum up the time in each phase, in the order of a step.

    Steps of early versions, and those that were rolled back, are not among it.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    for record in history.train:
        for phase, phase_seconds in record.phase_seconds.items():
            seconds[phase] += phase_seconds
    total = sum(seconds.values())
    return [
        PhaseTime(str(phase), seconds[phase], seconds[phase] / total)
        for phase in Phase
        if phase in seconds and total
    ]


def render_phase_chart(history: RunHistory) -> str:
    """Return the chart of the phases; empty if no step has recorded any."""
    times = sum_phase_times(history)
    if not times:
        return ""
    labels = [_LABELS[Phase(time.phase)] for time in times]
    texts = [
        f"{format_percent(time.share, 1)} ({format_seconds(time.seconds)})"
        for time in times
    ]
    with open_chart("phases", _TITLE, "seconds of rank 0, all lanes", "phase") as chart:
        seconds = [time.seconds for time in times]
        bars = chart.axes.barh(labels, seconds, color=COLORS[0])
        chart.axes.bar_label(bars, texts, padding=4)
        chart.axes.invert_yaxis()
        # Room for the longest bar's text.
        chart.axes.set_xlim(0, 1.45 * max(seconds))
        pairs = zip(labels, texts, strict=True)
        svg = chart.to_svg("; ".join(f"{label}: {text}" for label, text in pairs))
    note = (
        "Lanes work side by side, so that the sum may exceed the time of the run. On a "
        "GPU it is estimated from one step of eleven."
    )
    return render_figure(_TITLE, svg, note)
