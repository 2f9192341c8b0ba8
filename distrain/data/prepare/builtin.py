"""Data sets that a run packs by itself on first use, by their names in `data.pack`."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.data.prepare.digits import pack_digits


class BuiltInDataset(NamedTuple):
    """Data set, with the sizes that `--dry-run` shows before it is packed."""

    title: str
    pack_splits: Callable[[str, str], None]
    """Packs the training and the validation set into two URLs. Raises UserError."""
    num_classes: int
    group_rows: NDArray[np.int64]
    """Rows of each row group of the training set."""


# 1,438 training rows, in row groups of at most 100.
_DIGITS_GROUP_ROWS = np.array([100] * 14 + [38])
BUILT_IN_DATASETS = {
    "digits": BuiltInDataset(
        "scikit-learn's digits", pack_digits, 10, _DIGITS_GROUP_ROWS
    )
}
"""Data sets by name; `data.config.DataConfig.pack` has the same names."""
