"""What all optimizers share: groups, clipping, a complete state from the first step, a rate on the device.

The arithmetic is that of torch's fused optimizers, by the functions under its optimizer classes: those load torch's
compiler when they are made, which takes a second and more.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.sections import Groups

_CHUNK = 1 << 17


class Group(NamedTuple):
    """Parameters with the same decay and the same rate."""

    parameters: list[Tensor]
    weight_decay: float
    rate: float
    """Over that of the others."""


class Optimizer(ABC):
    """Moves parameters by their gradients; its state tensors exist from the start, named after their parameters."""

    def __init__(
        self,
        config: Groups,
        parameters: Mapping[str, nn.Parameter],
        *,
        weight_decay: float,
        moments: tuple[str, ...],
        scalars: tuple[str, ...] = (),
    ) -> None:
        """Make the state.

        Args:
            config: how biases differ, and whether the gradient is clipped.
            parameters: by name.
            weight_decay: of the weights.
            moments: names of the state tensors in the shape of the parameter, zero at first.
            scalars: names of those that have one number.
        """
        self._parameters, self._clip_norm = dict(parameters), config.clip_norm
        self._groups = _groups(config, parameters, weight_decay)
        self._state: dict[Tensor, dict[str, Tensor]] = {
            p: {
                **{moment: torch.zeros_like(p, requires_grad=False) for moment in moments},
                **{scalar: torch.zeros((), device=p.device) for scalar in scalars},
            }
            for p in parameters.values()
        }

    @torch.no_grad()
    def step(self, lr: Tensor, change: float = 1.0) -> None:
        """Move the parameters by their `grad`, which each of them has.

        Args:
            lr: float32 scalar on the device; 0 leaves the weights alone.
            change: this step's rate over the last one's.
        """
        self._prepare()
        for group in self._groups:
            self._move(group, _gradients(group.parameters), lr * group.rate, change)

    @abstractmethod
    def _move(self, group: Group, gradients: list[Tensor], lr: Tensor, change: float) -> None:
        """Move a group."""

    def _prepare(self) -> None:
        """What is done to the gradients before the rule has them."""
        if self._clip_norm is not None:
            gradients = _gradients(self._parameters.values())
            whole = norm(gradients)
            factor = torch.where(whole > self._clip_norm, self._clip_norm / whole, 1.0).float()
            for gradient in gradients:
                gradient.mul_(factor)

    def _moments(self, group: Group, name: str) -> list[Tensor]:
        return [self._state[p][name] for p in group.parameters]

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, by `<parameter>:<name>`."""
        return {f"{name}:{key}": t for name, p in self._parameters.items() for key, t in self._state[p].items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        own = self.state()
        assert own.keys() == state.keys(), own.keys() ^ state.keys()
        for key, tensor in own.items():
            tensor.copy_(state[key])


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of tensors together: float64 scalar on their device.

    Squares are summed in float64 over fixed chunks, and these in a fixed order: in float32 the norm of 61 million
    numbers was 0.15 % off, and another one for another number of threads. On a CPU chunk after chunk stays in a core's
    cache; on a GPU the chunks of a tensor are the rows of one view, since each further kernel costs a launch.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu":
            for chunk in torch.split(flat, _CHUNK):
                total = total + chunk.double().square().sum()
        else:
            total = total + _sum_of_squares(flat)
    return total.sqrt()


def _sum_of_squares(flat: Tensor) -> Tensor:
    """Of a tensor of shape (n,), in float64, over rows of `_CHUNK` elements and what is left: float64 scalar."""
    whole = len(flat) // _CHUNK * _CHUNK
    sums = flat[:whole].view(-1, _CHUNK).double().square_().sum(1)
    return torch.cat([sums, flat[whole:].double().square_().sum()[None]]).sum()


def _groups(config: Groups, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[Group]:
    """The groups of parameters that are moved alike."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in parameters.items():
        decay = weight_decay if decays(config, p) else 0.0
        rate = config.bias_lr if name.rpartition(".")[2] == "bias" else 1.0
        found.setdefault((decay, rate), []).append(p)
    return [Group(members, decay, rate) for (decay, rate), members in found.items()]


def decays(config: Groups, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter."""
    return config.decay_biases or parameter.ndim > 1


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    found = []
    for p in parameters:
        assert p.grad is not None
        found.append(p.grad)
    return found
