"""Weights of classes have a mean of 1 over the samples, whatever the counts; balanced classes weigh alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.errors import UserError
from distrain.training.class_weights import compute_class_weights

COUNTS = st.lists(st.integers(0, 10**7), min_size=2, max_size=20).filter(any)


@given(COUNTS)
def test_balanced(counts):
    weights = compute_class_weights("balanced", counts)
    sums = [weight * count for weight, count in zip(weights, counts, strict=True)]
    num_classes = sum(count > 0 for count in counts)
    for count, total in zip(counts, sums, strict=True):
        assert total == pytest.approx(sum(counts) / num_classes if count else 0.0)


@given(COUNTS, st.data())
def test_a_list_keeps_its_ratios(counts, data):
    size = len(counts)
    given_weights = data.draw(
        st.lists(st.floats(0.01, 100), min_size=size, max_size=size)
    )
    weights = compute_class_weights(given_weights, counts)
    sums = [weight * count for weight, count in zip(weights, counts, strict=True)]
    assert sum(sums) == pytest.approx(sum(counts))
    for weight, wanted in zip(weights, given_weights, strict=True):
        assert weight / weights[0] == pytest.approx(wanted / given_weights[0])


def test_what_cannot_be_normalized():
    with pytest.raises(
        UserError, match="has 1 weights, and the data set has 2 classes"
    ):
        compute_class_weights([1.0], [3, 4])
    with pytest.raises(UserError, match="gives weight 0 to all samples"):
        compute_class_weights([0.0, 1.0], [3, 0])
