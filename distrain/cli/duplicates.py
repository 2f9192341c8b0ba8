"""Print which images of data sets are equal."""

from typing import TYPE_CHECKING

import typer

from distrain.errors import RunError

if TYPE_CHECKING:
    from distrain.data.prepare.duplicates import DuplicateReport, Matches


def print_duplicates(report: "DuplicateReport | None") -> None:
    """Print what was found, and what could not be looked for."""
    if report is None:
        return
    for title, description, matches in (
        ("leaks", f"of {report.url} also in {report.other_url}", report.leaks),
        ("duplicates", f"of {report.url} equal to an earlier one", report.copies),
        (
            "duplicates",
            f"of {report.other_url} equal to an earlier one",
            report.other_copies,
        ),
        ("conflicts", "equal to an earlier one of another class", report.conflicts),
        (
            "near leaks",
            f"of {report.url} similar to one of {report.other_url}",
            report.near_leaks,
        ),
        (
            "near",
            f"of {report.url} similar to another one",
            report.near_copies,
        ),
    ):
        if matches is not None:
            typer.echo(f"{title:<12} {_format_matches(matches, description)}")
    for note in report.notes:
        typer.echo(f"note         {note}")


def _format_matches(matches: "Matches", description: str) -> str:
    """Return such as "5 images equal to an earlier one: b = a, d = c, f = e, ..."."""
    count = matches.num_images
    if not count:
        return f"0 images {description}"
    rest = "" if count <= len(matches.examples) else ", ..."
    images = "image" if count == 1 else "images"
    return f"{count:,} {images} {description}: {', '.join(matches.examples)}{rest}"


def check_leaks(report: "DuplicateReport | None") -> None:
    """Raise RunError if an image is in both data sets."""
    if report is None or report.leaks is None or not report.leaks.num_images:
        return
    count = report.leaks.num_images
    images = "image is" if count == 1 else "images are"
    raise RunError(
        f"{count:,} {images} in both {report.url} and {report.other_url}, see above: "
        "remove them from the images of one of the two, and pack it again"
    )
