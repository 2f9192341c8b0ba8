"""Commands for trained models: evaluate and predict."""

import json
import re
import sys
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from distrain.cli.options import NO_VALUE
from distrain.errors import RunError, UserError

if TYPE_CHECKING:
    from distrain.inference.evaluation import Evaluation

# Rows of the tables of classes and of confusions.
_MAX_ROWS = 10
# Longest class name in a table of 80 columns that has two of them.
_MAX_NAME_WIDTH = 24
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


class CropsChoice(str, Enum):
    """Crops of each image."""

    CENTER = "center"
    TEN = "ten"


ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN|key.sub=value",
        help="Run directory, a folder in its checkpoints, or an exported folder (path "
        "or URL); of several the class probabilities are averaged. And config "
        "overrides of what does not decide the weights, e.g. lanes=2 device=cpu "
        "data.backend=torch",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Packed or indexed data set (path or URL).",
        show_default="the run's validation set",
    ),
]
CheckpointOption = Annotated[
    str,
    typer.Option(
        metavar="newest|best|STEP",
        help="Checkpoint of a run directory; best: by top-1 in validation.",
    ),
]
CropsOption = Annotated[
    CropsChoice,
    typer.Option(
        help="ten: average over four corners, the center and their mirror images, as "
        "the paper does; ten times the work."
    ),
]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N",
        help="Evaluate on N workers; auto: one per GPU. On this machine unless "
        "--address is given.",
        show_default="auto",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Evaluate on this Ray cluster: auto (the one that this machine belongs "
        "to), HOST:PORT or ray://HOST:PORT.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print all results as JSON.", metavar=NO_VALUE),
]

RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Run directory, a folder in its checkpoints, or an exported folder (path "
        "or URL).",
    ),
]
SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGE|key.sub=value",
        help="Image files, folders with images, .tar or .parquet files, or packed data "
        "sets (paths or URLs). And config overrides of what does not decide the "
        "weights, e.g. device=cpu data.backend=torch",
    ),
]
JsonLinesOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object per image.", metavar=NO_VALUE),
]
CsvOption = Annotated[
    bool, typer.Option("--csv", help="Print a CSV table.", metavar=NO_VALUE)
]


def evaluate_models(
    models: ModelsArgument,
    data: DataOption = None,
    checkpoint: CheckpointOption = "newest",
    crops: CropsOption = CropsChoice.CENTER,
    workers: WorkersOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained model: top-1, top-5, loss, classes, confusions.

    Each image counts once, and the result is the same to the last digit for any number
    of workers.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.source import DatasetProgress
    from distrain.launch.evaluation import evaluate
    from distrain.monitor.sinks import PlainConsole

    urls, overrides = split_overrides(models)
    with ImageProgress(to_stderr=True) as progress:
        evaluation = evaluate(
            urls,
            data,
            checkpoint=checkpoint,
            crops=crops.value,
            overrides=overrides,
            workers=workers,
            address=address,
            # stdout holds the result, which may be piped.
            console=PlainConsole(sys.stderr),
            on_progress=lambda done, total: progress.update(
                DatasetProgress(done, total, num_bytes=0)
            ),
        )
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict(), indent=1))
        return
    for line in format_evaluation(evaluation):
        typer.echo(line)


