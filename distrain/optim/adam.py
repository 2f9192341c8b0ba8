"""Adam."""

from collections.abc import Mapping

import torch
from torch import nn

from distrain.optim.optimizer import Optimizer
from distrain.sections import Adam


def adam(config: Adam, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """Bias-corrected first and second moments (Kingma and Ba 2015, algorithm 1); decay is added to the gradient."""
    rule = torch.optim.Adam(
        parameters.values(),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return Optimizer(rule, parameters, ("exp_avg", "exp_avg_sq"))
