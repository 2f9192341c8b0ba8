"""Layers: what they compute, and that it depends on the micro-batch alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrain.errors import UserError
from distrain.models.layers import (
    AdaptiveAvgPool2d,
    BatchNorm,
    Dropout,
    find_batch_norms,
    flatten_batch_stats,
    micro_batch_context,
    update_all_running_stats,
)
from distrain.models.response_norm import LocalResponseNorm, SpatialResponseNorm

CPU = torch.device("cpu")
ONE = torch.ones(())


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(
        *shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)
    )


def value_and_gradient(layer, x):
    """What a layer makes of x, and the gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y.detach(), torch.autograd.grad(
        (y * random(*y.shape, dtype=y.dtype, seed=1)).sum(), x
    )[0]


@given(
    st.sampled_from([1, 3, 5, 7]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.sampled_from([1.0, 2.0]),
)
def test_lrn_equals_torchs_in_each_tower(size, channels, towers, beta, k):
    ours = LocalResponseNorm(size, alpha=0.5, beta=beta, k=k, groups=towers)
    torchs = nn.LocalResponseNorm(size, alpha=0.5, beta=beta, k=k)

    def each(x):
        return torch.cat([torchs(part) for part in x.split(channels, 1)], 1)

    x = random(2, towers * channels, 3, 4)
    for found, wanted in zip(
        value_and_gradient(ours, x), value_and_gradient(each, x), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_lrn_is_its_formula_and_has_its_gradient():
    """Krizhevsky et al. 2012, section 3.3, written out; with the paper's alpha, before the sum."""
    layer, x = (
        LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0),
        100 * random(1, 9, 2, 2),
    )
    y = layer(x)
    for i in range(9):
        near = x[:, max(0, i - 2) : min(9, i + 3)]
        torch.testing.assert_close(
            y[:, i], x[:, i] / (2 + 1e-4 * near.square().sum(1)) ** 0.75
        )
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_lrn_of_bf16_is_computed_in_fp32():
    x = random(2, 8, 3, 3, dtype=torch.bfloat16)
    y = LocalResponseNorm()(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, LocalResponseNorm()(x.float()), rtol=0, atol=0)


def test_spatial_norm_is_its_formula():
    layer, x = SpatialResponseNorm(5, alpha=25 * 1e-3), 10 * random(2, 3, 9, 9)
    inside = x[:, :, 2:7, 2:7].square().sum((2, 3))
    torch.testing.assert_close(
        layer(x)[:, :, 4, 4], x[:, :, 4, 4] / (1 + 1e-3 * inside) ** 0.75
    )
    corner = x[:, :, :3, :3].square().sum((2, 3))
    torch.testing.assert_close(
        layer(x)[:, :, 0, 0], x[:, :, 0, 0] / (1 + 1e-3 * corner) ** 0.75
    )
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 2), (6, 6), (7, 13)])
@pytest.mark.parametrize("size", [(6, 6), (2, 3)])
def test_pool_equals_torchs(h, w, size):
    x = random(2, 3, h, w)
    # the averages are fp32 numbers
    for a, b in zip(
        value_and_gradient(AdaptiveAvgPool2d(*size), x),
        value_and_gradient(nn.AdaptiveAvgPool2d(size), x),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_pool_makes_its_averages_once_and_one_of_evaluation_serves_training():
    layer, x = AdaptiveAvgPool2d(2, 3), random(2, 3, 7, 13)
    with torch.inference_mode():
        layer(x)
    kept = dict(layer._averaging_matrices)
    value_and_gradient(layer, x)
    assert len(kept) == 2
    assert all(layer._averaging_matrices[key] is matrix for key, matrix in kept.items())
    assert layer(x.float()).dtype == torch.float32
    assert not layer.state_dict()


def norms(features=6, **options):
    """Ours and torch's, with the same scale and shift."""
    ours, theirs = BatchNorm(features, **options), nn.BatchNorm2d(features, **options)
    if ours.weight is not None:
        with torch.no_grad():
            ours.weight.copy_(random(features))
            ours.bias.copy_(random(features, seed=2))
    theirs.load_state_dict(
        ours.state_dict()
    )  # torch fills in the count that we do not keep
    return ours.double(), theirs.double()


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_equals_torchs_in_training_and_evaluation(affine):
    ours, theirs = norms(affine=affine, eps=1e-3)
    x = 3 + 2 * random(4, 6, 5, 5)
    with micro_batch_context(0, 0, 0):
        found = value_and_gradient(ours, x)
    for a, b in zip(found, value_and_gradient(theirs, x), strict=True):
        torch.testing.assert_close(a, b)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("v", [1, 2, 4])
def test_running_moments_are_those_of_the_global_batch(v):
    """However many micro-batches it is cut into; a forward alone moves nothing."""
    model = nn.Sequential(
        BatchNorm(6, momentum=0.25), nn.Conv2d(6, 2, 1), BatchNorm(2)
    ).double()
    first, second = find_batch_norms(model)
    x = 3 + 2 * random(8, 6, 5, 5)
    told = []
    for i, part in enumerate(x.split(8 // v)):
        with micro_batch_context(0, 0, i) as now:
            model(part)
        told.append(flatten_batch_stats([first, second], now, CPU))
    assert not first.running_mean.any()
    assert (first.running_var == 1).all()
    mean = torch.stack(told).mean(0)
    update_all_running_stats([first, second], mean, 0 * ONE)
    assert not first.running_mean.any(), "a step that may not move moves nothing"
    update_all_running_stats([first, second], mean, ONE)
    torch.testing.assert_close(first.running_mean, 0.25 * x.mean((0, 2, 3)))
    torch.testing.assert_close(
        first.running_var, 0.75 + 0.25 * x.var((0, 2, 3), unbiased=False)
    )
    assert (second.running_mean != 0).all()


def test_a_channel_that_does_not_vary_keeps_a_variance_of_zero():
    layer = BatchNorm(1, momentum=1.0)
    with micro_batch_context(0, 0, 0) as now:
        layer(torch.full((4, 1, 2, 2), 1000.3))
    update_all_running_stats([layer], flatten_batch_stats([layer], now, CPU), ONE)
    assert 0 <= float(layer.running_var) < 1e-6
    layer.update_running_stats(
        torch.tensor([[0.5], [0.25 - 2**-30]], dtype=torch.float64), ONE
    )  # as the fixed point may round it
    assert float(layer.running_var) == 0


def test_batch_norm_in_bf16():
    ours, _ = norms()
    with micro_batch_context(0, 0, 0) as now, torch.autocast("cpu", torch.bfloat16):
        y = ours.float()(random(4, 6, 5, 5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert now.batch_stats[ours].dtype == torch.float64


def test_a_batch_norm_used_twice_is_refused():
    layer = BatchNorm(3)
    with micro_batch_context(0, 0, 0), pytest.raises(UserError, match="used twice"):
        layer(layer(torch.randn(2, 3, 4, 4)))


def mask(p=0.5, key=(0, 0, 0), layer=0, n=100_000):
    with micro_batch_context(*key):
        return Dropout(p, layer).train()(torch.ones(n))


def test_dropout_mask_is_a_function_of_its_key():
    assert torch.equal(mask(), mask())
    for other in (
        mask(key=(1, 0, 0)),
        mask(key=(0, 1, 0)),
        mask(key=(0, 0, 1)),
        mask(layer=1),
    ):
        assert abs(float(((mask() > 0) == (other > 0)).float().mean()) - 0.5) < 0.01


def test_each_use_of_a_dropout_layer_has_its_mask():
    layer, x = Dropout(0.5, 0), torch.ones(10_000)
    with micro_batch_context(0, 0, 0):
        first, second = layer(x), layer(x)
    assert torch.equal(first, mask(n=10_000))
    assert abs(float(((first > 0) == (second > 0)).float().mean()) - 0.5) < 0.03


def test_dropout_keeps_the_expectation():
    out = mask(p=0.3)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    x = torch.randn(10)
    assert Dropout(0.5, 0).eval()(x) is x
