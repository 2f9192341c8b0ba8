"""The commands that make data sets and look at them."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.errors import RunError

if TYPE_CHECKING:
    from distrain.data.prepare.source import ImageSource, Reject
    from distrain.data.shards.stats import ColorStatistics

_SOURCE_HELP = "Image folder, .tar or .parquet file, a folder of those, or a pattern with * (path or URL)."
_MAX_SHOWN_REJECTS = 10

NamesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Readable class names: lines of class and name, or a name for each label.",
    ),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="For a tar of images alone: a list of labels, or the ILSVRC-2012 devkit.tar.gz.",
    ),
]
ImageColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Parquet column of images.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Parquet column of labels.")
]
MaxRejectsOption = Annotated[
    int, typer.Option(min=0, help="Images that may be left out with exit code 0.")
]
PixelLimitOption = Annotated[
    int, typer.Option(min=1, help="Pixels of an image; what claims more is left out.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that decode; a core each by default."),
]


class Encoding(str, Enum):
    """How pixels are stored."""

    JPEG = "jpeg"
    RAW = "raw"


def pack_images(
    source: Annotated[str, typer.Argument(help=_SOURCE_HELP)],
    target: Annotated[str, typer.Argument(help="Where the shards go (path or URL).")],
    geometry: Annotated[
        str,
        typer.Option(
            metavar="keep|short:N|square:N", help="Size of the stored images in pixels."
        ),
    ] = "square:256",
    encoding: Annotated[
        Encoding,
        typer.Option(
            help="raw: pixels (binary PPM), seven times the bytes, nothing to decode."
        ),
    ] = Encoding.JPEG,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality.")] = 95,
    labels: LabelsOption = None,
    names: NamesOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    max_rejects: MaxRejectsOption = 0,
    pixel_limit: PixelLimitOption = 50_000_000,
    processes: ProcessesOption = None,
) -> None:
    """Decode, check, resize and shard images, once for all trainings. Run again after a kill, it goes on."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.open import open_source
    from distrain.data.prepare.pack import REJECTS_FILE, Geometry, PackOptions
    from distrain.data.prepare.pack import pack_dataset as make
    from distrain.data.storage.store import Store

    treatment = PackOptions(
        Geometry.from_text(geometry), encoding.value, quality, pixel_limit
    )
    opened = open_source(
        source,
        labels_url=labels,
        names_url=names,
        image_column=image_column,
        label_column=label_column,
    )
    _print_source(opened.source)
    try:
        with ImageProgress() as bar:
            packed = make(
                opened.source,
                target,
                treatment,
                num_processes=processes or _default_num_processes(),
                on_progress=bar.update,
            )
    except KeyboardInterrupt:
        typer.echo("stopped; to go on: run the same command")
        raise SystemExit(130) from None
    manifest = packed.manifest
    typer.echo(
        f"{manifest.num_rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    )
    _check_rejects(
        packed.rejects, max_rejects, f"{Store(target).redacted_url}/{REJECTS_FILE}"
    )


def index_images(
    source: Annotated[
        str,
        typer.Argument(
            help="Parquet or tar files of others: a folder, file or pattern."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Folder for the manifest, where the files' own is read-only.",
        ),
    ] = None,
    labels: LabelsOption = None,
    names: NamesOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    max_rejects: MaxRejectsOption = 0,
    pixel_limit: PixelLimitOption = 50_000_000,
    processes: ProcessesOption = None,
) -> None:
    """Make a manifest for shards of others, which then train as they are, without a copy. Decodes all once."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.index import index_dataset as make
    from distrain.data.prepare.open import open_source
    from distrain.data.prepare.pack import REJECTS_FILE
    from distrain.data.storage.store import Store

    found, columns = open_source(
        source,
        labels_url=labels,
        names_url=names,
        image_column=image_column,
        label_column=label_column,
    )
    _print_source(found)
    with ImageProgress() as bar:
        processes = processes or _default_num_processes()
        indexed = make(
            found,
            columns,
            to,
            num_processes=processes,
            pixel_limit=pixel_limit,
            on_progress=bar.update,
        )
    manifest, place = (
        indexed.manifest,
        Store(to).redacted_url if to else found.store.redacted_url,
    )
    typer.echo(
        f"{manifest.num_rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} files"
    )
    typer.echo(f"train with data.train={place}")
    _check_rejects(indexed.rejects, max_rejects, f"{place}/{REJECTS_FILE}")


def print_color_stats(
    url: Annotated[
        str,
        typer.Argument(
            help="Data set, packed or indexed; or what pack reads (path or URL)."
        ),
    ],
    labels: LabelsOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Print the colour statistics of a data set; images that have no manifest are read and decoded for it."""
    from distrain.data.prepare.open import open_source
    from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
    from distrain.data.storage.store import Store

    if "*" not in url and Store(url).exists(MANIFEST_FILE):
        _print_statistics(Manifest.load(Store(url)).statistics)
        return
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.index import compute_color_statistics

    source, _ = open_source(
        url, labels_url=labels, image_column=image_column, label_column=label_column
    )
    _print_source(source)
    with ImageProgress() as bar:
        found, refused = compute_color_statistics(
            source,
            num_processes=processes or _default_num_processes(),
            on_progress=bar.update,
        )
    _print_statistics(found)
    if refused:
        typer.echo(
            f"without {len(refused):,} images, {refused[0].name} ({refused[0].reason}) the first"
        )


def verify_images(
    url: Annotated[
        str, typer.Argument(help="Data set, packed or indexed (path or URL).")
    ],
) -> None:
    """Read a data set once: sizes, checksums and labels, and that every image decodes."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.verify import verify_dataset as find_wrong
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store

    store = Store(url)
    manifest = Manifest.load(store)
    with ImageProgress() as bar:
        wrong = find_wrong(store, manifest, bar.update)
    for where, what in wrong:
        typer.echo(f"{where}: {what}")
    known = len(manifest.bad_samples)
    also = f"; {known} images that the index knows for bad" if known else ""
    typer.echo(
        f"{manifest.num_rows:,} images in {len(manifest.shards)} shards, {len(wrong)} things wrong{also}"
    )
    if wrong:
        raise RunError(
            f"{store.redacted_url} is not what its manifest says: restore what is named, or make it again"
        )


def inspect_dataset(
    url: Annotated[
        str, typer.Argument(help="Data set, packed or indexed (path or URL).")
    ],
    sheet: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of random samples, a PNG file."),
    ] = None,
) -> None:
    """Say what is in a data set: classes, sizes, geometry, colours."""
    from distrain.data.decoding.image import encode_png
    from distrain.data.prepare.verify import draw_contact_sheet as contact_sheet
    from distrain.data.prepare.verify import summarize_dataset
    from distrain.data.shards.dataset import Dataset
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store

    store = Store(url)
    manifest = Manifest.load(store)
    dataset = Dataset(store, manifest, memory_bytes=1 << 28, retry_seconds=60.0)
    found = summarize_dataset(dataset)
    typer.echo(
        f"{manifest.num_rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    )
    if manifest.shards_url:
        typer.echo(f"shards       {dataset.store.redacted_url}")
    typer.echo(
        f"encoding     {manifest.encoding}, {'proved' if manifest.verified else 'not proved'}"
    )
    for name, (least, median, most) in (
        ("bytes", found.image_bytes),
        ("height", found.heights),
        ("width", found.widths),
    ):
        typer.echo(f"{name:<12} {least:,} to {most:,}, median {median:,}")
    _print_statistics(manifest.statistics)
    if dataset.bad_samples:
        typer.echo(
            f"bad          {len(dataset.bad_samples):,}, which train with no weight"
        )
    typer.echo(f"fingerprint  {manifest.fingerprint}")
    for name, rows in found.rows_per_class.items():
        typer.echo(f"{rows:>12,} {name}")
    if sheet is not None:
        sheet.write_bytes(encode_png(contact_sheet(dataset)))


def _default_num_processes() -> int:
    from distrain.distributed.process import count_available_cores

    return count_available_cores()


def _print_source(source: "ImageSource") -> None:
    rows = sum(block.num_rows for block in source.blocks)
    typer.echo(
        f"{source.format_name}: {rows:,} images of {len(source.classes)} classes in {source.store.redacted_url}"
    )


def _print_statistics(statistics: "ColorStatistics") -> None:
    typer.echo(f"mean         {_format_numbers(statistics.mean)} (RGB, 0 to 255)")
    typer.echo(f"deviation    {_format_numbers(statistics.std)}")
    for i in range(3):
        title = "covariance" if i == 0 else ""
        typer.echo(f"{title:<12} {_format_numbers(statistics.covariance[i])}")
    for i in range(3):
        title = "axes" if i == 0 else ""
        axis = " ".join(f"{v:9.5f}" for v in statistics.eigenvectors[:, i])
        typer.echo(f"{title:<12} {axis}, eigenvalue {statistics.eigenvalues[i]:.2f}")


def _format_numbers(values: Any) -> str:
    return " ".join(f"{v:9.2f}" for v in values)


def _check_rejects(
    rejects: "Sequence[Reject]", max_rejects: int, rejects_file: str
) -> None:
    """Say what was left out; too much of it is a failure."""
    for name, reason in rejects[:_MAX_SHOWN_REJECTS]:
        typer.echo(f"left out     {name}: {reason}")
    if not rejects:
        return
    if len(rejects) <= max_rejects:
        typer.echo(f"{len(rejects):,} left out in all, see {rejects_file}")
        return
    raise RunError(
        f"{len(rejects):,} left out in all, see {rejects_file}: the data set is complete without them, and "
        f"--max-rejects {len(rejects)} accepts that"
    )
