"""LARS: momentum SGD whose rate is scaled layer by layer."""

from typing import TYPE_CHECKING

from distrain.fields import result
from distrain.optim.rule import Group, UpdateRule
from distrain.optim.sgd import VELOCITY, momentum_step

if TYPE_CHECKING:
    from torch import Tensor


class LARS(UpdateRule, name="lars"):
    """v <- momentum v + lr ratio (g + weight_decay w); w <- w - v (You, Gitman and Ginsburg 2017, algorithm 1).

    The ratio is each weight tensor's own; biases, and whatever else has one dimension, move as in SGD. Gradients are
    scaled, and the rest is left to SGD, in the paper's form.
    """

    momentum: float = result(0.9, ge=0, lt=1)
    """Share of the velocity that each step keeps. [result]"""
    weight_decay: float = result(5e-4, ge=0)
    """Factor of the weights added to the gradient. [result]"""
    trust: float = result(0.001, gt=0)
    """Norm of a layer's step over the norm of its weights, at a rate of 1. [result]"""

    def moments(self) -> tuple[str, ...]:
        """The velocity, if there is one."""
        return (VELOCITY,) if self.momentum else ()

    def transform(self, group: Group) -> None:
        """Weight decay and trust ratio, which belong into the gradient before the velocity takes it up."""
        decay = group.weight_decay
        for p, gradient in zip(group.parameters, group.gradients, strict=True):
            ratio = self._trust(p, gradient, decay) if p.ndim > 1 else None
            if decay:
                gradient.add_(p, alpha=decay)
            if ratio is not None:
                gradient.mul_(ratio)

    def update(self, group: Group, lr: "Tensor", change: float) -> None:
        """What is left to SGD."""
        momentum_step(group, lr, momentum=self.momentum / change, weight_decay=0.0)

    def _trust(self, weight: "Tensor", gradient: "Tensor", decay: float) -> "Tensor":
        """trust |w| / (|g| + decay |w|), 1 where a norm is 0: float32 scalar on the device."""
        import torch

        from distrain.optim.optimizer import norm

        weights, gradients = norm([weight]), norm([gradient])
        ratio = self.trust * weights / (gradients + decay * weights)
        return torch.where((weights > 0) & (gradients > 0), ratio, 1.0).float()
