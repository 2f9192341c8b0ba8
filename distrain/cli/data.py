"""Commands that prepare and examine data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distrain.cli.options import (
    AgainstOption,
    ClassesOption,
    DatasetArgument,
    Encoding,
    EncodingOption,
    GeometryOption,
    ImageColumnOption,
    ImagesArgument,
    LabelColumnOption,
    LabelsOption,
    ManifestOption,
    MaxRejectsOption,
    NamesOption,
    NearOption,
    PixelLimitOption,
    ProcessesOption,
    QualityOption,
    ShardsArgument,
    SourceArgument,
    TargetArgument,
    ValOption,
    ValTargetOption,
)
from distrain.cli.pack_report import describe_split
from distrain.cli.submission import log_to_stderr
from distrain.errors import RunError

if TYPE_CHECKING:
    from distrain.data.prepare.pack import PackResult
    from distrain.data.prepare.source import ImageSource, Reject
    from distrain.data.shards.manifest import Manifest
    from distrain.data.shards.stats import ColorStatistics

_MAX_SHOWN_REASONS = 20


def pack_images(
    source: SourceArgument,
    target: TargetArgument,
    val: ValOption = None,
    val_dst: ValTargetOption = None,
    geometry: GeometryOption = "square:256",
    encoding: EncodingOption = Encoding.JPEG,
    quality: QualityOption = 95,
    labels: LabelsOption = None,
    names: NamesOption = None,
    classes_of: ClassesOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    max_rejects: MaxRejectsOption = 0,
    pixel_limit: PixelLimitOption = 50_000_000,
    processes: ProcessesOption = None,
) -> None:
    """Decode, check, resize and shard images for training.

    Resumable: rerun after an interruption.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.commands import pack
    from distrain.data.prepare.pack_notes import count_finished_shards
    from distrain.data.prepare.pack_split import get_split_targets
    from distrain.data.storage.store import Store

    targets = [target] if val is None else get_split_targets(target, val_dst)
    # Finished shards stay when it is interrupted.
    try:
        with ImageProgress() as progress:
            result = pack(
                source,
                target,
                val=val,
                val_dst=val_dst,
                geometry=geometry,
                encoding=encoding.value,
                quality=quality,
                labels=labels,
                names=names,
                classes_of=classes_of,
                image_column=image_column,
                label_column=label_column,
                pixel_limit=pixel_limit,
                processes=processes,
                on_source=_print_source,
                on_progress=progress.update,
                log=log_to_stderr,
            )
    except KeyboardInterrupt:
        num_kept = sum(count_finished_shards(Store(url)) for url in targets)
        kept = _format_count(num_kept, "finished shard")
        typer.echo(f"stopped with {kept}: run the same command to resume")
        raise SystemExit(130) from None
    _report_pack(result, targets, max_rejects)


def _report_pack(
    result: "PackResult", targets: "Sequence[str]", max_rejects: int
) -> None:
    """Print what was packed and rejected.

    Args:
        result: of one data set, or of a training and a validation set.
        targets: URL of each.
        max_rejects: see `_check_rejects`.

    Raises:
        RunError: more than `max_rejects` images were rejected.
    """
    from distrain.data.prepare.rejects import REJECTS_FILE
    from distrain.data.storage.store import Store

    parts = [result] if result.val is None else [result, result.val]
    urls = [Store(target).redacted_url for target in targets]
    rejects_urls: list[str] = []
    rejects: list[Reject] = []
    for part, url in zip(parts, urls, strict=True):
        size = _format_size(part.manifest, "shard")
        place = "" if result.val is None else f" in {url}"
        complete = ", complete already" if part.was_complete else ""
        typer.echo(f"{size}{place}{complete}")
        if part.rejects:
            rejects.extend(part.rejects)
            rejects_urls.append(f"{url}/{REJECTS_FILE}")

    # How many of each class are for validation.
    if result.split is not None:
        for line in describe_split(result.split, result.manifest.classes):
            typer.echo(line)
    if result.val is not None:
        typer.echo(f"train with data.train={urls[0]} data.val={urls[1]}")
    _check_rejects(rejects, max_rejects, " and ".join(rejects_urls))


