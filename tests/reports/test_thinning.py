from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from distrain.reports.thinning import thin_curve


@given(
    arrays(np.float64, st.integers(0, 400), elements=st.floats(width=64)),
    st.integers(5, 60),
)
def test_extremes_order_and_what_is_not_finite_stay(values, max_points):
    steps = np.arange(len(values)) * 3
    thinned = thin_curve(steps, values, max_points)
    assert len(thinned.steps) == len(thinned.values) <= max(max_points, 0)
    assert (np.diff(thinned.steps) > 0).all()
    finite = values[np.isfinite(values)]
    shown = thinned.values[np.isfinite(thinned.values)]
    if len(finite):
        assert (shown.min(), shown.max()) == (finite.min(), finite.max())
    kept = values[thinned.steps // 3]
    assert np.array_equal(np.isfinite(kept), np.isfinite(thinned.values))
    assert np.array_equal(kept[np.isfinite(kept)], shown)
    assert thinned.num_points == len(values)
    assert thinned.num_not_finite == len(values) - len(finite)
    assert np.isnan(thinned.values).any() == (thinned.num_not_finite > 0)


@given(arrays(np.float64, st.integers(20, 300), elements=st.floats(-1e6, 1e6)))
def test_each_bin_keeps_its_first_lowest_highest_and_last(values):
    steps = np.arange(len(values))
    thinned = thin_curve(steps, values, 15)
    if len(values) <= 15:
        return
    bounds = np.linspace(0, len(values), 4).astype(int)
    for start, end in pairwise(bounds.tolist()):
        here = values[start:end]
        kept = set(thinned.steps.tolist())
        assert {start, end - 1, start + here.argmin(), start + here.argmax()} <= kept


def test_a_bin_of_five_different_points_is_within_the_limit():
    """First, lowest, highest, last, and one that is not finite."""
    pattern = [1.0, 0.0, 2.0, np.nan, np.inf, 1.0]
    values = np.array(pattern * 10)
    thinned = thin_curve(np.arange(60), values, 50)
    assert len(thinned.steps) == 50
    assert thinned.steps[:5].tolist() == [0, 1, 2, 3, 5]
    assert thinned.num_not_finite == 20


@pytest.mark.parametrize("n", [0, 1, 2000])
def test_a_short_curve_is_kept_whole(n):
    thinned = thin_curve(np.arange(n), np.arange(n) / 2)
    assert thinned.steps.tolist() == list(range(n))
