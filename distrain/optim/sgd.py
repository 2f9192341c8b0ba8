"""Momentum SGD with weight decay."""

from collections.abc import Mapping

import torch
from torch import nn

from distrain.optim.optimizer import Optimizer
from distrain.sections import SGD


def sgd(config: SGD, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """v <- momentum v + g + weight_decay w; w <- w - lr v (Sutskever et al. 2013, as torch writes it)."""
    rule = torch.optim.SGD(
        parameters.values(), lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    return Optimizer(rule, parameters, ("momentum_buffer",) if config.momentum else ())