def index_images(
    source: ShardsArgument,
    to: ManifestOption = None,
    labels: LabelsOption = None,
    names: NamesOption = None,
    classes_of: ClassesOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    max_rejects: MaxRejectsOption = 0,
    pixel_limit: PixelLimitOption = 50_000_000,
    processes: ProcessesOption = None,
) -> None:
    """Index existing Parquet or WebDataset shards to train on them in place.

    Decodes every image once and writes a manifest; copies nothing.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.commands import index
    from distrain.data.prepare.rejects import REJECTS_FILE
    from distrain.data.storage.store import Store

    try:
        with ImageProgress() as progress:
            result = index(
                source,
                to=to,
                labels=labels,
                names=names,
                classes_of=classes_of,
                image_column=image_column,
                label_column=label_column,
                pixel_limit=pixel_limit,
                processes=processes,
                on_source=_print_source,
                on_progress=progress.update,
            )
    # The manifest is written at the end.
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written")
        raise SystemExit(130) from None

    # Training opens the manifest, which names the shards if they lie elsewhere.
    manifest_url = Store(result.manifest_url).redacted_url
    size = _format_size(result.manifest, "file")
    typer.echo(f"{size}, indexed already" if result.was_complete else size)
    if result.num_turned:
        share = _format_share(result.num_turned, result.manifest.num_rows, "image")
        typer.echo(
            f"note         {share} turned upright by EXIF whenever they are read, "
            "which takes CPU time: distrain pack stores them so"
        )
    typer.echo(f"train with data.train={manifest_url}")
    _check_rejects(result.rejects, max_rejects, f"{manifest_url}/{REJECTS_FILE}")


def print_color_stats(
    url: ImagesArgument,
    labels: LabelsOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Print the color statistics of a data set.

    Images that are not packed or indexed are read and decoded to compute them.
    """
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.commands import stats
    from distrain.data.prepare.rejects import count_images

    with ImageProgress() as progress:
        statistics, rejects = stats(
            url,
            labels=labels,
            image_column=image_column,
            label_column=label_column,
            processes=processes,
            on_source=_print_source,
            on_progress=progress.update,
        )
    _print_color_statistics(statistics)
    if rejects:
        _print_rejects(rejects)
        typer.echo(f"{count_images(rejects):,} rejected in total")


def verify_images(
    url: DatasetArgument,
    against: AgainstOption = None,
    near: NearOption = False,
) -> None:
    """Verify a data set: sizes, checksums, labels, and that every image decodes.

    Reads everything once, and finds images that are in it, or in two sets, twice.
    """
    from distrain.cli.duplicates import check_leaks, print_duplicates
    from distrain.cli.progress import ImageProgress
    from distrain.data.prepare.examine import verify
    from distrain.data.storage.store import Store

    with ImageProgress() as progress:
        result = verify(url, against=against, near=near, on_progress=progress.update)
    manifest = result.manifest

    # Bad samples that `index` recorded are not problems: they have weight zero.
    for location, description in result.problems:
        typer.echo(f"{location}: {description}")
    num_bad = len(manifest.bad_samples)
    known_bad = f"; {_format_count(num_bad, 'known-bad image')}" if num_bad else ""
    images = _format_share(result.num_images, manifest.num_rows, "image")
    shards = _format_share(result.num_shards, len(manifest.shards), "shard")
    problems = _format_count(len(result.problems), "problem")
    print_duplicates(result.duplicates)
    typer.echo(f"{images} in {shards}: {problems}{known_bad}")
    # Of a file that could not be read, nothing is known to differ.
    num_unread = result.num_unread_shards
    if num_unread and num_unread == len(result.problems):
        raise RunError(
            f"{Store(url).redacted_url} was not verified: "
            f"{_format_count(num_unread, 'file')} could not be read, see above: check "
            "the permissions and the storage"
        )
    if result.problems:
        raise RunError(
            f"{Store(url).redacted_url} does not match its manifest: restore the files "
            "listed above, or pack or index the data set again"
        )
    check_leaks(result.duplicates)


