"""LARS: momentum SGD whose rate is scaled layer by layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distrain.optim.optimizer import decays, norm
from distrain.optim.sgd import MomentumSGD
from distrain.sections import SGD, Lars


class LARS(MomentumSGD):
    """v <- momentum v + lr ratio (g + weight_decay w); w <- w - v (You, Gitman and Ginsburg 2017, algorithm 1).

    The ratio is each weight tensor's own; biases, and whatever else has one dimension, move as in SGD. Gradients are
    scaled, and the rest is left to SGD.
    """

    def __init__(self, config: Lars, parameters: Mapping[str, nn.Parameter]) -> None:
        options = config.model_dump(include={"momentum", "decay_biases", "bias_lr", "clip_norm"})
        super().__init__(SGD(name="sgd", form="paper", weight_decay=0.0, **options), parameters)
        self._config = config

    def _prepare(self) -> None:
        """Weight decay and trust ratio, which belong into the gradient before the velocity takes it up."""
        super()._prepare()
        for p in self._parameters.values():
            assert p.grad is not None
            decay = self._config.weight_decay if decays(self._config, p) else 0.0
            ratio = self._trust(p, p.grad, decay) if p.ndim > 1 else None
            if decay:
                p.grad.add_(p, alpha=decay)
            if ratio is not None:
                p.grad.mul_(ratio)

    def _trust(self, weight: Tensor, gradient: Tensor, decay: float) -> Tensor:
        """trust |w| / (|g| + decay |w|), 1 where a norm is 0: float32 scalar on the device."""
        weights, gradients = norm([weight]), norm([gradient])
        ratio = self._config.trust * weights / (gradients + decay * weights)
        return torch.where((weights > 0) & (gradients > 0), ratio, 1.0).float()
