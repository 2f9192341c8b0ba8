"""Frozen layers: no gradient, nothing below them computed backward, and normalization that stands still."""

import pytest
import torch

from distrain.errors import UserError
from distrain.models.alexnet import AlexNet, AlexNetBN
from distrain.models.freezing import freeze_layers
from distrain.models.layers import (
    find_batch_norms,
    get_trainable_parameters,
    micro_batch_context,
)
from distrain.models.model import Model


def trained(model):
    return list(get_trainable_parameters(model))


def test_by_prefixes():
    model = AlexNet(width=0.04).build_skeleton(3)
    freeze_layers(model, ["features", "classifier.1", "classifier.4.bias"])
    assert trained(model) == [
        "classifier.4.weight",
        "classifier.6.weight",
        "classifier.6.bias",
    ]


@pytest.mark.parametrize(
    ("affine", "prefixes", "still"),
    [
        (True, [], []),
        (True, ["norm1"], ["norm1"]),
        (True, ["norm2.weight", "norm2.bias"], ["norm2"]),
        (True, ["norm2.weight"], []),
        (False, ["norm1", "norm3"], ["norm1", "norm3"]),
        (True, ["conv1"], []),
    ],
)
def test_normalization_stands_still(affine, prefixes, still):
    """In training it does then what it does in evaluation, and records nothing."""
    model = AlexNetBN(width=0.04, affine=affine).build(3, 0)
    freeze_layers(model, prefixes)
    model.eval()
    model.train()
    images = torch.randn(4, 8, 5, 5)
    for name in ("norm1", "norm2", "norm3"):
        layer = model.get_submodule(name)
        x = images.repeat(1, layer.num_features // 8, 1, 1)
        layer.running_mean.fill_(0.5)
        with micro_batch_context(0, 0, 0) as context:
            found = layer(x)
        evaluated = layer.eval()(x)
        assert torch.equal(found, evaluated) == (name in still)
        assert bool(context.batch_stats) == (name not in still)
        assert (layer in find_batch_norms(model)) == (name not in still)


def test_backward_ends_at_the_first_layer_that_is_trained():
    model = AlexNet(width=0.04).build(3, 0)
    freeze_layers(model, ["features", "classifier.1"])
    outputs = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(
            lambda _, __, output, name=name: outputs.update(
                {name: output.requires_grad}
            )
        )
    with micro_batch_context(0, 0, 0):
        model(torch.randn(2, 3, 64, 64))
    assert [name for name, needs in outputs.items() if needs] == [
        "classifier.4",
        "classifier.5",
        "classifier.6",
        "classifier",
        "",
    ]


def test_what_is_not_there_and_what_is_left():
    model = AlexNet(width=0.04).build_skeleton(3)
    with pytest.raises(
        UserError, match=r"model\.freeze has feat, which no parameter's"
    ):
        freeze_layers(model, ["feat"])
    with pytest.raises(UserError, match="leaves nothing to train: freeze fewer layers"):
        freeze_layers(model, ["features", "classifier"])


def test_an_imported_network_that_freezes_itself_is_as_before():
    """Its normalization is trained on, with statistics of each micro-batch."""
    model = Model.parse_choice({"name": "torchvision:resnet18"}).build(3, 0)
    model.bn1.requires_grad_(False)
    freeze_layers(model, ["layer1"])
    norms = find_batch_norms(model)
    assert model.bn1 in norms
    assert model.layer1[0].bn1 not in norms
