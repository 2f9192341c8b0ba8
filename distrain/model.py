"""AlexNet: torchvision's single tower, and the two towers of 2012."""

import contextvars
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.philox import Purpose, derived_seed, words
from distrain.sections import Model

_step_key: contextvars.ContextVar[tuple[int, int, int] | None] = contextvars.ContextVar("step_key", default=None)


@contextmanager
def randomness(seed: int, step: int, virtual_worker: int) -> Iterator[None]:
    """Key of all dropout masks drawn inside, on this thread."""
    token = _step_key.set((seed, step, virtual_worker))
    try:
        yield
    finally:
        _step_key.reset(token)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask is a pure function of (seed, step, virtual worker, layer).

    Inverted: kept units are divided by the probability to keep. Identity in evaluation.
    """

    def __init__(self, p: float, layer: int) -> None:
        """`p`: probability to drop; `layer`: number of this dropout layer in its model."""
        super().__init__()
        self.p, self.layer = p, layer

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        if not self.training or self.p == 0:
            return x
        key = _step_key.get()
        assert key is not None, "training forward outside of randomness(...)"
        seed, step, virtual_worker = key
        k0, k1, _, _ = words(seed, Purpose.DROPOUT, step, virtual_worker, self.layer).view(np.int32).tolist()
        keep = 1 - self.p
        mask = _hash(torch.arange(x.numel(), dtype=torch.int32, device=x.device), k0, k1) < keep * 2**32 - 2**31
        return x * mask.view(x.shape).to(x.dtype).div_(keep)

    def extra_repr(self) -> str:
        """What print shows."""
        return f"p={self.p}"


def _hash(x: Tensor, *keys: int) -> Tensor:
    """Mix int32 counters with each key in turn (Wellons' lowbias32), in place: uniform over all int32 numbers.

    Integer arithmetic on the element's index: the same on every device, thread count and launch grid.
    """
    for key in keys:
        x.bitwise_xor_(key)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32), (16, 1)):
            x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
    return x


class AveragePool6(nn.Module):
    """Adaptive average pooling to 6 x 6 with a deterministic backward on every device.

    The identity at 6 x 6, a fixed matrix product elsewhere; torch's own has no deterministic CUDA backward.
    """

    size = 6

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, 6, 6)."""
        height, width = x.shape[-2:]
        if (height, width) == (self.size, self.size):
            return x
        return self._averages(height, x) @ x @ self._averages(width, x).T

    def _averages(self, n: int, like: Tensor) -> Tensor:
        rows = torch.zeros(self.size, n)  # (6, n): row i averages the cells of output i
        for i in range(self.size):
            first, last = i * n // self.size, -(-(i + 1) * n // self.size)
            rows[i, first:last] = 1 / (last - first)
        return rows.to(like)


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha / size * sum of a^2 over `size` neighbouring channels)^beta, as in the source of 2012.

    Krizhevsky et al. 2012, section 3.3, writes alpha without the division; the released source divides, and so does
    torch. Sums of shifted slices: torch's own goes through avg_pool3d, whose CUDA backward is not deterministic.
    """

    def __init__(self, groups: int, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        """`groups`: towers; channels of different towers are not neighbours."""
        super().__init__()
        self.groups, self.size, self.alpha, self.beta, self.k = groups, size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        n, c, h, w = x.shape
        towers = x.reshape(n, self.groups, c // self.groups, h * w)
        half = self.size // 2
        padded = F.pad(towers.square(), (0, 0, half, half))
        channels = towers.shape[2]
        total = padded[:, :, :channels]
        for i in range(1, self.size):
            total = total + padded[:, :, i : i + channels]
        return (towers * (self.k + self.alpha / self.size * total).pow(-self.beta)).reshape(x.shape)


class AlexNet(nn.Module):
    """Krizhevsky 2014 (arXiv 1404.5997) as torchvision has it: one tower, no LRN; same state dict at width 1."""

    def __init__(self, classes: int, width: float, dropout: float) -> None:
        super().__init__()
        c1, c2, c3, c4, hidden = (_scaled(c, width) for c in (64, 192, 384, 256, 4096))
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
        self.avgpool = AveragePool6()
        self.classifier = nn.Sequential(
            Dropout(dropout, 0),
            nn.Linear(c4 * 36, hidden),
            nn.ReLU(inplace=True),
            Dropout(dropout, 1),
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
        for layer in _layers(self):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            layer.weight.uniform_(-bound, bound, generator=generator)
            assert layer.bias is not None
            layer.bias.uniform_(-bound, bound, generator=generator)


class AlexNet2012(nn.Module):
    """The two towers of Krizhevsky et al. 2012 as grouped convolutions, after the released source (layers-145).

    Layer 1 normalises before its ReLU, layer 2 after; the 224 input hangs 3 pixels over the right and bottom edge;
    dropout stands on the outputs of the two hidden layers; weights N(0, 0.01), but 0.03 in conv3 to conv5; biases 1
    in conv2, conv4, conv5 and the hidden layers, 0 elsewhere. 60,965,224 parameters at 1,000 classes.
    """

    def __init__(self, classes: int, width: float, dropout: float) -> None:
        super().__init__()
        c1, c2, c3, hidden = (_scaled(c, width) for c in (96, 256, 384, 4096))
        self.conv1 = nn.Conv2d(3, c1, 11, stride=4)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(c2, c3, 3, padding=1)
        self.conv4 = nn.Conv2d(c3, c3, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(c3, c2, 3, padding=1, groups=2)
        self.norm = LocalResponseNorm(groups=2)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.avgpool = AveragePool6()
        self.fc6, self.fc7 = nn.Linear(c2 * 36, hidden), nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)
        self.drop6, self.drop7 = Dropout(dropout, 0), Dropout(dropout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 3, h, w) to logits (n, classes)."""
        x = F.pad(x, (0, 3, 0, 3))
        x = F.relu(self.pool(self.norm(self.conv1(x))))
        x = self.pool(self.norm(F.relu(self.conv2(x))))
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = self.avgpool(self.pool(F.relu(self.conv5(x))))
        x = self.drop6(F.relu(self.fc6(torch.flatten(x, 1))))
        x = self.drop7(F.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """The source's: see the class."""
        wide = (self.conv3, self.conv4, self.conv5)
        ones = (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
        for layer in _layers(self):
            layer.weight.normal_(0, 0.03 if layer in wide else 0.01, generator=generator)
            assert layer.bias is not None
            layer.bias.fill_(1.0 if layer in ones else 0.0)


MODELS: dict[str, type[AlexNet] | type[AlexNet2012]] = {"alexnet": AlexNet, "alexnet2012": AlexNet2012}


def build(config: Model, classes: int, seed: int) -> AlexNet | AlexNet2012:
    """The network with its first weights, a pure function of (config, classes, seed), on the CPU."""
    model = _bare(config, classes)
    model.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(derived_seed(seed, Purpose.WEIGHTS)))
    return model


def parameter_count(config: Model, classes: int) -> int:
    """Parameters of the network, without making it."""
    return sum(p.numel() for p in _bare(config, classes).parameters())


def _bare(config: Model, classes: int) -> AlexNet | AlexNet2012:
    with torch.device("meta"):
        return MODELS[config.name](classes, config.width, config.dropout)


def _layers(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _scaled(channels: int, width: float) -> int:
    return max(8, 8 * round(channels * width / 8))
