"""Report of a run: `distrain report`."""

from dataclasses import dataclass
from pathlib import Path

from distrain.reports.charts import require_matplotlib
from distrain.reports.curves import (
    find_bad_sample_steps,
    render_result_charts,
    render_speed_charts,
)
from distrain.reports.history import RunHistory, read_history
from distrain.reports.html_page import (
    Section,
    check_target,
    escape,
    render_page,
    render_paragraph,
)
from distrain.reports.numbers import (
    RunNumbers,
    compute_numbers,
    format_number,
    format_percent,
    format_seconds,
)
from distrain.reports.phase_chart import render_phase_chart
from distrain.reports.run_tables import render_config, render_events, render_origin


@dataclass(frozen=True, eq=False)
class Report:
    """Report of a run."""

    path: Path
    """The page."""
    numbers: RunNumbers
    """Final numbers, as the run logged them."""
    problems: tuple[str, ...]
    """What is missing, damaged or diverged, one sentence each."""


def report(run: str | Path, *, to: str | Path | None = None) -> Report:
    """Write a report of a run, finished or not, as one HTML file.

    The file needs no other one and no network.

    Args:
        run: run directory (path or URL).
        to: HTML file to write. Default: NAME-report.html in the current folder, where
            NAME is the run's.

    Raises:
        UserError: it is not a run directory, or the file cannot be written there.
        OSError: the run directory cannot be read.
    """
    require_matplotlib()
    if to is not None:
        to = check_target(to)
    history = read_history(str(run))
    path = check_target(to or f"{history.name}-report.html")
    numbers = compute_numbers(history)
    sections = [
        Section("training", "Training", _render_training(history)),
        Section("time", "Where the time went", _render_time(history)),
        Section("config", "Config", render_config(history)),
        Section(
            "origin",
            "Data, weights, versions, hardware",
            render_origin(history, None),
        ),
    ]
    problems = history.problems
    intro = "".join(render_paragraph(problem, "problem") for problem in problems)
    page = render_page(
        f"Report of {history.name}",
        f"{history.state} – {history.url}",
        sections,
        intro=intro + _render_cards(numbers),
    )
    path.write_text(page, encoding="utf-8")
    return Report(path, numbers, problems)


def _render_cards(numbers: RunNumbers) -> str:
    """Return the final numbers that a reader looks for first."""
    best = "" if numbers.best_step is None else f"at step {numbers.best_step:,}"
    cards = [
        ("last logged step", f"{numbers.step:,}", ""),
        ("validation top-1", format_percent(numbers.val_top1), "last evaluation"),
        ("validation top-5", format_percent(numbers.val_top5), "last evaluation"),
        ("best top-1", format_percent(numbers.best_top1), best),
        ("training loss", format_number(numbers.train_loss), "last log interval"),
        ("images per second", format_number(numbers.images_per_second, ",.0f"), "mean"),
        ("training time", format_seconds(numbers.train_seconds), "logged steps"),
        ("bad samples", f"{numbers.bad_samples:,}", "left out of training"),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small>"
        "</dd></div>"
        for name, value, note in cards
    )
    return f'<dl class="cards">{items}</dl>'


def _render_training(history: RunHistory) -> str:
    charts = render_result_charts(history)
    if not charts:
        charts = render_paragraph("The run has logged no step yet.")
    bad_steps = find_bad_sample_steps(history)
    if bad_steps:
        charts += render_paragraph(
            f"Bad samples were found at {len(bad_steps):,} log steps, first at step "
            f"{bad_steps[0]:,}."
        )
    return charts + render_events(history)


def _render_time(history: RunHistory) -> str:
    charts = render_speed_charts(history, render_phase_chart(history))
    return charts or render_paragraph("The run has logged no step yet.")
