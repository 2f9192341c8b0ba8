"""Compare runs: `distrain compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import UserError
from distrain.reports.charts import require_matplotlib
from distrain.reports.curves import render_compared_charts
from distrain.reports.history import RunHistory, read_history
from distrain.reports.html_page import (
    Section,
    check_target,
    render_page,
    render_paragraph,
    render_table,
)
from distrain.reports.numbers import RunNumbers, compute_numbers
from distrain.reports.run_tables import ConfigDifference, find_config_differences


@dataclass(frozen=True)
class Comparison:
    """Comparison of runs."""

    path: Path
    """The page."""
    names: tuple[str, ...]
    """Names of the runs: the last part of each URL, or the URLs if parts are equal."""
    numbers: tuple[RunNumbers, ...]
    """Final numbers of each run."""
    differences: tuple[ConfigDifference, ...]
    """Fields of the config that are not the same in all runs."""
    problems: tuple[str, ...]
    """Missing or damaged parts, one sentence each, beginning with the run."""


def compare(
    runs: Sequence[str | Path], *, to: str | Path = "compare.html"
) -> Comparison:
    """Compare runs: curves over each other, final numbers, differences of the configs.

    Args:
        runs: run directories (paths or URLs), at least two.
        to: HTML file to write, one that needs no other file.

    Raises:
        UserError: there are fewer than two runs, one is not a run directory, or the
            file cannot be written there.
        OSError: a run directory cannot be read.
    """
    if isinstance(runs, str | Path) or len(runs) < 2:
        raise UserError("a comparison needs at least two runs: name another one")
    require_matplotlib()
    path = check_target(to)
    histories = [read_history(str(run)) for run in runs]
    names = _name_runs(histories)
    problems = tuple(
        f"{name}: {problem}"
        for name, history in zip(names, histories, strict=True)
        for problem in history.problems
    )
    comparison = Comparison(
        path=path,
        names=names,
        numbers=tuple(compute_numbers(history) for history in histories),
        differences=tuple(find_config_differences(histories)),
        problems=problems,
    )
    path.write_text(_render(comparison, histories), encoding="utf-8")
    return comparison


def list_final_numbers(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return a row per number: its name, and its value in each run, as text."""
    columns = [numbers.to_rows() for numbers in comparison.numbers]
    return [
        (cells[0][0], *(value for _, value in cells))
        for cells in zip(*columns, strict=True)
    ]


def _name_runs(histories: Sequence[RunHistory]) -> tuple[str, ...]:
    names = tuple(history.name for history in histories)
    if len(set(names)) == len(names):
        return names
    return tuple(history.url for history in histories)


def _render(comparison: Comparison, histories: Sequence[RunHistory]) -> str:
    """Return the page."""
    names = comparison.names
    intro = "".join(
        render_paragraph(problem, "problem") for problem in comparison.problems
    )
    charts = render_compared_charts(histories, names)
    states = [("state", *(history.state for history in histories))]
    rows = [*states, *list_final_numbers(comparison)]
    numbers = render_table("Final numbers", ("", *names), rows, fold=False)
    if comparison.differences:
        differences = render_table(
            "Fields of the configs that differ",
            ("field", *names),
            [(row.key, *row.values) for row in comparison.differences],
            num_text_columns=1 + len(names),
            fold=False,
        )
    else:
        differences = render_paragraph("The configs are the same.")
    no_charts = render_paragraph("No run has logged a step yet.")
    sections = [
        Section("curves", "Curves", charts or no_charts),
        Section("numbers", "Final numbers", numbers),
        Section("config", "What differs in the configs", differences),
    ]
    title = "Comparison of " + ", ".join(names)
    subtitle = ", ".join(history.url for history in histories)
    return render_page(title, subtitle, sections, intro=intro)
