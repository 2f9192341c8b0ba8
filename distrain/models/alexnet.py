"""AlexNet: torchvision's single tower, the two towers of 2012, and these with batch normalisation."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain import sections
from distrain.models.external import imported
from distrain.models.layers import AveragePool, BatchNorm, Dropout, LocalResponseNorm, SpatialResponseNorm, batch_norms
from distrain.philox import Purpose, derived_seed


class AlexNet(nn.Module):
    """Krizhevsky 2014 (arXiv 1404.5997) as torchvision has it: one tower, no LRN; same state dict at width 1."""

    def __init__(self, config: sections.AlexNet, classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4, hidden = (_scaled(c, config.width) for c in (64, 192, 384, 256, 4096))
        self.features = nn.Sequential(
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
        self.avgpool = AveragePool(6, 6)
        self.classifier = nn.Sequential(
            Dropout(config.dropout, 0),
            nn.Linear(c4 * 36, hidden),
            nn.ReLU(inplace=True),
            Dropout(config.dropout, 1),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) to logits (n, classes)."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """torch's default: every weight and bias uniform in +-1 / sqrt(fan in)."""
        for layer in _weighted(self).values():
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound, generator=generator)
            _bias(layer).uniform_(-bound, bound, generator=generator)


class AlexNet2012(nn.Sequential):
    """The two towers of Krizhevsky et al. 2012 as grouped convolutions: 60,965,224 parameters at 1,000 classes.

    As in the released source (layers-145), the last filters and pooling windows hang over the right and bottom edge
    (224 pixels act as 227), and dropout stands on the outputs of the two hidden layers. Biases begin at 1 in conv2,
    conv4, conv5 and the hidden layers, at 0 elsewhere.
    """

    def __init__(self, config: sections.AlexNet2012, classes: int) -> None:
        self.config = config

        def across(number: int) -> tuple[str, nn.Module]:
            # The paper's alpha multiplies the sum of the five squares, the source's their mean.
            alpha = 1e-4 if config.lrn == "source" else 5 * 1e-4
            return f"norm{number}", LocalResponseNorm(5, alpha=alpha, beta=0.75, k=2.0, groups=2)

        if config.layers == "source":
            first = [across(1), _pool(1), _relu(1)]
            second = [_relu(2), across(2), ("places2", SpatialResponseNorm()), _pool(2)]
        else:
            first, second = ([_relu(i), across(i), _pool(i)] for i in (1, 2))
        after = [first, second, [_relu(3)], [_relu(4)], [_relu(5), _pool(5)]]
        hidden = [[_relu(6)], [_relu(7)]]
        super().__init__(_two_towers(config, classes, after, hidden))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Normal numbers of standard deviation 0.01, and in conv3 to conv5 0.03 (`init: source`)."""
        for name, layer in _weighted(self).items():
            wide = self.config.init == "source" and name in ("conv3", "conv4", "conv5")
            layer.weight.normal_(0, 0.03 if wide else 0.01, generator=generator)
            _bias(layer).fill_(1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0)


class AlexNetBN(nn.Sequential):
    """The two towers with batch normalisation in place of response normalisation, as its options say."""

    def __init__(self, config: sections.AlexNetBN, classes: int) -> None:
        self.config = config
        c1, c2, c3, hidden = _widths(config)

        def norm(number: int) -> tuple[str, nn.Module]:
            features = {1: c1, 2: c2, 3: c3, 4: c3, 5: c2, 6: hidden, 7: hidden}[number]
            return f"norm{number}", BatchNorm(features, eps=config.eps, momentum=config.running, affine=config.affine)

        pools = {i: [_pool(i)] if i in (1, 2, 5) else [] for i in range(1, 6)}
        if config.place == "before_relu":
            after = [[norm(i), _relu(i), *pools[i]] for i in range(1, 6)]
        else:
            after = [[_relu(i), *pools[i], *([norm(i)] if i < 5 else [])] for i in range(1, 6)]
        dense = [[*([norm(i)] if config.hidden else []), _relu(i)] for i in (6, 7)]
        super().__init__(_two_towers(config, classes, after, dense))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """He's, or the Gaussian of the authors of LARS; see `sections.AlexNetBN.init`."""
        for name, layer in _weighted(self).items():
            if self.config.init == "he":
                deviation, bias = math.sqrt(2 / layer.weight[0].numel()), 0.0
            else:
                deviation, bias = (0.005, 0.1) if name in ("fc6", "fc7") else (0.01, 0.01)
            layer.weight.normal_(0, deviation, generator=generator)
            _bias(layer).fill_(bias)
        for norm in batch_norms(self):
            norm.reset()


