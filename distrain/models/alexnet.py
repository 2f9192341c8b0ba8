"""AlexNet: torchvision's single tower, the two towers of 2012, and these with batch normalisation."""

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


class AlexNet(BuiltInModel, name="alexnet"):
    """One tower without response normalisation, as torchvision has it (Krizhevsky 2014): the same state dict."""

    min_crop = 63

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Images (n, 3, h, w) to logits (n, classes)."""
        from torch import nn

        from distrain.models.layers import AveragePool, Dropout

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
            nn.Linear(c4 * 36, hidden),
            nn.ReLU(inplace=True),
            Dropout(self.dropout, 1),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, num_classes),
        )
        parts = {
            "features": features,
            "avgpool": AveragePool(6, 6),
            "flat": nn.Flatten(),
            "classifier": classifier,
        }
        return nn.Sequential(OrderedDict(parts))

    def initialize_weights(
        self, model: "nn.Module", generator: "torch.Generator"
    ) -> None:
        """torch's default: every weight and bias uniform in +-1 / sqrt(fan in)."""
        for layer in _find_weight_layers(model).values():
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound, generator=generator)
            _get_bias(layer).uniform_(-bound, bound, generator=generator)


class AlexNet2012(BuiltInModel, name="alexnet2012"):
    """The two towers of 2012. The paper and the released source differ; each difference is a choice.

    Grouped convolutions: 60,965,224 parameters at 1,000 classes. As in the released source (layers-145), the last
    filters and pooling windows hang over the right and bottom edge (224 pixels act as 227), and dropout stands on the
    outputs of the two hidden layers. Biases begin at 1 in conv2, conv4, conv5 and the hidden layers, at 0 elsewhere.
    """

    min_crop = 36

    layers: Literal["source", "paper"] = result_field("source")
    """source: layer 1 is normalised before its ReLU, and layer 2 twice, over channels and over places; paper: ReLU,
    normalisation over channels, pooling in both. [result]"""
    lrn: Literal["source", "paper"] = result_field("source")
    """What alpha = 1e-4 multiplies: the mean of the five squares (source, and torch) or their sum (paper's formula).
    [result]"""
    init: Literal["source", "paper"] = result_field("source")
    """Standard deviation of the first weights: 0.01, in conv3 to conv5 0.03 (source), or 0.01 everywhere (paper).
    [result]"""

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Images (n, 3, h, w) to logits (n, classes)."""
        from distrain.models.layers import LocalResponseNorm, SpatialResponseNorm

        def make_channel_norm(number: int) -> "_NamedLayer":
            # The paper's alpha multiplies the sum of the five squares, the source's their mean.
            alpha = 1e-4 if self.lrn == "source" else 5 * 1e-4
            return f"norm{number}", LocalResponseNorm(
                5, alpha=alpha, beta=0.75, k=2.0, groups=2
            )

        if self.layers == "source":
            first = [make_channel_norm(1), _make_pool(1), _make_relu(1)]
            second = [
                _make_relu(2),
                make_channel_norm(2),
                ("places2", SpatialResponseNorm()),
                _make_pool(2),
            ]
        else:
            first, second = (
                [_make_relu(i), make_channel_norm(i), _make_pool(i)] for i in (1, 2)
            )
        after = [
            first,
            second,
            [_make_relu(3)],
            [_make_relu(4)],
            [_make_relu(5), _make_pool(5)],
        ]
        hidden = [[_make_relu(6)], [_make_relu(7)]]
        return _build_two_towers(self, num_classes, after, hidden)

    def initialize_weights(
        self, model: "nn.Module", generator: "torch.Generator"
    ) -> None:
        """Normal numbers of standard deviation 0.01, and in conv3 to conv5 0.03 (`init: source`)."""
        for name, layer in _find_weight_layers(model).items():
            wide = self.init == "source" and name in ("conv3", "conv4", "conv5")
            layer.weight.normal_(0, 0.03 if wide else 0.01, generator=generator)
            _get_bias(layer).fill_(
                1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
            )


class AlexNetBN(BuiltInModel, name="alexnet_bn"):
    """The two towers with batch normalisation in place of response normalisation."""

    min_crop = 36

    place: Literal["before_relu", "after_pool"] = result_field("before_relu")
    """before_relu: convolution, normalisation, ReLU, pooling (Ioffe and Szegedy 2015; Simon et al. 2016). after_pool:
    convolution, ReLU, pooling, normalisation, not after conv5 (the authors of LARS). [result]"""
    hidden: bool = result_field(False)
    """Whether the two hidden fully connected layers are normalised too, before their ReLU. [result]"""
    affine: bool = result_field(True)
    """Whether what is normalised is scaled and shifted, as learned. [result]"""
    eps: float = result_field(1e-5, gt=0)
    """Added to the variance. [result]"""
    running: float = result_field(0.1, gt=0, le=1)
    """What each step takes of the new moments into those that evaluation uses. [result]"""
    init: Literal["he", "gaussian"] = result_field("he")
    """First weights. he: N(0, 2 / fan in), biases 0 (He et al. 2015). gaussian: N(0, 0.01), 0.005 in the hidden fully
    connected layers, biases 0.01 and there 0.1 (the authors of LARS). [result]"""

    def build_layers(self, num_classes: int) -> "nn.Module":
        """Images (n, 3, h, w) to logits (n, classes)."""
        from distrain.models.layers import BatchNorm

        c1, c2, c3, hidden = _scale_all_channels(self)

        def make_norm(number: int) -> "_NamedLayer":
            features = {1: c1, 2: c2, 3: c3, 4: c3, 5: c2, 6: hidden, 7: hidden}[number]
            return f"norm{number}", BatchNorm(
                features, eps=self.eps, momentum=self.running, affine=self.affine
            )

        pools = {i: [_make_pool(i)] if i in (1, 2, 5) else [] for i in range(1, 6)}
        if self.place == "before_relu":
            after = [[make_norm(i), _make_relu(i), *pools[i]] for i in range(1, 6)]
        else:
            after = [
                [_make_relu(i), *pools[i], *([make_norm(i)] if i < 5 else [])]
                for i in range(1, 6)
            ]
        dense = [
            [*([make_norm(i)] if self.hidden else []), _make_relu(i)] for i in (6, 7)
        ]
        return _build_two_towers(self, num_classes, after, dense)

    def initialize_weights(
        self, model: "nn.Module", generator: "torch.Generator"
    ) -> None:
        """He's, or the Gaussian of the authors of LARS; see `init`."""
        from distrain.models.layers import find_batch_norms

        for name, layer in _find_weight_layers(model).items():
            if self.init == "he":
                deviation, bias = math.sqrt(2 / layer.weight[0].numel()), 0.0
            else:
                deviation, bias = (
                    (0.005, 0.1) if name in ("fc6", "fc7") else (0.01, 0.01)
                )
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
    """The layers of 2012: `after` has what follows each convolution, `hidden` what follows each hidden layer."""
    from torch import nn

    from distrain.models.layers import AveragePool, Dropout, PadToStride

    c1, c2, c3, units = _scale_all_channels(config)
    convolutions = [
        nn.Conv2d(3, c1, 11, stride=4),
        nn.Conv2d(c1, c2, 5, padding=2, groups=2),
        nn.Conv2d(c2, c3, 3, padding=1),
        nn.Conv2d(c3, c3, 3, padding=1, groups=2),
        nn.Conv2d(c3, c2, 3, padding=1, groups=2),
    ]
    layers: list[_NamedLayer] = [("edge", PadToStride(11, 4))]
    for i, (convolution, followers) in enumerate(
        zip(convolutions, after_convolutions, strict=True), 1
    ):
        layers += [(f"conv{i}", convolution), *followers]
    layers += [("avgpool", AveragePool(6, 6)), ("flat", nn.Flatten())]
    for i, (inputs, followers) in enumerate(
        zip((c2 * 36, units), after_hidden, strict=True), 6
    ):
        layers += [
            (f"fc{i}", nn.Linear(inputs, units)),
            *followers,
            (f"drop{i}", Dropout(config.dropout, i - 6)),
        ]
    return nn.Sequential(OrderedDict([*layers, ("fc8", nn.Linear(units, num_classes))]))


def _make_pool(number: int) -> "_NamedLayer":
    from torch import nn

    return f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _make_relu(number: int) -> "_NamedLayer":
    from torch import nn

    return f"relu{number}", nn.ReLU(inplace=True)


def _find_weight_layers(model: "nn.Module") -> "dict[str, nn.Conv2d | nn.Linear]":
    """The layers that have weights and a bias."""
    from torch import nn

    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def _get_bias(layer: "nn.Conv2d | nn.Linear") -> "torch.Tensor":
    assert layer.bias is not None
    return layer.bias


def _scale_all_channels(config: BuiltInModel) -> tuple[int, int, int, int]:
    c1, c2, c3, hidden = (config.scale_channels(c) for c in (96, 256, 384, 4096))
    return c1, c2, c3, hidden
