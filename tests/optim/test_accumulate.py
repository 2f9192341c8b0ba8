"""Rules 2 and 3, and the gradient itself."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.losses import CrossEntropy
from distrain.models.alexnet import AlexNet
from distrain.models.layers import micro_batch_context
from distrain.optim.accumulate import GradientAccumulator
from distrain.training.forward_pass import count_correct

CPU = torch.device("cpu")


@pytest.fixture
def lanes():
    with LanePool(2, 1, CPU) as pool:
        yield pool


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def accumulate(model, images, labels, weights, v, lanes, order=None, bits=48):
    """One step over V micro-batches."""
    parameters = list(model.parameters())
    b = len(images) // v
    accumulator = GradientAccumulator(
        parameters, num_virtual_workers=v, micro_batch_size=b, fraction_bits=bits
    )
    accumulator.begin_step()
    for i in order or range(v):
        part = slice(i * b, (i + 1) * b)
        with micro_batch_context(0, 0, i):
            logits = model(images[part])
        loss = (CrossEntropy()(logits, labels[part]) * weights[part]).sum()
        gradients = torch.autograd.grad(loss * accumulator.loss_scale, parameters)
        hits = [count_correct(logits, labels[part], weights[part], k) for k in (1, 5)]
        accumulator.add_micro_batch(
            gradients, loss.detach(), weights[part].sum(), *hits
        )
    totals = accumulator.start_all_reduce(World(CPU))
    accumulator.write_gradients(totals, lanes)
    return totals, [p.grad.clone() for p in parameters], accumulator


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_equals_autograd_on_the_whole_global_batch(v, mode, lanes):
    """Float64, with invalid samples spread unevenly: the mean is over valid samples, no mean of means."""
    model = network()
    images, labels = torch.randn(32, 6, dtype=torch.float64), torch.randint(0, 4, (32,))
    weights = torch.ones(32, dtype=torch.float64)
    weights[[0, 1, 2, 3, 4, 5, 6, 7, 9, 30]] = (
        0  # for V = 4 a whole micro-batch is invalid
    )
    totals, found, accumulator = accumulate(
        model, images, labels, weights, v, lanes, bits=48 if mode == "exact" else None
    )
    valid = weights > 0
    loss = nn.functional.cross_entropy(model(images[valid]), labels[valid])
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert (int(totals.valid_count), int(totals.violation_count)) == (22, 0)
    assert int(totals.loss_sum) / 2**accumulator.loss_shift / 22 == pytest.approx(
        float(loss.detach()), abs=1e-11
    )
    assert int(totals.top1_count) == int(
        (model(images[valid]).argmax(1) == labels[valid]).sum()
    )


@pytest.fixture(scope="module")
def in_order():
    """Gradients of eight micro-batches in any order, by default one after another."""
    model = AlexNet(width=0.04).build(10, seed=0)
    generator = torch.Generator().manual_seed(0)
    images, labels = (
        torch.randn(16, 3, 64, 64, generator=generator),
        torch.arange(16) % 10,
    )
    with LanePool(1, 1, CPU) as pool:
        gradients = partial(accumulate, model, images, labels, torch.ones(16), 8, pool)
        yield gradients, gradients()[1]


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(8)))
def test_exact_sums_do_not_depend_on_order(in_order, order):
    gradients, wanted = in_order
    assert all(
        torch.equal(a, b)
        for a, b in zip(gradients(order=order)[1], wanted, strict=True)
    )


def test_float_sums_do_depend_on_it(lanes):
    """So the test above can fail."""
    model = AlexNet(width=0.04).build(10, seed=0)
    images, labels, ones = (
        torch.randn(16, 3, 64, 64),
        torch.arange(16) % 10,
        torch.ones(16),
    )
    a = accumulate(model, images, labels, ones, 8, lanes, bits=None)[1]
    b = accumulate(
        model, images, labels, ones, 8, lanes, order=[3, 1, 4, 0, 5, 7, 2, 6], bits=None
    )[1]
    assert not all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_a_power_of_two_moves_no_bit():
    model = AlexNet(width=0.04).build(10, seed=0)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)

    def gradients(scale):
        with micro_batch_context(0, 0, 0):
            loss = CrossEntropy()(model(images), labels).sum()
        return torch.autograd.grad(loss * scale, list(model.parameters()))

    for plain, scaled in zip(gradients(1.0), gradients(2.0**41), strict=True):
        assert torch.equal(plain * 2.0**41, scaled)


def filled(value, v=4, bits=48):
    p = nn.Parameter(torch.zeros(5))
    accumulator = GradientAccumulator(
        [p], num_virtual_workers=v, micro_batch_size=2, fraction_bits=bits
    )
    accumulator.begin_step()
    for i in range(v):
        gradient = torch.full((5,), 1.0) * accumulator.loss_scale
        if i == 2:
            gradient[3] = value
        accumulator.add_micro_batch(
            [gradient],
            torch.tensor(0.5),
            torch.tensor(2.0),
            torch.tensor(1),
            torch.tensor(2),
        )
    return p, accumulator


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 2.0**61, -(2.0**62)]
)
def test_a_violation_adds_zeros_and_is_counted(value, lanes):
    p, accumulator = filled(value)
    totals = accumulator.start_all_reduce(World(CPU))
    accumulator.write_gradients(totals, lanes)
    assert int(totals.violation_count) == 1
    assert torch.equal(p.grad, torch.full((5,), 3 / 8))


def test_no_sum_can_wrap(lanes):
    """The largest gradients that pass: V of them stay below 2^63."""
    largest = float(np.nextafter(np.float32(2.0**61), np.float32(0)))
    p = nn.Parameter(torch.zeros(1))
    accumulator = GradientAccumulator(
        [p], num_virtual_workers=4, micro_batch_size=2, fraction_bits=48
    )
    for sign in (1, -1):
        accumulator.begin_step()
        for _ in range(4):
            accumulator.add_micro_batch(
                [torch.tensor([sign * largest])],
                torch.tensor(0.0),
                torch.tensor(2.0),
                torch.tensor(0),
                torch.tensor(0),
            )
        totals = accumulator.start_all_reduce(World(CPU))
        accumulator.write_gradients(totals, lanes)
        assert int(totals.violation_count) == 0
        assert float(p.grad[0]) == pytest.approx(
            sign * 4 * largest / accumulator.loss_scale / 8
        )


def test_a_loss_that_is_not_finite_is_a_violation():
    p = nn.Parameter(torch.zeros(2))
    accumulator = GradientAccumulator(
        [p], num_virtual_workers=1, micro_batch_size=2, fraction_bits=48
    )
    accumulator.begin_step()
    zero = torch.tensor(0)
    accumulator.add_micro_batch(
        [torch.zeros(2)], torch.tensor(float("nan")), torch.tensor(2.0), zero, zero
    )
    assert int(accumulator.start_all_reduce(World(CPU)).violation_count) == 1


def told(moments, bits=48):
    """The totals of micro-batches that told these moments, in this order; and their mean."""
    accumulator = GradientAccumulator(
        [nn.Parameter(torch.zeros(2))],
        num_virtual_workers=len(moments),
        micro_batch_size=2,
        fraction_bits=bits,
        num_batch_stats=3,
    )
    accumulator.begin_step()
    zero = torch.tensor(0)
    for values in moments:
        own = torch.tensor(values, dtype=torch.float64)
        accumulator.add_micro_batch(
            [torch.zeros(2)], torch.tensor(0.5), torch.tensor(2.0), zero, zero, own
        )
    return accumulator.start_all_reduce(
        World(CPU)
    ), accumulator.mean_batch_stats.clone()


@given(
    st.lists(
        st.lists(st.floats(-1e5, 1e5), min_size=3, max_size=3), min_size=1, max_size=9
    ),
    st.randoms(),
)
@pytest.mark.parametrize("bits", [48, None])
def test_moments_are_a_mean_that_does_not_depend_on_order(bits, moments, random):
    """In both modes, to the fixed point's 2^-30."""
    totals, mean = told(moments, bits)
    np.testing.assert_allclose(mean.numpy(), np.mean(moments, 0), atol=2.0**-29)
    assert int(totals.valid_count) == 2 * len(moments)
    shuffled = list(moments)
    random.shuffle(shuffled)
    assert torch.equal(told(shuffled, bits)[1], mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0**40])
def test_moments_that_are_out_of_range_are_a_violation(value):
    totals, mean = told([[1.0, 2.0, 3.0], [1.0, value, 3.0]])
    assert int(totals.violation_count) == 1
    assert mean.tolist() == [0.5, 1.0, 1.5], "it adds zeros"


def test_begin_forgets_the_step_before(lanes):
    p, accumulator = filled(1.0)
    accumulator.write_gradients(accumulator.start_all_reduce(World(CPU)), lanes)
    accumulator.begin_step()
    totals = accumulator.start_all_reduce(World(CPU))
    accumulator.write_gradients(totals, lanes)
    assert int(totals.valid_count) == 0
    assert not p.grad.any()
