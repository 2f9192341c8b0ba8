"""Networks such as a user may have, for `package.module:callable`."""

import os
import random
import time

import torch
from torch import Tensor, nn

NOT_CALLABLE = 3


class Small(nn.Module):
    """Convolution, batch normalisation, dropout: what is replaced."""

    def __init__(self, classes: int, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 7, stride=4)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(channels * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(
            self.drop(self.pool(torch.relu(self.norm(self.conv(x)))).flatten(1))
        )


class Peculiar(Small):
    """Has settings of its own in what is replaced."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.norm = nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        nn.init.constant_(self.norm.weight, 0.5)
        self.drop = nn.LocalResponseNorm(3, alpha=0.2, beta=0.5, k=1.5)


class Lazy(Small):
    """Leaves the size of a layer to its first forward."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.out = nn.LazyLinear(classes)


class Paced(Small):
    """Waits PACE seconds per forward: a run lasts as long as a fault needs, and leaves the cores to others."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("PACE", "0")))
        return super().forward(x)


class Noisy(Small):
    """Draws from the global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


class Skipping(Small):
    """Draws from Python's generator."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (random.random() < 0.9)


class Counting(Small):
    """Changes a buffer in a forward."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Idle(Small):
    """Has a layer that the logits do not depend on."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.idle = nn.Linear(2, 2)


class Frozen(Small):
    """Trains all but its convolution."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.conv.requires_grad_(False)


class Double(Small):
    """Has float64 parameters."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.double()


class TwiceNormed(Small):
    """Uses one batch normalisation twice."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.norm(self.norm(self.conv(x)))).flatten(1))


class Shared(nn.Module):
    """One dropout layer in two places, and a batch normalisation in a list."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        drop = nn.Dropout(0.5)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 9, stride=8), nn.BatchNorm2d(4), drop, nn.ReLU(), drop
        )
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
        self.head(self.body(torch.zeros(2, 3, 64, 64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def tower(classes: int) -> str:
    """Not a module."""
    return f"{classes} classes"


def broken(classes: int) -> nn.Module:
    """Fails."""
    raise ZeroDivisionError(f"no {classes}")
