"""Pack one source into a training and a validation set of the same classes.

One pass over the images decides which are for validation (see `validation_rows`). Its
result is kept beside the notes of the pack, so that an interrupted one does not repeat
it. Then each side is packed as a source of its own.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np

from distrain.data.prepare.pack import (
    PackResult,
    check_packable,
    find_finished_pack,
    get_location,
    pack_dataset,
)
from distrain.data.prepare.pack_notes import (
    SIDES_FILE,
    claim_target,
    has_notes,
    remove_notes,
)
from distrain.data.prepare.pack_options import PackOptions
from distrain.data.prepare.plan import encode_plan
from distrain.data.prepare.row_selection import select_rows
from distrain.data.prepare.source import RETRY_SECONDS, DatasetProgress, ImageSource
from distrain.data.prepare.validation_rows import (
    RowSides,
    choose_sides,
    count_sides,
    decode_sides,
    encode_sides,
    hash_source,
)
from distrain.data.storage.store import Store
from distrain.errors import UserError


class SplitTargets(NamedTuple):
    """URLs of the two data sets."""

    train: str
    val: str


class _Side(NamedTuple):
    """One of the two data sets."""

    source: ImageSource
    """All rows of the source, with the plan of this side."""
    store: Store
    plan: bytes
    finished: PackResult | None
    """Result of an earlier pack that has finished."""


def get_split_targets(target: str, val_dst: str | None) -> SplitTargets:
    """Return where the two data sets go.

    Args:
        target: the training set's folder, or the folder of both.
        val_dst: the validation set's folder; None: both are in `target`.
    """
    if val_dst is not None:
        return SplitTargets(target, val_dst)
    folder = target.rstrip("/")
    return SplitTargets(f"{folder}/train", f"{folder}/val")


def check_fraction(fraction: float) -> None:
    """Raise UserError if a fraction for validation is not between 0 and 1."""
    # From Python it may be a text or a boolean.
    is_number = isinstance(fraction, float | int) and not isinstance(fraction, bool)
    if not is_number or not 0 < fraction < 1:
        raise UserError(
            f"val {fraction} is not valid: use a fraction between 0 and 1, such as 0.1"
        )


def pack_split(
    source: ImageSource,
    targets: SplitTargets,
    fraction: float,
    options: PackOptions,
    *,
    num_processes: int = 1,
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
    log: Callable[[str], None] | None = None,
) -> PackResult:
    """Pack some images of a source for validation, and the others for training.

    Args:
        source: the images.
        targets: URLs or paths of the two data sets. See `pack_dataset`.
        fraction: of the images that are for validation, in expectation.
        options: see `pack_dataset`.
        num_processes: see `pack_dataset`.
        on_progress: see `pack_dataset`; the stages are counted on their own.
        log: see `pack_dataset`.

    Returns:
        The training set's result, with the validation set's, and the images of both by
        class unless both had been packed before.

    Raises:
        UserError: see `pack_dataset`; or one side gets no image.
        RunError: a process was killed.
        OSError: source or targets fail for longer than a minute.
    """
    # Claim both targets before any image is read.
    train = _open_side(source, "train", targets.train, fraction, options, log)
    val = _open_side(source, "val", targets.val, fraction, options, log)
    if get_location(train.store) == get_location(val.store):
        raise UserError(
            f"{val.store.redacted_url} is the place of the training and of the "
            "validation set: choose two folders"
        )
    if train.finished is not None and val.finished is not None:
        num_rows = sum(block.num_rows for block in source.blocks)
        on_progress(DatasetProgress(num_rows, num_rows, 0))
        return train.finished._replace(val=val.finished)
    _claim_targets(train, val)

    # Decide which rows are for validation, unless an interrupted pack has. The
    # validation set is packed last, so it keeps the decision.
    keeper = train.store if val.finished is not None else val.store
    if keeper.exists(SIDES_FILE):
        sides = decode_sides(keeper.read(SIDES_FILE, retry_seconds=RETRY_SECONDS))
    else:
        pixel_limit = options.pixel_limit
        hashes = hash_source(source, pixel_limit, num_processes, on_progress)
        sides = choose_sides(hashes, fraction)
        _check_sides(sides, train, val, fraction)
        keeper.write(SIDES_FILE, encode_sides(sides), retry_seconds=RETRY_SECONDS)

    # Pack both. What does not decode is rejected by the training side alone.
    results: list[PackResult] = []
    for side, is_selected, stage in (
        (train, ~sides.is_validation, "training"),
        (val, sides.is_validation, "validation"),
    ):
        results.append(
            side.finished
            or pack_dataset(
                select_rows(side.source, is_selected),
                side.store.url,
                options,
                num_processes=num_processes,
                on_progress=_name_stage(on_progress, stage),
                log=log,
            )
        )
    counts = count_sides(sides, len(source.classes))
    return results[0]._replace(val=results[1], split=counts)


def _name_stage(
    on_progress: Callable[[DatasetProgress], None], stage: str
) -> Callable[[DatasetProgress], None]:
    """Return a callback that names the stage of the work."""
    return lambda progress: on_progress(progress._replace(stage=stage))


def _open_side(
    source: ImageSource,
    name: str,
    url: str,
    fraction: float,
    options: PackOptions,
    log: Callable[[str], None] | None,
) -> _Side:
    """Return a side, and whether it has been packed before. Raises UserError."""
    store = Store(url, log=log)
    check_packable(source, store, options)
    # The rows of a side follow from all rows and from these two.
    details = [source.plan_details, {"side": name, "val": fraction}]
    rejects = source.rejects if name == "train" else []
    side_source = replace(source, rejects=rejects, plan_details=details)
    plan = encode_plan(side_source, asdict(options))
    return _Side(side_source, store, plan, find_finished_pack(store, plan))


def _claim_targets(train: _Side, val: _Side) -> None:
    """Claim the targets that are not finished. Raises UserError."""
    had_notes = has_notes(train.store)
    if train.finished is None:
        claim_target(train.store, train.plan, 0)
    if val.finished is None:
        try:
            claim_target(val.store, val.plan, 0)
        except UserError:
            # The next try may have other targets.
            if train.finished is None and not had_notes:
                remove_notes(train.store)
            raise


def _check_sides(sides: RowSides, train: _Side, val: _Side, fraction: float) -> None:
    """Raise UserError if one side has no image; the targets are free again."""
    is_image = sides.labels >= 0
    num_images = int(np.count_nonzero(is_image))
    num_val = int(np.count_nonzero(sides.is_validation))
    if 0 < num_val < num_images:
        return
    for side in (train, val):
        if side.finished is None:
            remove_notes(side.store)
    url = train.source.store.redacted_url
    if not num_images:
        raise UserError(
            f"none of the {len(is_image):,} images in {url} could be decoded: "
            "distrain pack without val lists the reasons"
        )
    if int(np.count_nonzero(sides.follows)) == num_images - 1:
        raise UserError(
            f"{url} has a single image and {num_images - 1:,} copies of it, and equal "
            "images are never divided: add other images, or pack without val"
        )
    name = "training" if num_val else "validation"
    change = "smaller" if num_val else "larger"
    raise UserError(
        f"none of the {num_images:,} images in {url} is for {name} with val "
        f"{fraction}: use a {change} fraction"
    )
