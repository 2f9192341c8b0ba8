"""The commands that make data sets and look at them."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.errors import RunError

if TYPE_CHECKING:
    from distrain.data.prepare.source import Refused
    from distrain.data.shards.stats import Statistics

_SOURCE = "Image folder, .tar or .parquet file, a folder of those, or a pattern with * (path or URL)."
_SHOWN_REJECTS = 10

Names = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Readable class names: lines of class and name, or a name for each label.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="For a tar of images alone: a list of labels, or the ILSVRC-2012 devkit.tar.gz.",
    ),
]
ImageColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Parquet column of images.")
]
LabelColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Parquet column of labels.")
]
MaxRejects = Annotated[
    int, typer.Option(min=0, help="Images that may be left out with exit code 0.")
]
PixelLimit = Annotated[
    int, typer.Option(min=1, help="Pixels of an image; what claims more is left out.")
]
Processes = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that decode; a core each by default."),
]


class Encoding(str, Enum):
    """How pixels are stored."""

    JPEG = "jpeg"
    RAW = "raw"


def pack(
    source: Annotated[str, typer.Argument(help=_SOURCE)],
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
    labels: Labels = None,
    names: Names = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    max_rejects: MaxRejects = 0,
    pixel_limit: PixelLimit = 50_000_000,
    processes: Processes = None,
) -> None:
    """Decode, check, resize and shard images, once for all trainings. Run again after a kill, it goes on."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.open import open_source
    from distrain.data.prepare.pack import REJECTS, Geometry, Treatment
    from distrain.data.prepare.pack import pack as make
    from distrain.data.storage.store import Store

    treatment = Treatment(
        Geometry.parse(geometry), encoding.value, quality, pixel_limit
    )
    opened = open_source(
        source,
        labels=labels,
        names=names,
        image_column=image_column,
        label_column=label_column,
    )
    _say_what_was_found(opened.source)
    try:
        with ImageProgress() as bar:
            packed = make(
                opened.source,
                target,
                treatment,
                processes=processes or _cores(),
                progress=bar.update,
            )
    except KeyboardInterrupt:
        typer.echo("stopped; to go on: run the same command")
        raise SystemExit(130) from None
    manifest = packed.manifest
    typer.echo(
        f"{manifest.rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    )
    _end(packed.rejects, max_rejects, f"{Store(target).name}/{REJECTS}")


def index(
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
    labels: Labels = None,
    names: Names = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    max_rejects: MaxRejects = 0,
    pixel_limit: PixelLimit = 50_000_000,
    processes: Processes = None,
) -> None:
    """Make a manifest for shards of others, which then train as they are, without a copy. Decodes all once."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.index import index as make
    from distrain.data.prepare.open import open_source
    from distrain.data.prepare.pack import REJECTS
    from distrain.data.storage.store import Store

    found, columns = open_source(
        source,
        labels=labels,
        names=names,
        image_column=image_column,
        label_column=label_column,
    )
    _say_what_was_found(found)
    with ImageProgress() as bar:
        processes = processes or _cores()
        indexed = make(
            found,
            columns,
            to,
            processes=processes,
            pixel_limit=pixel_limit,
            progress=bar.update,
        )
    manifest, place = indexed.manifest, Store(to).name if to else found.store.name
    typer.echo(
        f"{manifest.rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} files"
    )
    typer.echo(f"train with data.train={place}")
    _end(indexed.rejects, max_rejects, f"{place}/{REJECTS}")


def stats(
    url: Annotated[
        str,
        typer.Argument(
            help="Data set, packed or indexed; or what pack reads (path or URL)."
        ),
    ],
    labels: Labels = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    processes: Processes = None,
) -> None:
    """Print the colour statistics of a data set; images that have no manifest are read and decoded for it."""
    from distrain.data.prepare.open import open_source
    from distrain.data.shards.manifest import MANIFEST, Manifest
    from distrain.data.storage.store import Store

    if "*" not in url and Store(url).exists(MANIFEST):
        _print_colours(Manifest.load(Store(url)).statistics)
        return
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.index import colours

    source, _ = open_source(
        url, labels=labels, image_column=image_column, label_column=label_column
    )
    _say_what_was_found(source)
    with ImageProgress() as bar:
        found, refused = colours(
            source, processes=processes or _cores(), progress=bar.update
        )
    _print_colours(found)
    if refused:
        typer.echo(
            f"without {len(refused):,} images, {refused[0].name} ({refused[0].reason}) the first"
        )


def verify(
    url: Annotated[
        str, typer.Argument(help="Data set, packed or indexed (path or URL).")
    ],
) -> None:
    """Read a data set once: sizes, checksums and labels, and that every image decodes."""
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.verify import verify as find_wrong
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store

    store = Store(url)
    manifest = Manifest.load(store)
    with ImageProgress() as bar:
        wrong = find_wrong(store, manifest, bar.update)
    for where, what in wrong:
        typer.echo(f"{where}: {what}")
    known = len(manifest.bad)
    also = f"; {known} images that the index knows for bad" if known else ""
    typer.echo(
        f"{manifest.rows:,} images in {len(manifest.shards)} shards, {len(wrong)} things wrong{also}"
    )
    if wrong:
        raise RunError(
            f"{store.name} is not what its manifest says: restore what is named, or make it again"
        )


def inspect(
    url: Annotated[
        str, typer.Argument(help="Data set, packed or indexed (path or URL).")
    ],
    sheet: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of random samples, a PNG file."),
    ] = None,
) -> None:
    """Say what is in a data set: classes, sizes, geometry, colours."""
    from distrain.data.decoding.image import png
    from distrain.data.prepare.verify import contents
    from distrain.data.prepare.verify import sheet as contact_sheet
    from distrain.data.shards.dataset import Dataset
    from distrain.data.shards.manifest import Manifest
    from distrain.data.storage.store import Store

    store = Store(url)
    manifest = Manifest.load(store)
    dataset = Dataset(store, manifest, memory=1 << 28, patience=60.0)
    found = contents(dataset)
    typer.echo(
        f"{manifest.rows:,} images of {len(manifest.classes)} classes in {len(manifest.shards)} shards"
    )
    if manifest.at:
        typer.echo(f"shards       {dataset.store.name}")
    typer.echo(
        f"encoding     {manifest.encoding}, {'proved' if manifest.proved else 'not proved'}"
    )
    for name, (least, median, most) in (
        ("bytes", found.bytes),
        ("height", found.heights),
        ("width", found.widths),
    ):
        typer.echo(f"{name:<12} {least:,} to {most:,}, median {median:,}")
    _print_colours(manifest.statistics)
    if dataset.bad:
        typer.echo(f"bad          {len(dataset.bad):,}, which train with no weight")
    typer.echo(f"fingerprint  {manifest.fingerprint}")
    for name, rows in found.classes.items():
        typer.echo(f"{rows:>12,} {name}")
    if sheet is not None:
        sheet.write_bytes(png(contact_sheet(dataset)))


def _cores() -> int:
    from distrain.distributed.process import available_cores

    return available_cores()


def _say_what_was_found(source: Any) -> None:
    rows = sum(block.rows for block in source.blocks)
    typer.echo(
        f"{source.kind}: {rows:,} images of {len(source.classes)} classes in {source.store.name}"
    )


def _print_colours(found: "Statistics") -> None:
    typer.echo(f"mean         {_numbers(found.mean)} (RGB, 0 to 255)")
    typer.echo(f"deviation    {_numbers(found.std)}")
    for i in range(3):
        title = "covariance" if i == 0 else ""
        typer.echo(f"{title:<12} {_numbers(found.covariance[i])}")
    for i in range(3):
        title = "axes" if i == 0 else ""
        axis = " ".join(f"{v:9.5f}" for v in found.eigenvectors[:, i])
        typer.echo(f"{title:<12} {axis}, eigenvalue {found.eigenvalues[i]:.2f}")


def _numbers(values: Any) -> str:
    return " ".join(f"{v:9.2f}" for v in values)


def _end(rejects: "Sequence[Refused]", allowed: int, table: str) -> None:
    """Say what was left out; too much of it is a failure."""
    for name, reason in rejects[:_SHOWN_REJECTS]:
        typer.echo(f"left out     {name}: {reason}")
    if not rejects:
        return
    if len(rejects) <= allowed:
        typer.echo(f"{len(rejects):,} left out in all, see {table}")
        return
    raise RunError(
        f"{len(rejects):,} left out in all, see {table}: the data set is complete without them, and "
        f"--max-rejects {len(rejects)} accepts that"
    )
