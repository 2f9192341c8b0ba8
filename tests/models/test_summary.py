import pytest
from torch import nn

from distrain.models.alexnet import AlexNet, AlexNet2012, AlexNetBN
from distrain.models.model import ImportedModel
from distrain.models.summary import ModelSummary, format_layer_table, summarize_layers


def table(network, side, classes=1000):
    return {
        layer.name: layer
        for layer in summarize_layers(network.build_skeleton(classes), side)
    }


def test_multiply_accumulates_of_both_alexnets():
    """714.19 million at 224 pixels for torchvision's; 724.41 million at 227 for that of 2012, nine tenths in conv."""
    assert (
        sum(layer.num_macs for layer in table(AlexNet(), 224).values()) == 714_188_480
    )
    found = table(AlexNet2012(), 227)
    total = sum(layer.num_macs for layer in found.values())
    assert total == 724_406_816
    convolutions = sum(
        layer.num_macs for name, layer in found.items() if name.startswith("conv")
    )
    assert convolutions / total == pytest.approx(0.919, abs=1e-3)
    assert sum(layer.num_macs for layer in table(AlexNetBN(), 224).values()) == total


def test_a_layer_by_hand():
    conv2 = table(AlexNet2012(), 224)["conv2"]
    assert conv2 == (
        "conv2",
        "Conv2d 5x5 in 2",
        (256, 27, 27),
        256 * 48 * 25 + 256,
        256 * 27 * 27 * 48 * 25,
    )
    assert table(AlexNet(), 224)["classifier.1"][3:] == (
        9216 * 4096 + 4096,
        9216 * 4096,
    )


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:vit_b_32", "own_models:Small"]
)
def test_lines_of_a_terminal(name):
    """At most 80 columns; every parameter is in one line."""
    model = ImportedModel(name=name).build_skeleton(10)
    text = list(format_layer_table(ModelSummary(224, summarize_layers(model, 224))))
    assert max(len(line) for line in text) <= 80, max(text, key=len)
    counted = sum(int(line.split()[-4].replace(",", "")) for line in text[1:-1])
    assert counted == sum(p.numel() for p in model.parameters())
    assert text[-1].startswith(f"{counted:,} parameters, ")
    assert model.training, "the model is as it was"


def test_a_layer_that_is_used_twice_has_its_parameters_once():
    convolution = nn.Conv2d(3, 3, 1)
    first, second = summarize_layers(
        nn.Sequential(convolution, nn.Sequential(convolution)), 8
    )
    assert (first.num_parameters, second.num_parameters) == (12, 0)
    assert first.num_macs == second.num_macs == 3 * 3 * 64
