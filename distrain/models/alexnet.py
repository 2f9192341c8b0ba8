"""AlexNet: torchvision's single tower, and the two towers of 2012.

The two towers come with response normalization or with batch normalization.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from distrain.fields import result_field
from distrain.models.model import BuiltInModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    _NamedLayer = tuple[str, nn.Module]

# torch is imported inside the methods: reading a config must not load it.


class AlexNet(BuiltInModel, name="alexnet"):
    """Single tower without response normalization, as in torchvision (Krizhevsky 2014).

    Its state dict has torchvision's keys and shapes.
    """

    min_crop = 63

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Build the layers: images (n, 3, h, w) to logits (n, classes)."""
        from torch import nn

        from distrain.models.layers import AdaptiveAvgPool2d, Dropout

        c1, c2, c3, c4, hidden = (
            self.scale_channels(c) for c in (64, 192, 384, 256, 4096)
        )
        features = nn.Sequential(
            nn.Conv2d(3, c1, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(c1, c2, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(c2, c3, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c3, c4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c4, c4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        classifier = nn.Sequential(
            Dropout(self.dropout, 0),
            # 36 places of the 6 x 6 average pool.
            nn.Linear(c4 * 36, hidden),
            nn.ReLU(inplace=True),
            Dropout(self.dropout, 1),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        # Named as in torchvision, for the keys of the state dict.
        layers = {
            "features": features,
            "avgpool": AdaptiveAvgPool2d(6, 6),
            "flat": nn.Flatten(),
            "classifier": classifier,
        }
        return nn.Sequential(OrderedDict(layers))

    def initialize_weights(
        self,
        model: "nn.Module",
        generator: "torch.Generator",
    ) -> None:
        """Draw weights and biases as torch does: uniform in +-1 / sqrt(fan in)."""
        for layer in _find_weight_layers(model).values():
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound, generator=generator)
            _get_bias(layer).uniform_(-bound, bound, generator=generator)


class AlexNet2012(BuiltInModel, name="alexnet2012"):
    """Two towers of 2012.

    Where the paper and the released source differ, a field chooses. The towers are
    grouped convolutions: 60,965,224 parameters at 1,000 classes. As in the released
    source (layers-145), the last filters and pooling windows reach beyond the right
    and bottom edge (224 pixels act as 227), and dropout acts on the outputs of the two
    hidden layers. Biases begin at 1 in conv2, conv4, conv5 and the hidden layers, at 0
    elsewhere.
    """

    min_crop = 36

    layers: Literal["source", "paper"] = result_field("source")
    """source: layer 1 is normalized before its ReLU, and layer 2 twice, over channels
    and over places; paper: ReLU, normalization over channels, pooling in both.
    [result]"""
    lrn: Literal["source", "paper"] = result_field("source")
    """Quantity that alpha = 1e-4 multiplies: the mean of the five squares (source, and
    torch) or their sum (the paper's formula). [result]"""
    init: Literal["source", "paper"] = result_field("source")
    """Standard deviation of the first weights: 0.01, but 0.03 in conv3 to conv5
    (source), or 0.01 everywhere (paper). [result]"""

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Build the layers: images (n, 3, h, w) to logits (n, classes)."""
        from distrain.models.response_norm import (
            LocalResponseNorm,
            SpatialResponseNorm,
        )

        def make_channel_norm(number: int) -> "_NamedLayer":
            # LocalResponseNorm divides alpha by the five channels, as the source does;
            # the paper's alpha multiplies the sum of the five squares.
            alpha = 1e-4 if self.lrn == "source" else 5 * 1e-4
            norm = LocalResponseNorm(5, alpha=alpha, beta=0.75, k=2.0, groups=2)
            return f"norm{number}", norm

        # Layers 1 and 2, where source and paper differ.
        if self.layers == "source":
            after_conv1 = [make_channel_norm(1), _make_pool(1), _make_relu(1)]
            after_conv2 = [
                _make_relu(2),
                make_channel_norm(2),
                ("places2", SpatialResponseNorm()),
                _make_pool(2),
            ]
        else:
            after_conv1 = [_make_relu(1), make_channel_norm(1), _make_pool(1)]
            after_conv2 = [_make_relu(2), make_channel_norm(2), _make_pool(2)]
        # All others, which are the same in both.
        after_convolutions = [
            after_conv1,
            after_conv2,
            [_make_relu(3)],
            [_make_relu(4)],
            [_make_relu(5), _make_pool(5)],
        ]
        after_hidden = [[_make_relu(6)], [_make_relu(7)]]
        return _build_two_towers(self, num_classes, after_convolutions, after_hidden)

    def initialize_weights(
        self,
        model: "nn.Module",
        generator: "torch.Generator",
    ) -> None:
        """Draw normal weights, and set the biases to 0 or 1."""
        for name, layer in _find_weight_layers(model).items():
            is_wide = self.init == "source" and name in ("conv3", "conv4", "conv5")
            layer.weight.normal_(0, 0.03 if is_wide else 0.01, generator=generator)
            has_bias_one = name in ("conv2", "conv4", "conv5", "fc6", "fc7")
            _get_bias(layer).fill_(1.0 if has_bias_one else 0.0)


class AlexNetBN(BuiltInModel, name="alexnet_bn"):
    """Two towers with batch normalization in place of response normalization."""

    min_crop = 36

    place: Literal["before_relu", "after_pool"] = result_field("before_relu")
    """before_relu: convolution, normalization, ReLU, pooling (Ioffe and Szegedy 2015;
    Simon et al. 2016). after_pool: convolution, ReLU, pooling, normalization, except
    after conv5 (the authors of LARS). [result]"""
    hidden: bool = result_field(False)
    """Normalize the two hidden fully connected layers too, before their ReLU.
    [result]"""
    affine: bool = result_field(True)
    """Learn a scale and a shift of the normalized values. [result]"""
    eps: float = result_field(1e-5, gt=0)
    """Added to the variance, above 0; torch's default. [result]"""
    running: float = result_field(0.1, gt=0, le=1)
    """Momentum of the running statistics that evaluation uses, as in torch: the weight
    of each step's batch statistics, above 0 and at most 1; torch's default. [result]"""
    init: Literal["he", "gaussian"] = result_field("he")
    """First weights. he: N(0, 2 / fan in), biases 0 (He et al. 2015). gaussian:
    standard deviation 0.01, and 0.005 in the hidden fully connected layers; biases
    0.01, and 0.1 in those layers (the authors of LARS). [result]"""

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Build the layers: images (n, 3, h, w) to logits (n, classes)."""
        from distrain.models.layers import BatchNorm

        c1, c2, c3, hidden = _scale_all_channels(self)
        # Features of the layers 1 to 5 (convolutions) and 6 and 7 (hidden).
        features = {1: c1, 2: c2, 3: c3, 4: c3, 5: c2, 6: hidden, 7: hidden}

        def make_norm(number: int) -> "_NamedLayer":
            norm = BatchNorm(
                features[number],
                eps=self.eps,
                momentum=self.running,
                affine=self.affine,
            )
            return f"norm{number}", norm

        after_convolutions = []
        for i in range(1, 6):
            pool = [_make_pool(i)] if i in (1, 2, 5) else []
            if self.place == "before_relu":
                after_convolutions.append([make_norm(i), _make_relu(i), *pool])
            else:
                # The authors of LARS do not normalize after conv5.
                norm = [make_norm(i)] if i < 5 else []
                after_convolutions.append([_make_relu(i), *pool, *norm])
        after_hidden = []
        for i in (6, 7):
            norm = [make_norm(i)] if self.hidden else []
            after_hidden.append([*norm, _make_relu(i)])
        return _build_two_towers(self, num_classes, after_convolutions, after_hidden)

    def initialize_weights(
        self,
        model: "nn.Module",
        generator: "torch.Generator",
    ) -> None:
        """Draw the weights of `init`, and reset the batch normalization."""
        from distrain.models.layers import find_batch_norms

        for name, layer in _find_weight_layers(model).items():
            if self.init == "he":
                deviation = math.sqrt(2 / layer.weight[0].numel())
                bias = 0.0
            elif name in ("fc6", "fc7"):
                deviation = 0.005
                bias = 0.1
            else:
                deviation = 0.01
                bias = 0.01
            layer.weight.normal_(0, deviation, generator=generator)
            _get_bias(layer).fill_(bias)
        for norm in find_batch_norms(model):
            norm.reset_parameters()


def _build_two_towers(
    config: BuiltInModel,
    num_classes: int,
    after_convolutions: "Sequence[Sequence[_NamedLayer]]",
    after_hidden: "Sequence[Sequence[_NamedLayer]]",
) -> "nn.Sequential":
    """Build the network of 2012 from its convolutions and the layers between them.

    Args:
        config: the network's settings, for its width and dropout.
        num_classes: number of logits.
        after_convolutions: layers that follow each of the five convolutions.
        after_hidden: layers that follow each of the two hidden layers.
    """
    from torch import nn

    from distrain.models.layers import AdaptiveAvgPool2d, Dropout, PadToStride

    c1, c2, c3, units = _scale_all_channels(config)
    # The groups are the two towers; from conv2 to conv5 only conv3 sees both.
    convolutions = [
        nn.Conv2d(3, c1, 11, stride=4),
        nn.Conv2d(c1, c2, 5, padding=2, groups=2),
        nn.Conv2d(c2, c3, 3, padding=1),
        nn.Conv2d(c3, c3, 3, padding=1, groups=2),
        nn.Conv2d(c3, c2, 3, padding=1, groups=2),
    ]
    # The convolutions, each with what follows it.
    layers: list[_NamedLayer] = [("edge", PadToStride(11, 4))]
    for i, convolution in enumerate(convolutions):
        layers.append((f"conv{i + 1}", convolution))
        layers += after_convolutions[i]
    # The fully connected layers, over the 36 places of the pooled image.
    layers += [("avgpool", AdaptiveAvgPool2d(6, 6)), ("flat", nn.Flatten())]
    for i, num_inputs in enumerate((c2 * 36, units)):
        layers.append((f"fc{i + 6}", nn.Linear(num_inputs, units)))
        layers += after_hidden[i]
        layers.append((f"drop{i + 6}", Dropout(config.dropout, i)))
    layers.append(("fc8", nn.Linear(units, num_classes)))
    return nn.Sequential(OrderedDict(layers))


def _make_pool(number: int) -> "_NamedLayer":
    from torch import nn

    # ceil_mode: the last window reaches beyond the edge, as in the released source.
    return f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _make_relu(number: int) -> "_NamedLayer":
    from torch import nn

    return f"relu{number}", nn.ReLU(inplace=True)


def _find_weight_layers(model: "nn.Module") -> "dict[str, nn.Conv2d | nn.Linear]":
    """Return the convolutions and linear layers, by name, in the model's order.

    The first weights are drawn in this order, so it decides them.
    """
    from torch import nn

    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def _get_bias(layer: "nn.Conv2d | nn.Linear") -> "torch.Tensor":
    # torch's type allows layers without a bias; those of AlexNet all have one.
    assert layer.bias is not None
    return layer.bias


def _scale_all_channels(config: BuiltInModel) -> tuple[int, int, int, int]:
    c1, c2, c3, hidden = (config.scale_channels(c) for c in (96, 256, 384, 4096))
    return c1, c2, c3, hidden
