import pytest
import torch
import torchvision

from distrain.model import AveragePool6, Dropout, LocalResponseNorm, build, parameter_count, randomness
from distrain.sections import Model


def test_alexnet_is_torchvisions():
    ours = build(Model(), 1000, seed=0).eval()
    theirs = torchvision.models.alexnet(weights=None).eval()
    assert parameter_count(Model(), 1000) == sum(p.numel() for p in theirs.parameters()) == 61_100_840
    theirs.load_state_dict(ours.state_dict())
    for side in (224, 64):
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(x), theirs(x))


def test_alexnet2012_counts_and_shapes():
    model = build(Model(name="alexnet2012"), 1000, seed=0).eval()
    assert sum(p.numel() for p in model.parameters()) == 60_965_224
    sizes = []
    for layer in (model.conv1, model.conv2, model.conv3, model.conv4, model.conv5, model.fc8):
        layer.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[1:])))
    model(torch.zeros(1, 3, 224, 224))
    assert sizes == [(96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13), (1000,)]
    assert float(model.conv3.weight.detach().std()) == pytest.approx(0.03, rel=0.01)
    assert float(model.conv2.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert [float(b.bias.detach()[0]) for b in (model.conv1, model.conv2, model.conv3, model.conv4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["alexnet", "alexnet2012"])
def test_first_weights_are_a_function_of_the_seed(name):
    a, b, c = (build(Model(name=name, width=0.05), 10, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a[next(iter(a))], c[next(iter(a))])


def test_width_scales_everything():
    model = build(Model(width=0.25), 10, seed=0)
    assert [m.out_channels for m in model.features if hasattr(m, "out_channels")] == [16, 48, 96, 64, 64]
    assert model.classifier[1].out_features == 1024


def test_lrn_equals_torchs_in_each_tower():
    x = torch.randn(2, 12, 5, 5, dtype=torch.float64, requires_grad=True)
    ours = LocalResponseNorm(groups=2)(x)
    torchs = torch.nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
    theirs = torch.cat([torchs(x[:, :6]), torchs(x[:, 6:])], 1)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (3, 2), (6, 6), (7, 13)])
def test_pool_equals_torchs(h, w):
    x = torch.randn(2, 3, h, w, dtype=torch.float64, requires_grad=True)
    ours, theirs = AveragePool6()(x), torch.nn.AdaptiveAvgPool2d(6)(x)
    # the averages are fp32 numbers
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def mask(p=0.5, key=(0, 0, 0), layer=0, n=100_000):
    with randomness(*key):
        return Dropout(p, layer).train()(torch.ones(n))


def test_dropout_mask_is_a_function_of_its_key():
    assert torch.equal(mask(), mask())
    for other in (mask(key=(1, 0, 0)), mask(key=(0, 1, 0)), mask(key=(0, 0, 1)), mask(layer=1)):
        assert abs(float(((mask() > 0) == (other > 0)).float().mean()) - 0.5) < 0.01


def test_dropout_keeps_the_expectation():
    out = mask(p=0.3)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    x = torch.randn(10)
    assert Dropout(0.5, 0).eval()(x) is x


def test_no_global_generator_inside_a_step(monkeypatch):
    """Rule 4: the global generators may not be used by forward and backward."""
    before = torch.get_rng_state()

    def refuse(*_args, **_kwargs):
        raise AssertionError("global random function used")

    for name in ("rand", "randn", "randint", "randperm", "bernoulli", "dropout"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(torch.nn.functional, "dropout", refuse)
    for name in ("alexnet", "alexnet2012"):
        model = build(Model(name=name, width=0.05), 10, seed=0)
        with randomness(0, 0, 0):
            model(torch.zeros(2, 3, 64, 64)).sum().backward()
    assert torch.equal(before, torch.get_rng_state())