def inspect_dataset(
    url: DatasetArgument,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Write a contact sheet of random samples to this PNG file."),
    ] = None,
    near: NearOption = False,
) -> None:
    """Summarize a data set: classes, image sizes, encoding, colors and duplicates."""
    from distrain.cli.duplicates import print_duplicates
    from distrain.data.prepare.examine import inspect
    from distrain.data.storage.store import Store

    summary = inspect(url, sheet=sheet, near=near)
    manifest = summary.manifest
    typer.echo(_format_size(manifest, "shard"))
    if manifest.shards_url:
        typer.echo(f"shards       {Store(manifest.shards_url).redacted_url}")
    verified = "verified" if manifest.verified else "not verified"
    typer.echo(f"encoding     {manifest.encoding}, {verified}")
    for name, (smallest, median, largest) in (
        ("bytes", summary.image_bytes),
        ("height", summary.heights),
        ("width", summary.widths),
    ):
        typer.echo(f"{name:<12} {smallest:,} to {largest:,}, median {median:,}")
    _print_color_statistics(manifest.statistics)
    if manifest.bad_samples:
        typer.echo(f"bad samples  {len(manifest.bad_samples):,} (ignored in training)")
    typer.echo(f"fingerprint  {manifest.fingerprint}")
    print_duplicates(summary.duplicates)
    for class_name, num_rows in summary.rows_per_class.items():
        typer.echo(f"{num_rows:>12,} {class_name}")
    if sheet is not None:
        typer.echo(f"wrote {sheet}")


def _format_count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _format_share(count: int, total: int, noun: str) -> str:
    """Return "2,048 images", or "1,024 of 2,048 images" for a part of them."""
    part = "" if count == total else f"{count:,} of "
    return f"{part}{_format_count(total, noun)}"


def _format_size(manifest: "Manifest", shard_noun: str) -> str:
    return (
        f"{_format_count(manifest.num_rows, 'image')} of {len(manifest.classes)} "
        f"classes in {_format_count(len(manifest.shards), shard_noun)}"
    )


def _print_source(source: "ImageSource") -> None:
    num_rows = sum(block.num_rows for block in source.blocks)
    typer.echo(
        f"{source.format_name}: {_format_count(num_rows, 'image')} of "
        f"{len(source.classes)} classes in {source.location}"
    )
    for note in source.notes:
        typer.echo(f"note         {note}")


def _print_color_statistics(statistics: "ColorStatistics") -> None:
    typer.echo(f"mean         {_format_numbers(statistics.mean)} (RGB, 0 to 255)")
    typer.echo(f"std          {_format_numbers(statistics.std)}")
    # Only the first row of a matrix carries its name.
    for i in range(3):
        title = "covariance" if i == 0 else ""
        typer.echo(f"{title:<12} {_format_numbers(statistics.covariance[i])}")
    # Eigenvectors are the columns.
    for i in range(3):
        title = "axes" if i == 0 else ""
        axis = " ".join(f"{v:9.5f}" for v in statistics.eigenvectors[:, i])
        typer.echo(f"{title:<12} {axis}, eigenvalue {statistics.eigenvalues[i]:.2f}")


def _format_numbers(values: Any) -> str:
    return " ".join(f"{v:9.2f}" for v in values)


def _check_rejects(
    rejects: "Sequence[Reject]", max_rejects: int, rejects_url: str
) -> None:
    """Print what was rejected.

    Args:
        rejects: images, or other parts of the source.
        max_rejects: number of rejected images up to which the command succeeds.
        rejects_url: the file that lists all of them.

    Raises:
        RunError: more than `max_rejects` were rejected.
    """
    from distrain.data.prepare.rejects import count_images

    if not rejects:
        return
    _print_rejects(rejects)
    num_images = count_images(rejects)
    total = f"{num_images:,} rejected in total, listed in {rejects_url}"
    if num_images <= max_rejects:
        typer.echo(total)
        return
    # The data set is written in any case; the exit code asks the user to look at it.
    raise RunError(
        f"{total}, which is more than --max-rejects {max_rejects}: look at the list; "
        "the data set is usable without them, and the same command with "
        f"--max-rejects {num_images} accepts that"
    )


def _print_rejects(rejects: "Sequence[Reject]") -> None:
    """Print a line for each reason: how many images, and some of their names."""
    from distrain.data.prepare.rejects import group_rejects

    groups = group_rejects(rejects)
    for group in groups[:_MAX_SHOWN_REASONS]:
        names = ", ".join(group.examples)
        rest = "" if group.is_complete else ", ..."
        typer.echo(f"rejected     {group.num_images:,} x {group.reason}: {names}{rest}")
    if len(groups) > _MAX_SHOWN_REASONS:
        num_hidden = len(groups) - _MAX_SHOWN_REASONS
        typer.echo(f"rejected     and for {num_hidden:,} other reasons")
