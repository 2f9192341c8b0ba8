"""Networks of others: torchvision's by name, or any callable, with the layers replaced that would break the promise."""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distrain.errors import UserError
from distrain.fields import format_error, import_attribute
from distrain.models.layers import (
    AveragePool,
    BatchNorm,
    Dropout,
    LocalResponseNorm,
    micro_batch_context,
)


def build_imported_model(
    name: str, options: Mapping[str, Any], num_classes: int, seed: int
) -> nn.Module:
    """Make a network of others, and make its result exact.

    Args:
        name: torchvision:NAME, or package.module:callable.
        options: further keyword arguments of the callable.
        classes: classes that it tells apart.
        seed: of torch's global generator meanwhile, which has its old state afterwards.

    Raises:
        UserError: it cannot be imported or called, or has layers or parameters that cannot be trained exactly.
    """
    make = _find_model_callable(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make(num_classes, **options)
        except (
            Exception
        ) as error:  # anything may be wrong with a callable that is not ours
            raise UserError(
                f"model {name} cannot be made: {format_error(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {name} returned a {type(model).__name__}: it must return an nn.Module"
        )
    for key, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise UserError(
                f"model {name}: parameter {key} is {p.dtype}: it must be torch.float32"
            )
    _replace_layers(model, name)
    return model.train()


def run_trial_step(model: nn.Module, name: str, num_classes: int, crop: int) -> None:
    """Run a training forward and backward, and see whether it can be trained exactly.

    Raises:
        UserError: wrong shapes, a global random generator in use, buffers that a forward changes, unused parameters.
    """
    images = torch.rand(2, 3, crop, crop, generator=torch.Generator().manual_seed(0))
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError(f"model {name} has no parameter to train")
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    before = _get_global_rng_states()
    try:
        with micro_batch_context(0, 0, 0):
            logits = model(images)
    except UserError as error:
        raise UserError(f"model {name}: {error}") from None
    except Exception as error:  # anything may be wrong with a forward that is not ours
        raise UserError(
            f"model {name} cannot take images (2, 3, {crop}, {crop}): {format_error(error)}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        found = (
            tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        )
        raise UserError(
            f"model {name} makes {found} of two images: it must make logits (2, {num_classes})"
        )
    if _get_global_rng_states() != before:
        raise UserError(
            f"model {name} draws from a global random generator while it trains, so that weights would depend on the "
            "cluster: use nn.Dropout, which distrain replaces by its own, or set its options to do without"
        )
    for key, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[key]):
            raise UserError(
                f"model {name} changes its buffer {key} in a forward: weights would depend on the cluster"
            )
    gradients = torch.autograd.grad(
        logits.sum(), list(parameters.values()), allow_unused=True
    )
    unused = [
        key
        for key, gradient in zip(parameters, gradients, strict=True)
        if gradient is None
    ]
    if unused:
        raise UserError(
            f"model {name}: the logits do not depend on {', '.join(unused[:3])}: remove it, or requires_grad_(False)"
        )


def _get_global_rng_states() -> list[Any]:
    """The states of all global random generators on the CPU."""
    of_numpy = np.random.get_state()
    assert isinstance(of_numpy, tuple)
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        of_numpy[1].tolist(),
        of_numpy[2],
    ]


_TorchBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def _find_model_callable(name: str) -> Callable[..., Any]:
    """What makes the model, called with the number of classes."""
    module_name, attribute = name.split(":")
    if module_name == "torchvision":
        return _find_torchvision_model(attribute)
    try:
        found = import_attribute(name)
    except ValueError as error:
        raise UserError(f"model {name} {error}") from None
    if not callable(found):
        raise UserError(
            f"model {name} is a {type(found).__name__}: name a class or function that returns an nn.Module"
        )
    return found  # type: ignore[no-any-return]


def _find_torchvision_model(name: str) -> Callable[..., Any]:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"torchvision has no classifier {name!r}: it has {', '.join(known)}"
        )
    # Their auxiliary logits are no logits of ours; without init_weights they warn of a default that will change.
    plain = (
        {"aux_logits": False, "init_weights": True}
        if name in ("googlenet", "inception_v3")
        else {}
    )
    return partial(_build_torchvision_model, name, plain)


def _build_torchvision_model(
    name: str, defaults: dict[str, Any], num_classes: int, **options: Any
) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(
        name, weights=None, num_classes=num_classes, **{**defaults, **options}
    )
    return model


def _replace_layers(model: nn.Module, name: str) -> None:
    """Put our own layers in place of those whose result depends on thread, rank or device."""
    ours: dict[
        nn.Module, nn.Module
    ] = {}  # by what they replace, which may stand in several places
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer not in ours:
            dropouts = sum(isinstance(found, Dropout) for found in ours.values())
            ours[layer] = _make_replacement(layer, dropouts, name)
        if path and ours[layer] is not layer:
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, ours[layer])


def _make_replacement(layer: nn.Module, num_dropouts: int, name: str) -> nn.Module:
    """What a layer is replaced by, or itself; `dropouts` have been replaced so far."""
    if isinstance(layer, _TorchBatchNorm) and layer.track_running_stats:
        return _convert_batch_norm(layer, name)
    if type(layer) is nn.Dropout:
        return Dropout(layer.p, num_dropouts)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = layer.output_size
        height, width = (size, size) if size is None or isinstance(size, int) else size
        if (
            height is not None and width is not None and (height, width) != (1, 1)
        ):  # torch takes the mean for (1, 1)
            return AveragePool(height, width)
    if isinstance(layer, nn.LocalResponseNorm) and layer.size % 2:
        return LocalResponseNorm(
            layer.size, alpha=layer.alpha, beta=layer.beta, k=layer.k
        )
    return layer


def _convert_batch_norm(layer: _TorchBatchNorm, name: str) -> BatchNorm:
    if layer.momentum is None:
        raise UserError(
            f"model {name} has a batch normalisation without momentum, a cumulative average: set one"
        )
    ours = BatchNorm(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
    )
    state = layer.state_dict()
    state.pop("num_batches_tracked")
    ours.load_state_dict(state)
    return ours
