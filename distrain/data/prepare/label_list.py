"""Tables of text that people bring: which columns a list of labels or names has.

Columns are separated by tabs, semicolons, commas, bars, colons or white space: what
separates them is what makes names in the list those of the images, or of the classes.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from distrain.errors import UserError

_DELIMITERS = ("\t", ";", ",", "|", ":")
# Names of columns, in lowercase and without punctuation. Of several columns of labels,
# the first in this order counts.
_LABEL_COLUMNS = (
    "label",
    "labels",
    "class",
    "classname",
    "labelname",
    "category",
    "categoryname",
    "target",
    "groundtruth",
    "synset",
    "wnid",
    "cls",
    "predictionstring",
    "classid",
    "labelid",
    "categoryid",
)
_FILE_COLUMNS = {
    "file",
    "files",
    "filename",
    "filenames",
    "filepath",
    "fname",
    "id",
    "image",
    "images",
    "imageid",
    "imagename",
    "imagepath",
    "img",
    "imgname",
    "imgpath",
    "key",
    "name",
    "path",
}
# Its cells are a class and the corners of boxes, in ILSVRC's LOC_val_solution.csv.
_BOXES_COLUMN = "predictionstring"
# Lines in front of the first row: blank, or a comment.
_COMMENTS = re.compile(r"\A(?:[ \t]*(?:# [^\r\n]*)?(?:\r\n|\r|\n))+")
# Values of JSON that are a cell of a table, besides null.
_CELL_TYPES = (str, int, float)
_SHOW_COLUMNS = "begin it with a line that names the columns, such as filename,label"

KeyScorer: TypeAlias = Callable[[str], int]
"""How surely a cell is the name of an image, or of a class; 0: it is none."""


class Row(NamedTuple):
    """Row of a table."""

    line_number: int
    cells: list[str]


class Label(NamedTuple):
    """Label of a list."""

    line_number: int
    file: str
    """Name of the image; empty in a list of labels alone."""
    label: str
    """Its label; empty if it has none."""


class LabelList(NamedTuple):
    """Labels of a list, in its order."""

    has_files: bool
    """Whether each label comes with the name of its image."""
    labels: list[Label]
    has_separators: bool
    """Whether labels without files might be several columns."""
    notes: list[str]
    """What the user should know, one sentence each."""


def read_label_list(text: str, score_key: KeyScorer, location: str) -> LabelList:
    """Read a list of labels, or a table of files and labels.

    Args:
        text: the list, perhaps behind lines of comments that begin with `# `. Also
            JSON: {file: label}, or pairs of them, perhaps under `labels`, or a list or
            lines of objects, whose keys name the columns.
        score_key: how surely a cell is the name of an image.
        location: the list, for messages.

    Raises:
        UserError: it is not clear which columns hold files and labels, or a line has
            other columns than the rest.
    """
    objects = _parse_json_objects(text)
    if objects is not None:
        rows = _tabulate(objects)
        score_by_column = _score_columns(rows, score_key)
    elif text.lstrip().startswith(("{", "[")):
        return LabelList(True, _read_json_labels(text, location), False, [])
    else:
        rows, score_by_column = split_table(text, score_key)
    if not rows:
        raise UserError(f"{location} is empty: it must have one label per image")
    header = [_normalize(cell) for cell in rows[0].cells]
    label_columns = [name for name in _LABEL_COLUMNS if name in header]
    num_columns = len(header)

    # A list of labels alone, in the order of files, perhaps with a name or an index.
    if not score_by_column:
        if label_columns and _FILE_COLUMNS & set(header):
            raise UserError(
                f"{location} names no image of the source (first: "
                f"{' '.join(rows[min(1, len(rows) - 1)].cells)}): check that it is "
                "the list of these images"
            )
        column = header.index(label_columns[0]) if label_columns else 0
        rows = rows[1:] if label_columns else rows
        has_separators = any(re.search(r"[\s,;|:=]", row.cells[0]) for row in rows)
        labels = [Label(row.line_number, "", _get(row, column)) for row in rows]
        return LabelList(False, labels, has_separators, [])

    # A table: the header or, with two columns, the other one tells the labels. A label
    # such as 1 may be the name of an image too.
    notes = []
    label_column = header.index(label_columns[0]) if label_columns else -1
    score_by_column.pop(label_column, None)
    key_column = get_key_column(score_by_column)
    if label_columns and key_column >= 0:
        rows = rows[1:]
    elif num_columns == 2 and 0 <= key_column < 2:
        label_column = 1 - key_column
        if header[key_column] in _FILE_COLUMNS and not score_key(
            rows[0].cells[key_column]
        ):
            rows = rows[1:]
    else:
        raise UserError(
            f"{location} has {num_columns} columns, and it is not clear which one "
            f"holds the labels: {_SHOW_COLUMNS}"
        )
    if len(label_columns) > 1:
        others = ", ".join(label_columns[1:])
        notes.append(
            f"the labels of {location} are those of its column {label_columns[0]}, not "
            f"of {others}"
        )

    labels = []
    split_column = next((i for i, name in enumerate(header) if name == "split"), -1)
    splits: set[str] = set()
    for row in rows:
        if len(row.cells) != num_columns:
            raise UserError(
                f"line {row.line_number} of {location} has {len(row.cells)} columns, "
                f"and the first line {num_columns}: put names that hold a delimiter "
                "into quotes"
            )
        label = row.cells[label_column]
        if label_columns and label_columns[0] == _BOXES_COLUMN:
            label = label.partition(" ")[0]
        labels.append(Label(row.line_number, row.cells[key_column], label))
        if split_column >= 0 and score_key(row.cells[key_column]):
            splits.add(row.cells[split_column])
    if len(splits) > 1:
        raise UserError(
            f"{location} labels images of several splits, as its column split says "
            f"({', '.join(sorted(splits)[:5])}): keep the lines of one"
        )
    return LabelList(True, labels, False, notes)


def _parse_json_objects(text: str) -> list[dict[str, Any]] | None:
    """Return the objects of a JSON list or of JSON lines; None: it is something else.

    One object alone is the form {file: label}.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    objects: Any
    try:
        try:
            objects = json.loads(text)
        except ValueError:
            objects = [json.loads(line) for _, line in _iter_lines(text)]
    except (ValueError, RecursionError):
        return None
    is_table = isinstance(objects, list) and all(
        isinstance(item, dict)
        and all(cell is None or isinstance(cell, _CELL_TYPES) for cell in item.values())
        for item in objects
    )
    return objects if is_table and objects else None


