"""Command that exports a trained model."""

import sys
import textwrap
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from distrain.cli.after_training import CheckpointOption, DataOption, split_overrides
from distrain.errors import UserError

if TYPE_CHECKING:
    from distrain.exporting.export import ExportResult

# What begins each line of the result, in a terminal of 80 columns.
_INDENT = " " * 10
_WIDTH = 80


class FormatChoice(str, Enum):
    """Formats of an exported model."""

    SAFETENSORS = "safetensors"
    TORCHVISION = "torchvision"
    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


RunArguments = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN|key.sub=value",
        help="Run directory, or a folder in its checkpoints (path or URL). And config "
        "overrides of what does not decide the weights, e.g. lanes=2",
    ),
]
FormatOption = Annotated[
    FormatChoice,
    typer.Option(
        help="safetensors: weights for distrain; torchvision: weights for a network of "
        "torchvision; onnx, torch-export: graphs from an image of any size to "
        "probabilities.",
    ),
]
FolderOption = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder to write; an earlier export is replaced.",
        show_default="exports/RUN-FORMAT",
    ),
]
UploadOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Copy the folder to this path or URL, too."),
]


def export_model(
    model: RunArguments,
    format: FormatOption = FormatChoice.SAFETENSORS,
    to: FolderOption = None,
    data: DataOption = None,
    checkpoint: CheckpointOption = "newest",
    upload: UploadOption = None,
) -> None:
    """Export a trained model for other programs, and prove that it agrees.

    The exported file is run on all images of the data set, and compared with distrain.
    Where it disagrees, the images are named, and the exit code is 1.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.source import DatasetProgress
    from distrain.exporting.export import export
    from distrain.monitor.sinks import PlainConsole

    urls, overrides = split_overrides(model)
    if len(urls) != 1:
        raise UserError(
            f"there are {len(urls)} models to export: name one run directory"
        )
    with ImageProgress(to_stderr=True) as progress:
        result = export(
            urls[0],
            format.value,
            to=to,
            data=data,
            checkpoint=checkpoint,
            overrides=overrides,
            upload=upload,
            console=PlainConsole(sys.stderr),
            on_progress=lambda stage, done, total: progress.update(
                DatasetProgress(done, total, num_bytes=0, stage=stage)
            ),
        )
    for line in format_export(result):
        typer.echo(line)


def format_export(result: "ExportResult") -> list[str]:
    """Return the lines that show an export, for a terminal of 80 columns."""
    from distrain.inference.evaluation import format_accuracy

    evaluation = result.evaluation
    (origin,) = evaluation.origins
    top1 = format_accuracy(evaluation.result.top1, evaluation.top1_interval)
    lines = [
        f"model     {origin.run}, step {origin.step}, weights {origin.weights[:16]}",
        f"data      {evaluation.data}, {evaluation.result.num_samples:,} images",
        f"top-1     {top1}",
    ]
    for sentence in result.proof.describe():
        lines += textwrap.wrap(
            sentence, _WIDTH, initial_indent="proof     ", subsequent_indent=_INDENT
        )
    for name, reason in list(result.proof.left_out.items())[:10]:
        lines.append(f"left out  {name}: {reason}")
    lines.append(f"wrote     {result.file} ({result.num_bytes / 1e6:,.1f} MB)")
    if result.uploaded is not None:
        lines.append(f"uploaded  {result.uploaded}")
    return lines
