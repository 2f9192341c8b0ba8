"""Adam."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.adam import adam

from distrain import sections
from distrain.optim.optimizer import Group, Optimizer


class Adam(Optimizer):
    """Bias-corrected first and second moments (Kingma and Ba 2015, algorithm 1); decay coupled or decoupled."""

    def __init__(self, config: sections.Adam, parameters: Mapping[str, nn.Parameter]) -> None:
        moments, scalars = ("exp_avg", "exp_avg_sq"), ("step",)
        super().__init__(config, parameters, weight_decay=config.weight_decay, moments=moments, scalars=scalars)
        self._config = config

    def _move(self, group: Group, gradients: list[Tensor], lr: Tensor, change: float) -> None:
        adam(
            group.parameters,
            gradients,
            self._moments(group, "exp_avg"),
            self._moments(group, "exp_avg_sq"),
            [],  # of AMSGrad
            self._moments(group, "step"),
            fused=True,
            decoupled_weight_decay=self._config.decoupled,
            amsgrad=False,
            beta1=self._config.beta1,
            beta2=self._config.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self._config.eps,
            maximize=False,
        )
