"""Momentum SGD with weight decay."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.sgd import sgd

from distrain.optim.optimizer import Group, Optimizer
from distrain.sections import SGD

_VELOCITY = "momentum_buffer"


class MomentumSGD(Optimizer):
    """v <- momentum v + g + weight_decay w; w <- w - lr v; or, in the paper's form, with the rate inside v.

    Sutskever et al. 2013 as torch writes it, and Krizhevsky et al. 2012, section 5.
    """

    def __init__(self, config: SGD, parameters: Mapping[str, nn.Parameter]) -> None:
        moments = (_VELOCITY,) if config.momentum else ()
        super().__init__(config, parameters, weight_decay=config.weight_decay, moments=moments)
        self._momentum, self._nesterov = config.momentum, config.nesterov
        self._rate_in_velocity = config.form == "paper" and config.momentum > 0

    def _move(self, group: Group, gradients: list[Tensor], lr: Tensor, change: float) -> None:
        sgd(
            group.parameters,
            gradients,
            [*self._moments(group, _VELOCITY)] if self._momentum else [],
            fused=True,
            weight_decay=group.weight_decay,
            # torch's velocity has no rate in it; one that has is -lr times torch's, so that the share of it that a
            # step keeps is `momentum / change` of torch's.
            momentum=self._momentum / change if self._rate_in_velocity else self._momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self._nesterov,
            maximize=False,
        )
