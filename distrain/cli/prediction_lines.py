"""Lines that show predictions: bars for a person, JSON or CSV for a program."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrain.inference.predictor import Prediction

# Widest bar and longest class name in a terminal of 80 columns.
_BAR_WIDTH = 30
_MAX_NAME_WIDTH = 36
_NUM_CLASSES = 5


def create_printer(
    *, as_json: bool, as_csv: bool, num_classes: int
) -> "Callable[[Prediction], list[str]]":
    """Return the function that formats a prediction.

    Args:
        as_json: one JSON object per line.
        as_csv: one row per line; the first line has the names of the columns.
        num_classes: classes of the model.
    """
    if as_json:
        return format_json
    if not as_csv:
        return format_bars
    num_shown = min(_NUM_CLASSES, num_classes)
    header = ["image"]
    for i in range(1, num_shown + 1):
        header += [f"class_{i}", f"probability_{i}"]
    # Printed with the first image.
    pending_header = [_format_row([*header, "problem"])]

    def format_csv(prediction: "Prediction") -> list[str]:
        lines = [*pending_header, _format_row(_list_values(prediction, num_shown))]
        pending_header.clear()
        return lines

    return format_csv


def format_bars(prediction: "Prediction") -> list[str]:
    """Return the classes of an image with bars; nothing if it could not be read."""
    if prediction.problem is not None:
        return []
    width = max(len(_shorten(row.name)) for row in prediction.classes)
    lines = [prediction.name]
    for row in prediction.classes:
        bar = "#" * round(_BAR_WIDTH * row.probability)
        lines.append(f"  {row.probability:>7.2%}  {_shorten(row.name):<{width}}  {bar}")
    return [line.rstrip() for line in lines]


def format_json(prediction: "Prediction") -> list[str]:
    """Return an image's prediction as one line of JSON."""
    tree = {
        "image": prediction.name,
        "classes": [
            {"class": row.name, "label": row.label, "probability": row.probability}
            for row in prediction.classes
        ],
        "problem": prediction.problem,
    }
    return [json.dumps(tree)]


def _list_values(prediction: "Prediction", num_shown: int) -> list[object]:
    """Return the values of a row of CSV."""
    values: list[object] = [prediction.name]
    for i in range(num_shown):
        has_class = i < len(prediction.classes)
        row = prediction.classes[i] if has_class else None
        values += [row.name, row.probability] if row else ["", ""]
    return [*values, prediction.problem or ""]


def _format_row(values: Sequence[object]) -> str:
    """Return one row of CSV, without its line end."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME_WIDTH else f"{name[: _MAX_NAME_WIDTH - 1]}…"
