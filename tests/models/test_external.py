"""Networks of torchvision's and of users': what is replaced, and what is refused."""

import sys

import pytest
import torch
import torchvision
from torch import nn

from distrain.errors import UserError
from distrain.models.external import build_imported_model, run_trial_step
from distrain.models.layers import (
    AdaptiveAvgPool2d,
    BatchNorm,
    Dropout,
    get_trainable_parameters,
    micro_batch_context,
)
from distrain.models.model import ImportedModel
from distrain.models.response_norm import LocalResponseNorm


def model(name, classes=10, **options):
    config = ImportedModel(name=name, options=options)
    found = config.build(classes, seed=0)
    run_trial_step(found, name, classes, 64)
    return found


def test_torchvisions_resnet_is_itself_but_for_its_batch_normalisation():
    ours = model("torchvision:resnet18", classes=1000)
    theirs = torchvision.models.resnet18(weights=None)
    assert (
        sum(
            p.numel()
            for p in ImportedModel(name="torchvision:resnet18")
            .build_skeleton(1000)
            .parameters()
        )
        == 11_689_512
    )
    assert not [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(isinstance(m, BatchNorm) for m in ours.modules()) == 20
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with micro_batch_context(0, 0, 0):
        torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "name", ["vgg11", "squeezenet1_1", "mobilenet_v2", "googlenet", "densenet121"]
)
def test_other_nets_of_torchvision_can_be_trained(name):
    found = model(f"torchvision:{name}")
    assert not [
        m for m in found.modules() if isinstance(m, nn.BatchNorm2d | nn.Dropout)
    ]


def test_each_dropout_has_masks_of_its_own():
    layers = [
        m.layer_index
        for m in model("torchvision:vgg11").modules()
        if isinstance(m, Dropout)
    ]
    assert layers == [0, 1]


def test_first_weights_are_a_function_of_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    a, b = (
        build_imported_model("own_models:Small", {}, 10, 1).state_dict()
        for _ in range(2)
    )
    c = build_imported_model("own_models:Small", {}, 10, 2).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv.weight"], c["conv.weight"])


def test_an_own_network():
    found = model("own_models:Small", channels=12)
    kinds = [type(layer) for layer in found.children()]
    assert kinds == [nn.Conv2d, BatchNorm, AdaptiveAvgPool2d, Dropout, nn.Linear]
    assert found.drop.p == 0.3
    assert found.conv.out_channels == 12


def test_what_is_replaced_keeps_its_settings():
    found = model("own_models:Peculiar")
    assert (found.norm.eps, found.norm.momentum) == (1e-3, 0.3)
    assert found.norm.weight.unique().tolist() == [0.5]
    lrn = found.drop
    assert isinstance(lrn, LocalResponseNorm)
    assert (lrn.size, lrn.alpha, lrn.beta, lrn.k) == (3, 0.2, 0.5, 1.5)


def test_a_layer_in_two_places_stays_one():
    found = model("own_models:Shared")
    assert found.body[2] is found.body[4]
    assert isinstance(found.body[4], Dropout)


def test_frozen_parameters_are_not_trained():
    assert set(get_trainable_parameters(model("own_models:Frozen"))) == {
        "norm.weight",
        "norm.bias",
        "out.weight",
        "out.bias",
    }


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "torchvision:resnet51",
            "torchvision has no classifier 'resnet51': choose one of .*resnet50",
        ),
        (
            "no.such.package:net",
            "cannot be imported .*install its package on every node",
        ),
        ("own_models:Missing", "cannot be imported, since .* has no Missing"),
        (
            "own_models:Lazy",
            "out.weight is of a lazy layer, which has no weights before its first",
        ),
        ("own_models:NOT_CALLABLE", "is of type int: name a class or function"),
        ("own_models:tower", "returned a str: it must return an nn.Module"),
        ("own_models:broken", "cannot be built: ZeroDivisionError: no 10"),
        ("own_models:Noisy", "draws from a global random generator"),
        ("own_models:Skipping", "draws from a global random generator"),
        ("torchvision:swin_t", "draws from a global random generator"),
        ("own_models:Counting", "changes its buffer calls"),
        ("own_models:Idle", "the logits do not depend on idle.weight, idle.bias"),
        (
            "own_models:Double",
            "model own_models:Double: parameter conv.weight is torch.float64",
        ),
        ("own_models:TwiceNormed", "used twice in one forward"),
        ("torch.nn:Identity", "has no parameter to train"),
        ("torch.nn:Flatten", "cannot be built|has no parameter"),
    ],
)
def test_what_is_refused(name, sentence):
    with pytest.raises(UserError, match=sentence):
        model(name)


def test_wrong_shapes_are_named():
    with pytest.raises(
        UserError,
        match=r"returned \(2, 10\) for two images: it must return logits \(2, 11\)",
    ):
        run_trial_step(
            ImportedModel(name="own_models:Small").build(10, 0),
            "own_models:Small",
            11,
            64,
        )
    with pytest.raises(
        UserError, match=r"cannot take images \(2, 3, 5, 5\): RuntimeError"
    ):
        run_trial_step(
            ImportedModel(name="own_models:Small").build(10, 0),
            "own_models:Small",
            10,
            5,
        )


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    code = "return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, classes))"
    (tmp_path / "net_of_mine.py").write_text(
        f"from torch import nn\ndef net(classes):\n    {code}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert (
        sum(p.numel() for p in model("net_of_mine:net").parameters())
        == 3 * 64 * 64 * 10 + 10
    )
