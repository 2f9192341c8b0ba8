"""Commands that write pages on runs: report and compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distrain.cli.after_training import CheckpointOption, DataOption
from distrain.cli.options import NO_VALUE

if TYPE_CHECKING:
    from distrain.reports.comparison import Comparison

RunDirectoryArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Run directory (path or URL).")
]
RunDirectoriesArgument = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Run directories (paths or URLs), two or more."),
]
ReportFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="HTML file to write.", show_default="NAME-report.html"
    ),
]
CompareFileOption = Annotated[
    Path, typer.Option(metavar="FILE", help="HTML file to write.")
]
CurvesOnlyOption = Annotated[
    bool,
    typer.Option(
        "--curves-only",
        help="Leave out what needs the model and the data: it takes as long as eval.",
        metavar=NO_VALUE,
    ),
]


def report_run(
    run: RunDirectoryArgument,
    to: ReportFileOption = None,
    data: DataOption = None,
    checkpoint: CheckpointOption = "newest",
    curves_only: CurvesOnlyOption = False,
) -> None:
    """Write a report of a run as one HTML file: curves, classes, images, config.

    The run may be unfinished, diverged or damaged: the report says so.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.source import DatasetProgress
    from distrain.reports.run_report import report

    with ImageProgress(to_stderr=True) as progress:
        written = report(
            run,
            to=to,
            data=data,
            checkpoint=checkpoint,
            curves_only=curves_only,
            on_progress=lambda done, total: progress.update(
                DatasetProgress(done, total, num_bytes=0)
            ),
        )
    for problem in written.problems:
        typer.echo(f"note: {problem}", err=True)
    size = written.path.stat().st_size / 1e6
    typer.echo(f"wrote {written.path} ({size:.1f} MB)")


def compare_runs(
    runs: RunDirectoriesArgument, to: CompareFileOption = Path("compare.html")
) -> None:
    """Compare runs: curves over each other, final numbers, differences of the configs.

    Prints the numbers and differences, and writes one HTML file with the curves.
    """
    from distrain.reports.comparison import compare

    comparison = compare(runs, to=to)
    for problem in comparison.problems:
        typer.echo(f"note: {problem}", err=True)
    for line in format_comparison(comparison):
        typer.echo(line)
    typer.echo(f"wrote {comparison.path}")


def format_comparison(comparison: "Comparison") -> list[str]:
    """Return final numbers and differences of the configs as lines of columns."""
    from distrain.reports.comparison import list_final_numbers

    rows = [("", *comparison.names), *list_final_numbers(comparison)]
    lines = _format_columns(rows)
    if comparison.differences:
        lines.append("")
        differences = [(row.key, *row.values) for row in comparison.differences]
        lines += _format_columns([("config", *comparison.names), *differences])
    else:
        lines.append("the configs are the same")
    return lines


def _format_columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