def build(config: sections.Model, classes: int, seed: int) -> nn.Module:
    """The network with its first weights, a pure function of (config, classes, seed), on the CPU.

    Raises:
        UserError: a model that is imported cannot be, or not be trained exactly.
    """
    first = derived_seed(seed, Purpose.WEIGHTS)
    if isinstance(config, sections.ImportedModel):
        return imported(config, classes, first)
    model = _bare(config, classes)
    # Not `to_empty`: for tensors without memory that loads torch's symbolic shapes, which takes half a second.
    room = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    model.load_state_dict(room, assign=True)
    model.initialise(torch.Generator().manual_seed(first))
    return model


def outline(config: sections.Model, classes: int) -> nn.Module:
    """The network to look at; those of distrain's own without memory for weights (on torch's meta device)."""
    return imported(config, classes, 0) if isinstance(config, sections.ImportedModel) else _bare(config, classes)


def parameter_count(config: sections.Model, classes: int) -> int:
    """Parameters of the network."""
    return sum(p.numel() for p in outline(config, classes).parameters())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a parameter that does not require a gradient is frozen."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _bare(config: sections.Network, classes: int) -> AlexNet | AlexNet2012 | AlexNetBN:
    with torch.device("meta"):
        if isinstance(config, sections.AlexNet):
            return AlexNet(config, classes)
        if isinstance(config, sections.AlexNet2012):
            return AlexNet2012(config, classes)
        assert isinstance(config, sections.AlexNetBN)
        return AlexNetBN(config, classes)


_Named = tuple[str, nn.Module]


def _two_towers(
    config: sections.Network, classes: int, after: Sequence[Sequence[_Named]], hidden: Sequence[Sequence[_Named]]
) -> OrderedDict[str, nn.Module]:
    """The layers of 2012: `after` has what follows each convolution, `hidden` what follows each hidden layer."""
    c1, c2, c3, units = _widths(config)
    convolutions = [
        nn.Conv2d(3, c1, 11, stride=4),
        nn.Conv2d(c1, c2, 5, padding=2, groups=2),
        nn.Conv2d(c2, c3, 3, padding=1),
        nn.Conv2d(c3, c3, 3, padding=1, groups=2),
        nn.Conv2d(c3, c2, 3, padding=1, groups=2),
    ]
    layers: list[_Named] = [("edge", HangOver(11, 4))]
    for i, (convolution, followers) in enumerate(zip(convolutions, after, strict=True), 1):
        layers += [(f"conv{i}", convolution), *followers]
    layers += [("avgpool", AveragePool(6, 6)), ("flat", nn.Flatten())]
    for i, (inputs, followers) in enumerate(zip((c2 * 36, units), hidden, strict=True), 6):
        layers += [(f"fc{i}", nn.Linear(inputs, units)), *followers, (f"drop{i}", Dropout(config.dropout, i - 6))]
    return OrderedDict([*layers, ("fc8", nn.Linear(units, classes))])


class HangOver(nn.Module):
    """Zeros at the right and bottom edge, so that the last filter of a convolution still has a whole window."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, h + less than stride, w + less than stride)."""
        height, width = ((self.size - side) % self.stride for side in x.shape[-2:])
        return F.pad(x, (0, width, 0, height))


def _pool(number: int) -> _Named:
    return f"pool{number}", nn.MaxPool2d(3, stride=2, ceil_mode=True)


def _relu(number: int) -> _Named:
    return f"relu{number}", nn.ReLU(inplace=True)


def _weighted(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _widths(config: sections.Network) -> tuple[int, int, int, int]:
    c1, c2, c3, hidden = (_scaled(c, config.width) for c in (96, 256, 384, 4096))
    return c1, c2, c3, hidden


def _scaled(channels: int, width: float) -> int:
    return max(8, 8 * round(channels * width / 8))
