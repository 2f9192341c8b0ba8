"""Arguments and options of the commands: their names, types and help."""

from enum import Enum
from glob import escape, glob
from pathlib import Path
from typing import Annotated, Literal

import typer

Platform = Literal["ray", "kuberay", "slurm"]


NO_VALUE = ""
"""Metavar of flags: without one, typer's help shows their Python type."""


class Encoding(str, Enum):
    """Format of the stored images."""

    JPEG = "jpeg"
    RAW = "raw"


def complete_recipe(incomplete: str) -> list[str]:
    """List the shipped recipes and the YAML files that begin with `incomplete`."""
    from distrain.config import list_recipes

    names = [name for name in list_recipes() if name.startswith(incomplete)]
    # If this returns nothing, the shell itself completes files and folders.
    return names + sorted(glob(f"{escape(incomplete)}*.yaml"))


def _parse_fraction(text: str | float) -> float:
    """Parse a fraction. Raises BadParameter."""
    try:
        return float(text)
    except ValueError:
        message = f"{text} is no number: use a fraction, such as 0.1"
        raise typer.BadParameter(message) from None


# Config.
RecipeArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe: a YAML file, or the name of one that ships with distrain, such "
        "as quickstart.",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key.sub=value",
        help="Config overrides, e.g. epochs=10 schedule.lr=0.02",
    ),
]
ResumeOverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key.sub=value",
        help="Config overrides of what does not decide the weights, e.g. "
        "checkpoint.keep=5 data.train=s3://bucket/train",
    ),
]
OtherHardwareOption = Annotated[
    bool,
    typer.Option(
        "--accept-other-hardware",
        help="Resume on hardware that does not reproduce the checkpoint bit for bit.",
        metavar=NO_VALUE,
    ),
]

# Data sets.
SourceArgument = Annotated[
    str,
    typer.Argument(
        help="Folder with one subfolder of images per class, .tar or .parquet file, "
        "folder of those, or pattern with * (path or URL)."
    ),
]
DatasetArgument = Annotated[
    str, typer.Argument(help="Packed or indexed data set (path or URL).")
]
TargetArgument = Annotated[
    str, typer.Argument(help="Output folder for the shards (path or URL).")
]
ShardsArgument = Annotated[
    str,
    typer.Argument(
        help="Existing Parquet or .tar shards: folder, file or pattern (path or URL)."
    ),
]
ImagesArgument = Annotated[
    str,
    typer.Argument(
        help="Packed or indexed data set, or any source that pack reads (path or URL)."
    ),
]
ManifestOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Folder for the manifest, if that of the shards is read-only.",
        show_default="the shards' folder",
    ),
]
ValOption = Annotated[
    float | None,
    typer.Option(
        parser=_parse_fraction,
        metavar="FRACTION",
        help="Fraction of the images for validation, such as 0.1: DST/train and "
        "DST/val are packed.",
    ),
]
ValTargetOption = Annotated[
    str | None,
    typer.Option(
        "--val-dst",
        metavar="URL",
        help="Output folder for the validation set; DST is then the training set's.",
    ),
]
GeometryOption = Annotated[
    str,
    typer.Option(
        metavar="keep|short:N|square:N",
        help="Stored size. keep: as is; short:N: short side of N pixels; square:N: "
        "short side N, then the center N x N.",
    ),
]
EncodingOption = Annotated[
    Encoding,
    typer.Option(
        help="raw: uncompressed pixels (binary PPM); seven times the bytes, no "
        "decoding."
    ),
]
QualityOption = Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")]
NamesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Readable class names: lines of class and name, one name per label, or "
        "the ILSVRC-2012 devkit.",
    ),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Labels for a folder or .tar of bare images: one per line, a table of "
        "file and label (CSV, text, JSON), or the ILSVRC-2012 devkit (.tar.gz).",
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes-of",
        metavar="DATASET",
        help="Take classes and their numbers from a data set, by name: for a "
        "validation set, from its training set.",
    ),
]
ImageColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Parquet column of the images.",
        show_default="from the metadata",
    ),
]
LabelColumnOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Parquet column of the labels.",
        show_default="from the metadata",
    ),
]
MaxRejectsOption = Annotated[
    int, typer.Option(min=0, help="Exit 0 if at most this many images are rejected.")
]
PixelLimitOption = Annotated[
    int, typer.Option(min=1, help="Reject images of more than this many pixels.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Decoding processes.",
        show_default="one per core, or fewer if memory is short",
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Data set, usually the training set, whose images must not be in this "
        "one.",
    ),
]
NearOption = Annotated[
    bool,
    typer.Option(
        "--near",
        help="Also find images that look alike; reads and decodes all of them.",
        metavar=NO_VALUE,
    ),
]

# Jobs.
AddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="URL of the Ray dashboard, usually http://HEAD:8265.",
        show_default="RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265",
    ),
]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N|MIN-MAX",
        help="Train on N workers, or elastically on MIN-MAX; auto: one per GPU.",
        show_default="the config's cluster.workers",
    ),
]
FilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--with",
        metavar="PATH",
        help="Python file or folder to send along for your own model, loss, optimizer "
        "or schedule; may be repeated.",
    ),
]
FollowOption = Annotated[
    bool,
    typer.Option(
        "--follow",
        "-f",
        help="Show the run's progress until it ends.",
        metavar=NO_VALUE,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what would be sent; send nothing.", metavar=NO_VALUE
    ),
]
PlatformOption = Annotated[
    Platform,
    typer.Option(metavar="WHERE", help="Where the job runs: ray, kuberay or slurm."),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your site's manifest (kuberay) or script (slurm); examples are in "
        "cluster/.",
        show_default="DISTRAIN_TEMPLATE",
    ),
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Kubernetes namespace.",
        show_default="the template's, else the kubeconfig's",
    ),
]