def _tabulate(objects: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return rows of cells, one column per key, below a header."""
    keys = list(dict.fromkeys(key for item in objects for key in item))
    rows = [Row(0, keys)]
    for number, item in enumerate(objects, 1):
        cells = [item.get(key) for key in keys]
        rows.append(Row(number, ["" if cell is None else str(cell) for cell in cells]))
    return rows


def _read_json_labels(text: str, location: str) -> list[Label]:
    """Read labels from JSON. Raises UserError if it has another form."""
    try:
        tree = json.loads(text)
        if isinstance(tree, dict) and isinstance(tree.get("labels"), list):
            tree = tree["labels"]
        pairs = list(tree.items()) if isinstance(tree, dict) else tree
        labels: list[Label] = []
        for pair in pairs:
            # The keys of an object of two fields are no pair.
            if isinstance(pair, dict):
                raise TypeError("it holds a list of objects")
            file, label = pair
            if not isinstance(file, str) or not isinstance(label, (str, int)):
                raise TypeError(f"{label!r} is no label")
            labels.append(Label(len(labels) + 1, file, str(label)))
        return labels
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{location} is not JSON of the form {{file: label}} ({error}): write it "
            "so, or as lines of file and label"
        ) from None


def get_key_column(score_by_column: Mapping[int, int]) -> int:
    """Return the column that most surely holds names; -1: none does."""
    return max(score_by_column, key=lambda key: score_by_column[key], default=-1)


def split_table(text: str, score_key: KeyScorer) -> tuple[list[Row], dict[int, int]]:
    """Split a text into rows of cells.

    Returns:
        The rows, and the score of each column that has names of images or classes.
        Without such a column, rows are split only if their first one names a column of
        labels, and have one cell otherwise.
    """
    # Comments become blank lines, so that the rows keep their line numbers.
    text = _COMMENTS.sub(lambda found: "\n" * len(found[0].splitlines()), text)
    # Take the table that has the most names. Without names: one with a header.
    best_score = 0
    best: tuple[list[Row], dict[int, int]] | None = None
    headed: list[Row] | None = None
    for rows in _iter_tables(text, score_key):
        score_by_column = _score_columns(rows, score_key)
        score = max(score_by_column.values(), default=0)
        if score > best_score:
            best_score = score
            best = (rows, score_by_column)
        elif headed is None and _has_header(rows):
            headed = rows
    if best is not None:
        return best
    if headed is not None:
        return headed, {}
    # One label per line.
    return [Row(number, [_unquote(line)]) for number, line in _iter_lines(text)], {}


def _iter_tables(text: str, score_key: KeyScorer) -> Iterator[list[Row]]:
    """Yield a text split at each mark that may separate its columns."""
    for mark in _DELIMITERS:
        if mark in text:
            yield _split_at(text, mark)
    yield _split_behind_keys(text, score_key)
    yield _split_at(text, " ")


def _has_header(rows: Sequence[Row]) -> bool:
    """Return whether the first row names columns of labels and of files or numbers."""
    if not rows or len(rows[0].cells) < 2:
        return False
    header = {_normalize(cell) for cell in rows[0].cells}
    return bool(header & set(_LABEL_COLUMNS) and header & {*_FILE_COLUMNS, ""})


def _score_columns(rows: Sequence[Row], score_key: KeyScorer) -> dict[int, int]:
    score_by_column: Counter[int] = Counter()
    for row in rows:
        if len(row.cells) > 1:
            for column, cell in enumerate(row.cells):
                score = score_key(cell)
                if score:
                    score_by_column[column] += score
    return dict(score_by_column)


def _split_at(text: str, mark: str) -> list[Row]:
    """Split lines at a mark, by the rules of CSV."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True
    )
    rows = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            # Some writers end each line with a delimiter.
            while len(cells) > 2 and not cells[-1]:
                cells.pop()
            if any(cells):
                rows.append(Row(reader.line_num, cells))
    except csv.Error:
        # A quote that does not end: this is no such table.
        return []
    return rows


def _split_behind_keys(text: str, score_key: KeyScorer) -> list[Row]:
    """Split each line at white space, behind the longest name that is known."""
    rows = []
    for line_number, line in _iter_lines(text):
        gaps = list(re.finditer(r"\s+", line))
        known = [gap for gap in gaps if score_key(line[: gap.start()])]
        if known:
            gap = known[-1]
            cells = [line[: gap.start()], _unquote(line[gap.end() :])]
        else:
            cells = line.split(maxsplit=1)
        rows.append(Row(line_number, cells))
    return rows


def _iter_lines(text: str) -> Sequence[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers."""
    lines = enumerate(io.StringIO(text, newline=None), 1)
    stripped = [(number, line.strip()) for number, line in lines]
    return [(n, line) for n, line in stripped if line]


def _unquote(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _normalize(cell: str) -> str:
    return re.sub(r"[^a-z0-9]", "", cell.lower()) if cell.isascii() else cell


def _get(row: Row, column: int) -> str:
    return row.cells[column] if column < len(row.cells) else ""
