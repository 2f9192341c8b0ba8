"""LARS: momentum SGD whose learning rate is scaled layer by layer."""

from typing import TYPE_CHECKING

from distrain.fields import result_field
from distrain.optim.sgd import MOMENTUM_BUFFER, apply_momentum_sgd
from distrain.optim.update_rule import ParamGroup, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


class LARS(UpdateRule, name="lars"):
    """LARS (You, Gitman and Ginsburg 2017, algorithm 1).

    v <- momentum v + lr ratio (g + weight_decay w); w <- w - v. Each weight tensor has
    its own ratio; biases and all other one-dimensional parameters are updated as in
    SGD. Only the gradients are scaled here: the rest is SGD in the paper's form.
    """

    momentum: float = result_field(0.9, ge=0, lt=1)
    """Fraction of the velocity that each step keeps, at least 0 and below 1.
    [result]"""
    weight_decay: float = result_field(5e-4, ge=0)
    """Factor of the weights that is added to the gradient. [result]"""
    trust: float = result_field(0.001, gt=0)
    """Trust coefficient (eta of the paper): at a learning rate of 1 and without
    momentum, a layer's step has at most this fraction of its weights' norm. [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """Name the velocity, which exists only with momentum."""
        return (MOMENTUM_BUFFER,) if self.momentum else ()

    def transform_gradients(self, group: ParamGroup) -> None:
        """Apply weight decay and trust ratio, before the velocity accumulates them."""
        decay = group.weight_decay
        for p, gradient in zip(group.parameters, group.gradients, strict=True):
            # The ratio is that of the plain gradient: compute it before the decay is
            # added in place.
            ratio = None
            if p.ndim > 1:
                ratio = self._compute_trust_ratio(p, gradient, decay)
            if decay:
                gradient.add_(p, alpha=decay)
            if ratio is not None:
                gradient.mul_(ratio)

    def update_group(
        self,
        group: ParamGroup,
        lr: "Tensor",
        lr_ratio: float,
    ) -> None:
        """Update as SGD in the paper's form, with the decay applied already."""
        # As in SGD.update_group: the velocity of the paper contains the learning rate.
        momentum = self.momentum / lr_ratio
        apply_momentum_sgd(group, lr, momentum=momentum, weight_decay=0.0)

    def _compute_trust_ratio(
        self,
        weight: "Tensor",
        gradient: "Tensor",
        weight_decay: float,
    ) -> "Tensor":
        """Compute trust |w| / (|g| + weight_decay |w|), or 1 if a norm is 0.

        Returns:
            float32 scalar on the device.
        """
        import torch

        from distrain.optim.optimizer import compute_total_norm

        weight_norm = compute_total_norm([weight])
        gradient_norm = compute_total_norm([gradient])
        ratio = self.trust * weight_norm / (gradient_norm + weight_decay * weight_norm)
        # Selected on the device: an `if` would wait for the GPU, once per layer.
        is_defined = (weight_norm > 0) & (gradient_norm > 0)
        return torch.where(is_defined, ratio, 1.0).float()
