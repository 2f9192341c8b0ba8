import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.batch import MicroBatch
from distrain.data.order import Cursor
from distrain.inference.ensemble import CROPS, Ensemble


def batch(chunk, value):
    """Images whose first pixel is a value; networks below read it."""
    images = torch.full((2, 3, 4, 4), 0.0)
    images[:, :, :, 0] = value
    return MicroBatch(
        Cursor(0, chunk),
        0,
        np.arange(2),
        images,
        torch.zeros(2, dtype=torch.int64),
        torch.ones(2),
        {},
        lambda pixels: pixels,
    )


def network(scale):
    def compute_logits(images):
        left, right = images[:, 0, 0, 0], images[:, 0, 0, -1]
        return torch.stack([left * scale, right * scale, -left], 1)

    return compute_logits


def test_one_crop_of_one_network_is_not_averaged():
    ensemble = Ensemble([network(1)], CROPS["center"])
    found = ensemble.add_part(0, batch(0, 2.0))
    assert (found.logits == torch.tensor([[2.0, 0.0, -2.0]])).all()
    assert torch.allclose(found.probabilities.sum(1), torch.ones(2).double())


@settings(max_examples=10)
@given(order=st.permutations(range(10)))
def test_the_order_of_the_parts_changes_no_bit(order):
    """Five windows by two networks, mirrored too, in any order."""
    parts = list(itertools.product(range(2), range(5)))

    def run(order):
        ensemble = Ensemble([network(1.0), network(0.3)], CROPS["ten"])
        results = []
        for i in order:
            member, window = parts[i]
            results.append(ensemble.add_part(member, batch(7, window / 3)))
        assert all(result is None for result in results[:-1])
        return results[-1].probabilities

    plain = run(range(10))
    assert torch.equal(run(order), plain)
    terms = [
        network((1.0, 0.3)[member])(view).double().softmax(1)
        for member, window in parts
        for images in [batch(0, window / 3).images]
        for view in (images, images.flip(3))
    ]
    assert torch.allclose(torch.stack(terms).mean(0), plain, atol=1e-14)


def test_chunks_are_kept_apart():
    ensemble = Ensemble([network(1), network(1)], CROPS["center"])
    assert ensemble.add_part(0, batch(0, 1.0)) is None
    assert ensemble.add_part(0, batch(1, 5.0)) is None
    second = ensemble.add_part(1, batch(1, 5.0))
    first = ensemble.add_part(1, batch(0, 1.0))
    wanted = network(1)(batch(0, 1.0).images).double().softmax(1)
    assert torch.allclose(first.probabilities, wanted)
    assert second.probabilities[0, 0] > first.probabilities[0, 0]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_what_is_not_finite_counts_for_nothing(value):
    """And the logarithm of a probability of zero is finite."""
    ensemble = Ensemble([network(1), network(1)], CROPS["center"])
    ensemble.add_part(0, batch(0, value))
    found = ensemble.add_part(1, batch(0, value))
    assert found.logits.isfinite().all()


def test_a_network_that_has_diverged_counts_for_nothing():
    """Beside one that has not, on every device: as an integer NaN would be another number on each."""
    ensemble = Ensemble([network(1), network(float("nan"))], CROPS["center"])
    ensemble.add_part(1, batch(0, 1.0))
    found = ensemble.add_part(0, batch(0, 1.0))
    alone = network(1)(batch(0, 1.0).images).double().softmax(1)
    assert torch.allclose(found.probabilities, alone / 2, atol=1e-14)
