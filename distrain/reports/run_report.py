"""Report of a run: `distrain report`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from distrain.inference.evaluation import Evaluation
from distrain.inference.trained_model import open_trained_model
from distrain.launch.evaluation import evaluate
from distrain.monitor.sinks import SilentConsole
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
from distrain.reports.model_sections import (
    EXPECTED_ERRORS,
    render_evaluation_sections,
    render_filter_section,
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
from distrain.rundir import files


@dataclass(frozen=True, eq=False)
class Report:
    """Report of a run."""

    path: Path
    """The page."""
    numbers: RunNumbers
    """Final numbers, as the run logged them."""
    evaluation: Evaluation | None
    """Evaluation of the checkpoint; None if the model or the data cannot be read."""
    problems: tuple[str, ...]
    """What is missing, damaged or diverged, one sentence each."""


def report(
    run: str | Path,
    *,
    to: str | Path | None = None,
    data: str | Path | None = None,
    checkpoint: str | int = "newest",
    curves_only: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write a report of a run, finished or not, as one HTML file.

    The file needs no other one and no network.

    Args:
        run: run directory (path or URL).
        to: HTML file to write. Default: NAME-report.html in the current folder, where
            NAME is the run's.
        data: packed or indexed data set to evaluate the model on (path or URL).
            Default: the run's validation set.
        checkpoint: "newest", "best" (by its top-1 in validation), or the number of a
            step.
        curves_only: leave out what needs the model and the data, which takes as long
            as an evaluation.
        on_progress: gets the number of images evaluated, and that of all.

    Raises:
        UserError: it is not a run directory, the given data set cannot be evaluated,
            or the file cannot be written there.
        OSError: the run directory cannot be read.
    """
    require_matplotlib()
    if to is not None:
        to = check_target(to)
    history = read_history(str(run))
    path = check_target(to or f"{history.name}-report.html")
    numbers = compute_numbers(history)
    parts = _ModelParts()
    if not curves_only:
        given_data = None if data is None else str(data)
        parts = _report_model(str(run), given_data, str(checkpoint), on_progress)
    sections = [
        Section("training", "Training", _render_training(history)),
        Section("time", "Where the time went", _render_time(history)),
        *parts.sections,
        Section("config", "Config", render_config(history)),
        Section(
            "origin",
            "Data, weights, versions, hardware",
            render_origin(history, parts.weights),
        ),
    ]
    problems = (*history.problems, *parts.problems)
    intro = "".join(render_paragraph(problem, "problem") for problem in problems)
    page = render_page(
        f"Report of {history.name}",
        f"{history.state} – {history.url}",
        sections,
        intro=intro + _render_cards(numbers),
    )
    path.write_text(page, encoding="utf-8")
    return Report(path, numbers, parts.evaluation, problems)


class _ModelParts(NamedTuple):
    """What the model and the data give."""

    sections: tuple[Section, ...] = ()
    weights: str | None = None
    """SHA-256 of the weights."""
    evaluation: Evaluation | None = None
    problems: tuple[str, ...] = ()


def _report_model(
    run: str,
    data: str | None,
    checkpoint: str,
    on_progress: Callable[[int, int], None] | None,
) -> _ModelParts:
    """Return the sections that need the model, as far as it and the data are there.

    Raises:
        UserError: a data set was given, and cannot be evaluated.
    """
    try:
        model = open_trained_model(run, checkpoint=checkpoint)
    except EXPECTED_ERRORS as error:
        return _ModelParts(problems=(f"the model is not shown: {error}",))
    weights = model.origin.weights
    filters = render_filter_section(model)
    data_url = data or model.config.data.val
    if data_url is None:
        problem = "there is no evaluation: the run had no validation set"
        return _ModelParts((filters,), weights, problems=(*model.notes, problem))
    # The checkpoint that was opened: a run that trains may have saved another.
    url = f"{run.rstrip('/')}/{files.CHECKPOINTS_DIR}/{model.origin.checkpoint}"
    try:
        evaluation = evaluate(
            url, data_url, console=SilentConsole(), on_progress=on_progress
        )
        sections = render_evaluation_sections(model, evaluation, data_url)
    except EXPECTED_ERRORS as error:
        if data is not None:
            raise
        problem = f"there is no evaluation: {error}"
        return _ModelParts((filters,), weights, problems=(*model.notes, problem))
    return _ModelParts((*sections, filters), weights, evaluation, model.notes)


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
    phases = render_phase_chart(history)
    charts = render_speed_charts(history, phases)
    if not charts:
        return render_paragraph("The run has logged no step yet.")
    if not phases:
        note = "The run was trained by a version that did not log the time of phases."
        charts += render_paragraph(note, "note")
    return charts
