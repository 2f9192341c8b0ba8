"""Thin a curve to a number of points, without hiding its extremes."""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# First, lowest, highest and last finite value, and the first that is not finite.
_POINTS_PER_BIN = 5


class ThinnedCurve(NamedTuple):
    """Points of a curve, in their order."""

    steps: NDArray[np.int64]
    """Shape (n,)."""
    values: NDArray[np.float64]
    """Shape (n,); NaN where a value is not finite."""
    num_points: int
    """Points before thinning."""
    num_not_finite: int
    """Values among them that are NaN or infinite."""


def thin_curve(
    steps: NDArray[np.int64], values: NDArray[np.float64], max_points: int = 2000
) -> ThinnedCurve:
    """Thin a curve by dividing it into bins of equal numbers of points.

    Of each bin, the first, lowest, highest and last finite value are kept, and the
    first value that is not finite: what the curve does within a bin stays visible.

    Args:
        steps: shape (n,), ascending.
        values: shape (n,).
        max_points: points to keep at most, at least 5; a shorter curve is kept whole.
    """
    n = len(steps)
    is_finite = np.isfinite(values)
    shown_values = np.where(is_finite, values, np.nan)
    num_not_finite = n - int(is_finite.sum())
    if n <= max_points:
        return ThinnedCurve(steps, shown_values, n, num_not_finite)

    kept = list[NDArray[np.int64]]()
    num_bins = max_points // _POINTS_PER_BIN
    bounds = np.linspace(0, n, num_bins + 1).astype(np.int64)
    for start, end in pairwise(bounds.tolist()):
        is_finite_here = is_finite[start:end]
        finite = start + np.flatnonzero(is_finite_here)
        not_finite = start + np.flatnonzero(~is_finite_here)[:1]
        if len(finite):
            values_here = values[finite]
            chosen = [0, int(values_here.argmin()), int(values_here.argmax()), -1]
            kept.append(finite[chosen])
        kept.append(not_finite)
    # Sorted, and each point once.
    indices = np.unique(np.concatenate(kept))
    return ThinnedCurve(steps[indices], shown_values[indices], n, num_not_finite)
