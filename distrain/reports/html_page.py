"""HTML of a report: one page without scripts, and nothing loaded from elsewhere."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distrain.data.storage.url import expand_home
from distrain.errors import UserError
from distrain.reports.style_sheet import STYLE_SHEET

# Longer tables are folded.
_MAX_OPEN_ROWS = 12


class Section(NamedTuple):
    """Part of a page with a heading."""

    id: str
    title: str
    body: str
    """HTML."""


def escape(value: object) -> str:
    """Return a value as text of a page."""
    return html.escape(str(value), quote=True)


def render_paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of plain text; kind "note" or "problem" sets its look."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def render_table(
    caption: str,
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    num_text_columns: int = 1,
    fold: bool = True,
) -> str:
    """Return a table.

    Args:
        caption: what it shows.
        header: of each column, with its unit.
        rows: values of each row, as they are to be shown.
        num_text_columns: columns from the left that are text; the others are aligned
            as numbers.
        fold: fold a table of more than 12 rows.
    """
    head = "".join(
        f'<th scope="col"{_align(i, num_text_columns)}>{escape(name)}</th>'
        for i, name in enumerate(header)
    )
    lines = [
        "<tr>"
        + "".join(
            f"<td{_align(i, num_text_columns)}>{escape(value)}</td>"
            for i, value in enumerate(row)
        )
        + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    is_folded = fold and len(lines) > _MAX_OPEN_ROWS
    shown = "" if is_folded else f"<caption>{escape(caption)}</caption>"
    # Focusable, since a narrow screen scrolls it.
    table = (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table>{shown}<thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
    if not is_folded:
        return table
    summary = f"{escape(caption)} ({len(lines):,} rows)"
    return f"<details><summary>{summary}</summary>{table}</details>"


def render_figure(title: str, content: str, note: str = "") -> str:
    """Return a figure: an SVG or an image, with its title and a note below."""
    caption = f"<strong>{escape(title)}</strong>"
    if note:
        caption += f" {escape(note)}"
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def render_page(
    title: str, subtitle: str, sections: Sequence[Section], *, intro: str = ""
) -> str:
    """Return the page.

    Args:
        title: of the page, plain text.
        subtitle: line below it, plain text.
        sections: in their order.
        intro: HTML before the first section.
    """
    links = "".join(
        f'<li><a href="#{section.id}">{escape(section.title)}</a></li>'
        for section in sections
    )
    parts = "\n".join(
        f'<section id="{section.id}" aria-labelledby="{section.id}-title">'
        f'<h2 id="{section.id}-title">{escape(section.title)}</h2>\n'
        f"{section.body}\n</section>"
        for section in sections
    )
    # The policy lets a browser load nothing, whatever a class or a file is named.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n"
        f"<body>\n<header><h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{intro}\n{parts}\n</main>\n</body>\n</html>\n"
    )


def check_target(to: str | Path) -> Path:
    """Return the path of the HTML file. Raises UserError: it cannot be written."""
    path = Path(expand_home(str(to)))
    if path.is_dir():
        raise UserError(f"{path} is a folder: name an HTML file in it")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for the report: create it")
    return path


def _align(column: int, num_text_columns: int) -> str:
    return "" if column < num_text_columns else ' class="number"'
