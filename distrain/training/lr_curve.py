"""Learning rate over a run, which its config determines: `distrain lr`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.config import Config, check_is_config
from distrain.data.prepare.builtin import BUILT_IN_DATASETS
from distrain.data.shards.manifest import MANIFEST_FILE
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.training.run_data import build_order, open_datasets


class LrPoint(NamedTuple):
    """Learning rate of one step."""

    step: int
    epoch: float
    """Epochs done before the step."""
    lr: float


def lr(
    config: Config,
    *,
    images: int | None = None,
    points: int = 2000,
    png: str | Path | None = None,
) -> list[LrPoint]:
    """Return the learning rate at steps spread evenly over the run.

    The first and the last step are among them. Of a plateau schedule only the warm-up
    is known in advance.

    Args:
        config: the run.
        images: number of training images. Default: those of the data set.
        points: steps to return, at least 2; fewer if the run is shorter.
        png: plot them into this image file as well.

    Raises:
        UserError: `images` is less than one global batch, `points` is less than 2, the
            data does not fit, or the file cannot be plotted.
    """
    check_is_config(config, "lr")
    if images is not None and images < config.global_batch:
        raise UserError(
            f"images = {images} is less than one global batch ({config.global_batch}): "
            "pass more"
        )
    if points < 2:
        raise UserError(f"points {points} is not valid: use at least 2")
    # Given the number of images, the data set need not exist.
    if images is None:
        order = build_order(config, _load_group_rows(config))
        steps_per_epoch = order.steps_per_epoch
    else:
        steps_per_epoch = images // config.global_batch
    num_steps = config.epochs * steps_per_epoch

    # Evenly spaced; a set, because in a short run several points fall on one step.
    last_step = num_steps - 1
    steps = {round(i * last_step / (points - 1)) for i in range(points)}
    curve = []
    for step in sorted(steps):
        rate = config.schedule.get_lr(step, steps_per_epoch, num_steps)
        curve.append(LrPoint(step, step / steps_per_epoch, rate))
    if png is not None:
        _plot_lr_curve(config, curve, png)
    return curve


def _load_group_rows(config: Config) -> NDArray[np.int64]:
    """Return the rows per row group of the training set, shape (groups,).

    Raises:
        UserError: the data sets are not there, or do not fit the config.
    """
    if config.data.pack and not Store(config.data.train).exists(MANIFEST_FILE):
        return BUILT_IN_DATASETS[config.data.pack].group_rows
    try:
        train, _ = open_datasets(config)
    except UserError as error:
        raise UserError(
            f"{error}; or pass the number of images alone: --images N (lr(images=N))"
        ) from None
    return train.manifest.rows_per_group


def _plot_lr_curve(
    config: Config, curve: Sequence[LrPoint], target: str | Path
) -> None:
    """Plot learning rates into an image file.

    The axis is logarithmic for schedules that multiply the rate by factors.

    Raises:
        UserError: matplotlib is not installed, or cannot write this file.
    """
    try:
        # Not pyplot, which would choose a backend that may need a display.
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the plot needs matplotlib: pip install 'distrain[report]'"
        ) from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([point.epoch for point in curve], [point.lr for point in curve])
    axes.set(
        xlabel="epoch",
        ylabel="learning rate",
        title=f"{config.run}: {config.schedule.name}",
    )
    axes.set_yscale("log" if config.schedule.is_multiplicative else "linear")
    axes.grid(visible=True, alpha=0.3)
    # matplotlib reports a suffix that it does not know as a ValueError; a folder may be
    # missing. It would add a suffix to a name without one.
    try:
        figure.savefig(target, format=Path(target).suffix[1:] or "png")
    except IsADirectoryError:
        raise UserError(
            f"{target} is a folder: name an image file in it, such as "
            f"{Path(target) / 'lr.png'}"
        ) from None
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"cannot plot into {target}: {error}") from None
