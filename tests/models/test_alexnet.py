"""The networks of distrain's own: shapes, counts, first weights, and what they equal."""

import pytest
import torch
import torchvision
from torch import nn

from distrain.models.alexnet import AlexNet, AlexNet2012, AlexNetBN
from distrain.models.layers import BatchNorm, Dropout, micro_batch_context
from distrain.models.response_norm import LocalResponseNorm, SpatialResponseNorm

NETWORKS = [
    AlexNet(width=0.05),
    AlexNet2012(width=0.05),
    AlexNet2012(width=0.05, layers="paper", lrn="paper", init="paper"),
    AlexNetBN(width=0.05),
    AlexNetBN(
        width=0.05, place="after_pool", hidden=True, affine=False, init="gaussian"
    ),
]


def parameters(network) -> int:
    return sum(p.numel() for p in network.build_skeleton(1000).parameters())


def test_alexnet_is_torchvisions():
    ours = AlexNet().build(1000, seed=0).eval()
    theirs = torchvision.models.alexnet(weights=None).eval()
    assert (
        parameters(AlexNet())
        == sum(p.numel() for p in theirs.parameters())
        == 61_100_840
    )
    theirs.load_state_dict(ours.state_dict())
    for side in (224, 64):
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(ours(x), theirs(x))


def shapes(model: nn.Module, side: int) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.Linear):
            layer.register_forward_hook(
                lambda _m, _i, out, name=name: found.update(
                    {name: tuple(out.shape[1:])}
                )
            )
    model.eval()(torch.zeros(1, 3, side, side))
    return found


@pytest.mark.parametrize("network", [AlexNet2012(), AlexNetBN()])
@pytest.mark.parametrize("side", [224, 227])
def test_the_two_towers_have_the_shapes_of_2012(network, side):
    assert shapes(network.build(1000, seed=0), side) == {
        "conv1": (96, 55, 55),
        "pool1": (96, 27, 27),
        "conv2": (256, 27, 27),
        "pool2": (256, 13, 13),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "pool5": (256, 6, 6),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }


def test_parameter_counts():
    """Of the towers with batch normalisation: a scale and a shift for each of 96 + 256 + 384 + 384 + 256 channels."""
    assert parameters(AlexNet2012()) == 60_965_224
    assert parameters(AlexNetBN()) == 60_965_224 + 2 * 1376
    assert parameters(AlexNetBN(hidden=True)) == 60_965_224 + 2 * (1376 + 2 * 4096)
    assert parameters(AlexNetBN(hidden=True, affine=False)) == 60_965_224


@pytest.mark.parametrize(("init", "wide"), [("source", 0.03), ("paper", 0.01)])
def test_first_weights_of_2012(init, wide):
    model = dict(AlexNet2012(init=init, width=0.5).build(1000, seed=0).named_children())
    weighted = [name for name, layer in model.items() if hasattr(layer, "weight")]
    assert weighted == [
        "conv1",
        "conv2",
        "conv3",
        "conv4",
        "conv5",
        "fc6",
        "fc7",
        "fc8",
    ]
    for name in weighted:
        deviation = wide if name in ("conv3", "conv4", "conv5") else 0.01
        assert float(model[name].weight.detach().std()) == pytest.approx(
            deviation, rel=0.02
        ), name
        assert float(model[name].weight.detach().mean()) == pytest.approx(
            0, abs=deviation / 50
        ), name
        ones = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
        assert model[name].bias.unique().tolist() == [float(ones)], name


def test_first_weights_with_batch_normalisation():
    he = dict(AlexNetBN(width=0.5).build(1000, seed=0).named_children())
    assert float(he["conv3"].weight.detach().std()) == pytest.approx(
        (2 / (128 * 9)) ** 0.5, rel=0.01
    )
    assert not he["conv3"].bias.detach().any()
    authors = dict(
        AlexNetBN(width=0.5, init="gaussian").build(1000, seed=0).named_children()
    )
    assert float(authors["conv3"].weight.detach().std()) == pytest.approx(
        0.01, rel=0.01
    )
    assert float(authors["fc6"].weight.detach().std()) == pytest.approx(0.005, rel=0.01)
    assert [
        float(authors[name].bias.detach()[0]) for name in ("conv1", "fc6", "fc8")
    ] == pytest.approx([0.01, 0.1, 0.01])


def order(network):
    names = [name for name, _ in network.build(10, seed=0).named_children()]
    return names[1 : names.index("avgpool")]


def test_the_order_of_layers():
    """The source normalises layer 1 before its ReLU, and layer 2 over places too; the paper does neither."""
    source = [
        "conv1",
        "norm1",
        "pool1",
        "relu1",
        "conv2",
        "relu2",
        "norm2",
        "places2",
        "pool2",
    ]
    assert order(AlexNet2012(width=0.05))[:9] == source
    paper = [
        "conv1",
        "relu1",
        "norm1",
        "pool1",
        "conv2",
        "relu2",
        "norm2",
        "pool2",
        "conv3",
    ]
    assert order(AlexNet2012(width=0.05, layers="paper"))[:9] == paper
    before = order(AlexNetBN(width=0.05))
    assert before[:4] == ["conv1", "norm1", "relu1", "pool1"]
    assert before[-4:] == ["conv5", "norm5", "relu5", "pool5"]
    after = order(AlexNetBN(width=0.05, place="after_pool"))
    assert after[:4] == ["conv1", "relu1", "pool1", "norm1"]
    assert after[-4:] == ["norm4", "conv5", "relu5", "pool5"]


def test_alphas():
    """The paper's alpha stands before the sum of five squares, torch's and the source's before their mean."""
    found = {
        lrn: AlexNet2012(width=0.05, lrn=lrn).build(10, seed=0).norm1.alpha
        for lrn in ("source", "paper")
    }
    assert found == {"source": 1e-4, "paper": 5e-4}


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_first_weights_are_a_function_of_the_seed(network):
    a, b, c = (network.build(10, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a[next(iter(a))], c[next(iter(a))])
    assert all(t.isfinite().all() for t in a.values())


def test_width_scales_everything():
    model = AlexNet(width=0.25).build(10, seed=0)
    assert [m.out_channels for m in model.features if hasattr(m, "out_channels")] == [
        16,
        48,
        96,
        64,
        64,
    ]
    assert model.classifier[1].out_features == 1024


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_no_global_generator_inside_a_step(network, monkeypatch):
    """Rule 4: the global generators may not be used by forward and backward."""
    model = network.build(10, seed=0)
    before = torch.get_rng_state()

    def refuse(*_args, **_kwargs):
        raise AssertionError("global random function used")

    for name in ("rand", "randn", "randint", "randperm", "bernoulli", "dropout"):
        monkeypatch.setattr(torch, name, refuse)
    monkeypatch.setattr(torch.nn.functional, "dropout", refuse)
    with micro_batch_context(0, 0, 0):
        model(torch.zeros(2, 3, 64, 64)).sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_the_layers_are_those_of_the_names():
    kinds = {type(layer) for layer in AlexNet2012(width=0.05).build(10, seed=0)}
    assert {LocalResponseNorm, SpatialResponseNorm, Dropout} <= kinds
    drops = [
        layer.layer_index
        for layer in AlexNet2012(width=0.05).build(10, seed=0)
        if isinstance(layer, Dropout)
    ]
    assert drops == [0, 1], "each has masks of its own"
    assert BatchNorm in {
        type(layer) for layer in AlexNetBN(width=0.05).build(10, seed=0)
    }