def predict_images(
    model: RunArgument,
    images: SourcesArgument,
    checkpoint: CheckpointOption = "newest",
    as_json: JsonLinesOption = False,
    as_csv: CsvOption = False,
) -> None:
    """Predict the classes of images: the five highest, with their probabilities.

    A file that is no image is named on stderr, and the exit code is then 1.
    """
    from distrain.cli.prediction_lines import create_printer
    from distrain.inference.predictor import Predictor

    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other: choose one")
    sources, overrides = split_overrides(images)
    if not sources:
        raise UserError("there is nothing to predict: name images or folders")
    predictor = Predictor(model, checkpoint=checkpoint, overrides=overrides)
    printer = create_printer(
        as_json=as_json, as_csv=as_csv, num_classes=len(predictor.classes)
    )
    num_images = 0
    num_problems = 0
    for prediction in predictor.predict(*sources):
        num_images += 1
        if prediction.problem is not None:
            num_problems += 1
            typer.echo(f"{prediction.name}: {prediction.problem}", err=True)
        for line in printer(prediction):
            typer.echo(line)
    if num_problems:
        raise RunError(
            f"{num_problems:,} of {num_images:,} images cannot be read: they are named "
            "above, with the reason"
        )


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide arguments into paths or URLs, and `key.sub=value` overrides.

    A path that looks like an override is given as ./key=value.
    """
    urls = list[str]()
    overrides = list[str]()
    for argument in arguments:
        chosen = overrides if _OVERRIDE.match(argument) else urls
        chosen.append(argument)
    return urls, overrides


def format_evaluation(evaluation: "Evaluation") -> list[str]:
    """Return the lines that show an evaluation, for a terminal of 80 columns."""
    from distrain.inference.evaluation import format_accuracy

    result = evaluation.result
    lines = [
        f"model     {origin.run}, step {origin.step}, weights {origin.weights[:16]}"
        for origin in evaluation.origins
    ]
    num_left_out = len(evaluation.left_out)
    left_out = f", {num_left_out:,} left out" if num_left_out else ""
    lines.append(
        f"data      {evaluation.data}, {result.num_samples:,} images{left_out}"
    )
    lines += [
        f"          {name}: {reason}"
        for name, reason in list(evaluation.left_out.items())[:_MAX_ROWS]
    ]
    if evaluation.crops == "ten":
        lines.append("crops     ten, averaged")
    for name, fraction, interval in (
        ("top-1", result.top1, evaluation.top1_interval),
        ("top-5", result.top5, evaluation.top5_interval),
    ):
        lines.append(f"{name:<9} {format_accuracy(fraction, interval)}")
    lines.append(f"loss      {result.loss:.4f}  ({evaluation.loss_name})")
    for key, (before, now) in evaluation.hardware_differences.items():
        lines.append(
            f"note      trained on another {key} ({before}) than this one ({now}): the "
            "last digits may differ"
        )
    return lines + _format_classes(evaluation) + _format_confusions(evaluation)


def _format_classes(evaluation: "Evaluation") -> list[str]:
    """Return the table of the classes with the lowest accuracy."""
    from distrain.inference.evaluation import list_worst_classes

    rows = list_worst_classes(evaluation.compute_class_results(), _MAX_ROWS)
    num_classes = len(evaluation.classes)
    title = "classes" if num_classes <= _MAX_ROWS else f"lowest of {num_classes:,}"
    lines = ["", f"{title:<{_MAX_NAME_WIDTH}} {'images':>8} {'top-1':>8}  95% interval"]
    lines += [
        f"{_shorten(row.name):<{_MAX_NAME_WIDTH}} {row.num_samples:>8,} "
        f"{row.top1:>8.2%}  {row.interval.low:.1%} to {row.interval.high:.1%}"
        for row in rows
    ]
    return lines


def _format_confusions(evaluation: "Evaluation") -> list[str]:
    """Return the table of the most frequent confusions."""
    confusions = evaluation.count_confusions()
    if not confusions:
        return []
    width = _MAX_NAME_WIDTH
    lines = ["", f"{'confused':<{width}} {'with':<{width}} {'images':>8} {'share':>7}"]
    lines += [
        f"{_shorten(row.label):<{width}} {_shorten(row.predicted):<{width}} "
        f"{row.num_samples:>8,} {row.fraction:>7.1%}"
        for row in confusions[:_MAX_ROWS]
    ]
    if len(confusions) > _MAX_ROWS:
        lines.append(f"and {len(confusions) - _MAX_ROWS:,} more pairs (--json)")
    return lines


def _shorten(name: str) -> str:
    """Return a class name that fits into a column."""
    if len(name) <= _MAX_NAME_WIDTH:
        return name
    return name[: _MAX_NAME_WIDTH - 1] + "…"
