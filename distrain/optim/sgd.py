"""Momentum SGD with weight decay."""

from collections.abc import Mapping

import torch
from torch import nn

from distrain.optim.optimizer import Optimizer, groups
from distrain.sections import SGD


def sgd(config: SGD, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """v <- momentum v + g + weight_decay w; w <- w - lr v; or, in the paper's form, with the rate inside v.

    Sutskever et al. 2013 as torch writes it, and Krizhevsky et al. 2012, section 5.
    """
    rule = torch.optim.SGD(
        groups(config, parameters, config.weight_decay),
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    moments = ("momentum_buffer",) if config.momentum else ()
    inside = config.form == "paper" and config.momentum > 0
    return Optimizer(rule, parameters, moments, clip_norm=config.clip_norm, rate_in_velocity=inside)
