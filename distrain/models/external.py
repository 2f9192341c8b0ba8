"""Networks from elsewhere: torchvision's by name, or any callable.

Layers whose result depends on thread, rank or device are replaced. A network that still
cannot be trained exactly is refused.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain.errors import UserError
from distrain.fields import format_error, import_attribute
from distrain.models.layers import (
    AdaptiveAvgPool2d,
    BatchNorm,
    Dropout,
    micro_batch_context,
)
from distrain.models.response_norm import LocalResponseNorm

AUXILIARY_CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "torchvision:googlenet": ("aux1.", "aux2."),
    "torchvision:inception_v3": ("AuxLogits.",),
}
"""Prefixes of the weights of classifiers that help to train a network of torchvision,
by the network: they are built only if its options ask for them."""


def build_imported_model(
    name: str,
    options: Mapping[str, Any],
    num_classes: int,
    seed: int,
) -> nn.Module:
    """Build a network from elsewhere, and replace the layers that are not exact.

    Args:
        name: torchvision:NAME, or package.module:callable.
        options: further keyword arguments of the callable.
        num_classes: number of classes, the callable's first argument.
        seed: seed of torch's global generator during the call; the generator's own
            state is restored afterwards.

    Raises:
        UserError: the network cannot be imported or built, or has layers or parameters
            that cannot be trained exactly.
    """
    make_model = _find_model_callable(name)
    # Build it. The callable draws its first weights from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make_model(num_classes, **options)
        # External code may raise anything.
        except Exception as error:
            raise UserError(
                f"model {name} cannot be built: {format_error(error)}"
            ) from error
    # Check what it returned.
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model {name} returned a {type(model).__name__}: "
            "it must return an nn.Module"
        )
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"model {name}: {key} is of a lazy layer, which has no weights before "
                "its first forward: use the layer that takes its size"
            )
    for key, p in model.named_parameters():
        if p.dtype != torch.float32:
            raise UserError(
                f"model {name}: parameter {key} is {p.dtype}: it must be torch.float32"
            )
    _replace_layers(model, name)
    return model.train()


def run_trial_step(
    model: nn.Module,
    name: str,
    num_classes: int,
    crop: int,
) -> None:
    """Run a training forward and backward to test whether it can be trained exactly.

    Args:
        model: the network, on the CPU.
        name: name of the network in messages.
        num_classes: number of logits that it must return.
        crop: side of the images in pixels.

    Raises:
        UserError: the network has no parameter to train or one that the logits do not
            depend on, cannot take the images, returns another shape, draws from a
            global random generator, or changes a buffer in a forward.
    """
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise UserError(
            f"model {name} has no parameter to train: "
            "unfreeze some, or name another model"
        )
    # Remember what a forward must not change.
    saved_buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    saved_rng_states = _get_global_rng_states()
    # Run a forward, and compare.
    logits = _run_trial_forward(model, name, num_classes, crop)
    if _get_global_rng_states() != saved_rng_states:
        raise UserError(
            f"model {name} draws from a global random generator while it trains, so "
            "the weights would depend on the cluster: use nn.Dropout, which distrain "
            "replaces by its own, or set the model's options so that it draws nothing"
        )
    for key, buffer in model.named_buffers():
        if not torch.equal(buffer, saved_buffers[key]):
            raise UserError(
                f"model {name} changes its buffer {key} in a forward, so the weights "
                "would depend on the cluster: keep it constant"
            )
    # Run a backward. The accumulator needs a gradient of each parameter in every step.
    _check_parameters_used(logits, parameters, name)


def _check_parameters_used(
    logits: Tensor,
    parameters: Mapping[str, Tensor],
    name: str,
) -> None:
    """Raise UserError if the logits do not depend on all of the parameters."""
    gradients = torch.autograd.grad(
        logits.sum(),
        list(parameters.values()),
        allow_unused=True,
    )
    unused: list[str] = []
    for key, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            unused.append(key)
    if unused:
        raise UserError(
            f"model {name}: the logits do not depend on {', '.join(unused[:3])}: "
            "remove such parameters, or freeze them by requires_grad_(False)"
        )


def _run_trial_forward(
    model: nn.Module,
    name: str,
    num_classes: int,
    crop: int,
) -> Tensor:
    """Return the logits of two random images, after a check of their shape."""
    # A generator of its own: the global ones are watched.
    images = torch.rand(2, 3, crop, crop, generator=torch.Generator().manual_seed(0))
    try:
        with micro_batch_context(0, 0, 0):
            logits = model(images)
    except UserError as error:
        raise UserError(f"model {name}: {error}") from None
    # External code may raise anything.
    except Exception as error:
        raise UserError(
            f"model {name} cannot take images (2, 3, {crop}, {crop}): "
            f"{format_error(error)}"
        ) from error
    if isinstance(logits, Tensor) and logits.shape == (2, num_classes):
        return logits
    is_tensor = isinstance(logits, Tensor)
    output = tuple(logits.shape) if is_tensor else f"a {type(logits).__name__}"
    raise UserError(
        f"model {name} returned {output} for two images: "
        f"it must return logits (2, {num_classes})"
    )


def _get_global_rng_states() -> list[Any]:
    """Return the states of all global random generators on the CPU."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        # The key of numpy's Mersenne twister, and the position in it.
        numpy_state[1].tolist(),
        numpy_state[2],
    ]


_TorchBatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def _find_model_callable(name: str) -> Callable[..., Any]:
    """Return the callable that builds a model from the number of classes."""
    module_name, attribute = name.split(":")
    if module_name == "torchvision":
        return _find_torchvision_model(attribute)
    try:
        imported = import_attribute(name)
    except ValueError as error:
        raise UserError(f"model {name} {error}") from None
    if not callable(imported):
        raise UserError(
            f"model {name} is of type {type(imported).__name__}: "
            "name a class or function that returns an nn.Module"
        )
    return imported  # type: ignore[no-any-return]


def _find_torchvision_model(name: str) -> Callable[..., Any]:
    import torchvision.models

    # Of this module alone: its submodules have detectors and segmenters, for example.
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UserError(
            f"torchvision has no classifier {name!r}: choose one of {', '.join(known)}"
        )
    # By default these two return auxiliary logits besides the logits, and warn that the
    # default of init_weights will change.
    defaults = {}
    if name in ("googlenet", "inception_v3"):
        defaults = {"aux_logits": False, "init_weights": True}
    return partial(_build_torchvision_model, name, defaults)


def _build_torchvision_model(
    name: str,
    defaults: dict[str, Any],
    num_classes: int,
    **options: Any,
) -> nn.Module:
    from torchvision.models import get_model

    # The user's options win over the defaults.
    model: nn.Module = get_model(
        name,
        weights=None,
        num_classes=num_classes,
        **{**defaults, **options},
    )
    return model


def _replace_layers(model: nn.Module, name: str) -> None:
    """Replace the layers whose result depends on thread, rank or device, in place."""
    # By the layer that is replaced. One layer may be in several places of a model, and
    # then its replacement must be too.
    replacements: dict[nn.Module, nn.Module] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if layer not in replacements:
            # Dropout layers are numbered in the model's order, which decides the masks.
            num_dropouts = sum(isinstance(r, Dropout) for r in replacements.values())
            replacements[layer] = _make_replacement(layer, num_dropouts, name)
        # The model itself, whose path is empty, stays.
        if path and replacements[layer] is not layer:
            parent, _, key = path.rpartition(".")
            setattr(model.get_submodule(parent), key, replacements[layer])


def _make_replacement(
    layer: nn.Module,
    num_dropouts: int,
    name: str,
) -> nn.Module:
    """Return the replacement of a layer, or the layer itself if it is exact.

    Args:
        layer: a layer of the model.
        num_dropouts: dropout layers that have been replaced so far.
        name: name of the model in messages.
    """
    if isinstance(layer, _TorchBatchNorm) and layer.track_running_stats:
        return _convert_batch_norm(layer, name)
    # Subclasses drop something else: they are left to the trial step, which refuses
    # those that draw from a global generator.
    if type(layer) is nn.Dropout:
        return Dropout(layer.p, num_dropouts)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        size = layer.output_size
        height, width = (size, size) if size is None or isinstance(size, int) else size
        # None keeps the size of the input. For (1, 1) torch takes the mean, whose
        # backward is deterministic.
        if height is not None and width is not None and (height, width) != (1, 1):
            return AdaptiveAvgPool2d(height, width)
    # Ours needs an odd size; torch's own allows even ones.
    if isinstance(layer, nn.LocalResponseNorm) and layer.size % 2:
        return LocalResponseNorm(
            layer.size,
            alpha=layer.alpha,
            beta=layer.beta,
            k=layer.k,
        )
    return layer


def _convert_batch_norm(layer: _TorchBatchNorm, name: str) -> BatchNorm:
    """Convert one of torch's batch normalizations, with its settings and its state."""
    if layer.momentum is None:
        raise UserError(
            f"model {name} has a batch normalization without momentum, which means a "
            "cumulative average: set a momentum"
        )
    batch_norm = BatchNorm(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
    )
    state = layer.state_dict()
    # Only a cumulative average uses the count of batches.
    state.pop("num_batches_tracked")
    batch_norm.load_state_dict(state)
    return batch_norm
