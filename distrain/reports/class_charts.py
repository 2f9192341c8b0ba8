"""Classes in a report: accuracy of each, and which are taken for which."""

from collections.abc import Sequence

import numpy as np

from distrain.inference.evaluation import Evaluation, list_worst_classes
from distrain.reports.charts import COLORS, open_chart
from distrain.reports.html_page import render_figure, render_paragraph, render_table
from distrain.reports.numbers import format_percent

MAX_PICTURED_CLASSES = 100
_MAX_BARS = 20
_MAX_NAMED_CLASSES = 25
_MAX_PAIRS = 200
_MAX_NAME_LENGTH = 24
# A blue that is visible on white and on black; its opacity is the share.
_CELL_COLOR = (0x2A / 255, 0x8F / 255, 0xC7 / 255)


def render_classes(evaluation: Evaluation) -> str:
    """Return the accuracy of the classes: the lowest as a chart, all as a table."""
    results = evaluation.compute_class_results()
    worst = list_worst_classes(results, _MAX_BARS)
    names = [_shorten(row.name) for row in worst]
    title = "Top-1 of the classes"
    if len(worst) < len(results):
        title = f"Top-1 of the {len(worst)} lowest classes"
    height = 1.0 + 0.22 * len(worst)
    with open_chart(
        "classes", title, "top-1 (% of the class's images)", "class", height
    ) as chart:
        centers = np.array([100 * row.top1 for row in worst])
        lows = np.array([100 * row.interval.low for row in worst])
        highs = np.array([100 * row.interval.high for row in worst])
        places = np.arange(len(worst))
        chart.axes.hlines(places, lows, highs, colors=COLORS[0], linewidth=3, alpha=0.4)
        chart.axes.plot(centers, places, "o", color=COLORS[0], markersize=5)
        chart.axes.set_yticks(places, names)
        chart.axes.set_xlim(-2, 102)
        chart.axes.invert_yaxis()
        lowest = f"lowest: {worst[0].name}, {format_percent(worst[0].top1)}"
        svg = chart.to_svg(lowest)
    figure = render_figure(title, svg, "Bars: intervals of 95 %.")
    rows = [
        (
            row.name,
            f"{row.num_samples:,}",
            format_percent(row.top1),
            f"{row.interval.low:.1%} to {row.interval.high:.1%}",
            f"{row.top5_count:,}",
        )
        for row in results
    ]
    header = ("class", "images", "top-1", "95% interval", "right within five")
    return (
        f'<div class="charts">{figure}{_render_confusion(evaluation)}</div>'
        + render_table("Accuracy of each class", header, rows)
        + _render_pairs(evaluation)
    )


def _render_confusion(evaluation: Evaluation) -> str:
    """Return the confusion matrix as a picture; nothing beyond 100 classes."""
    classes = evaluation.classes
    n = len(classes)
    if n > MAX_PICTURED_CLASSES:
        return ""
    # Row: class; column: prediction.
    numbers = {name: i for i, name in enumerate(classes)}
    shares = np.zeros((n, n))
    for i, row in enumerate(evaluation.compute_class_results()):
        shares[i, i] = row.top1
    confusions = evaluation.count_confusions()
    for pair in confusions:
        shares[numbers[pair.label], numbers[pair.predicted]] = pair.fraction

    title = "Confusion"
    with open_chart("confusion", title, "predicted class", "class", 4.6) as chart:
        cells = np.zeros((n, n, 4))
        cells[..., :3] = _CELL_COLOR
        # The root makes rare confusions visible.
        cells[..., 3] = np.sqrt(shares)
        chart.axes.imshow(cells, interpolation="nearest")
        chart.axes.grid(visible=False)
        if n <= _MAX_NAMED_CLASSES:
            names = [_shorten(name) for name in classes]
            chart.axes.set_xticks(range(n), names, rotation=90 if n > 10 else 45)
            chart.axes.set_yticks(range(n), names)
        worst = confusions[0] if confusions else None
        svg = chart.to_svg(
            "no image is confused"
            if worst is None
            else f"most frequent: {worst.label} taken for {worst.predicted}"
        )
    note = (
        "Opacity: root of the share of the class's images; on the diagonal the top-1."
    )
    return render_figure(title, svg, note)


def _render_pairs(evaluation: Evaluation) -> str:
    """Return the table of the most frequent confusions."""
    confusions = evaluation.count_confusions()
    if not confusions:
        return render_paragraph("No image is confused.")
    rows: Sequence[tuple[str, ...]] = [
        (
            pair.label,
            pair.predicted,
            f"{pair.num_samples:,}",
            format_percent(pair.fraction, 1),
        )
        for pair in confusions[:_MAX_PAIRS]
    ]
    caption = "Most frequent confusions"
    if len(confusions) > _MAX_PAIRS:
        caption += f", {_MAX_PAIRS} of {len(confusions):,} pairs"
    header = ("class", "taken for", "images", "share of the class")
    return render_table(caption, header, rows, num_text_columns=2)


def _shorten(name: str) -> str:
    if len(name) <= _MAX_NAME_LENGTH:
        return name
    return name[: _MAX_NAME_LENGTH - 1] + "…"
