"""Adam."""

from collections.abc import Mapping

import torch
from torch import nn

from distrain.optim.optimizer import Optimizer, groups
from distrain.sections import Adam


def adam(config: Adam, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """Bias-corrected first and second moments (Kingma and Ba 2015, algorithm 1); decay coupled or decoupled."""
    rule = (torch.optim.AdamW if config.decoupled else torch.optim.Adam)(
        groups(config, parameters, config.weight_decay),
        lr=0.0,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    return Optimizer(rule, parameters, ("exp_avg", "exp_avg_sq"), clip_norm=config.clip_norm)
