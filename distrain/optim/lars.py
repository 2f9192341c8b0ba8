"""LARS: momentum SGD whose rate is scaled layer by layer."""

from typing import TYPE_CHECKING

from distrain.fields import result_field
from distrain.optim.sgd import MOMENTUM_BUFFER, apply_momentum_sgd
from distrain.optim.update_rule import ParamGroup, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


class LARS(UpdateRule, name="lars"):
    """v <- momentum v + lr ratio (g + weight_decay w); w <- w - v (You, Gitman and Ginsburg 2017, algorithm 1).

    The ratio is each weight tensor's own; biases, and whatever else has one dimension, move as in SGD. Gradients are
    scaled, and the rest is left to SGD, in the paper's form.
    """

    momentum: float = result_field(0.9, ge=0, lt=1)
    """Share of the velocity that each step keeps. [result]"""
    weight_decay: float = result_field(5e-4, ge=0)
    """Factor of the weights added to the gradient. [result]"""
    trust: float = result_field(0.001, gt=0)
    """Norm of a layer's step over the norm of its weights, at a rate of 1. [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """The velocity, if there is one."""
        return (MOMENTUM_BUFFER,) if self.momentum else ()

    def transform_gradients(self, group: ParamGroup) -> None:
        """Weight decay and trust ratio, which belong into the gradient before the velocity takes it up."""
        decay = group.weight_decay
        for p, gradient in zip(group.parameters, group.gradients, strict=True):
            ratio = (
                self._compute_trust_ratio(p, gradient, decay) if p.ndim > 1 else None
            )
            if decay:
                gradient.add_(p, alpha=decay)
            if ratio is not None:
                gradient.mul_(ratio)

    def update_group(self, group: ParamGroup, lr: "Tensor", lr_ratio: float) -> None:
        """What is left to SGD."""
        apply_momentum_sgd(
            group, lr, momentum=self.momentum / lr_ratio, weight_decay=0.0
        )

    def _compute_trust_ratio(
        self, weight: "Tensor", gradient: "Tensor", weight_decay: float
    ) -> "Tensor":
        """trust |w| / (|g| + decay |w|), 1 where a norm is 0: float32 scalar on the device."""
        import torch

        from distrain.optim.optimizer import compute_total_norm

        weights, gradients = (
            compute_total_norm([weight]),
            compute_total_norm([gradient]),
        )
        ratio = self.trust * weights / (gradients + weight_decay * weights)
        return torch.where((weights > 0) & (gradients > 0), ratio, 1.0).float()
