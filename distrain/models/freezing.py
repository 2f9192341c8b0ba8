"""Layers of a network that are not trained: `model.freeze`."""

from collections.abc import Iterable, Sequence

from torch import nn

from distrain.errors import UserError
from distrain.models.layers import BatchNorm
from distrain.parameter_names import check_prefixes, find_longest_prefix


def freeze_layers(model: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with one of the prefixes.

    They get no gradient. Batch normalization all of whose parameters are frozen, or
    whose own name has a prefix, stands still: it normalizes by its running statistics,
    which are not updated.

    Raises:
        UserError: no name begins with a prefix, or nothing is left to train.
    """
    if not prefixes:
        return
    norms = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm)
    }
    names = [name for name, _ in model.named_parameters()]
    # A normalization without scale and shift has no parameters.
    bare_norms = [name for name, layer in norms.items() if layer.weight is None]
    check_prefixes("model.freeze", prefixes, [*names, *bare_norms])

    # Freeze the parameters, then the normalizations.
    for name, parameter in model.named_parameters():
        if find_longest_prefix(name, prefixes) is not None:
            parameter.requires_grad_(False)
    for name, layer in norms.items():
        own_names = [f"{name}.{key}" for key, _ in layer.named_parameters()]
        is_frozen = find_longest_prefix(name, prefixes) is not None
        if is_frozen or _are_all_frozen(own_names, prefixes):
            layer.stand_still()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"model.freeze = {list(prefixes)} leaves nothing to train: freeze fewer "
            "layers"
        )


def _are_all_frozen(names: Sequence[str], prefixes: Iterable[str]) -> bool:
    """Return whether there are names and all of them have a prefix."""
    prefixes = list(prefixes)
    return bool(names) and all(find_longest_prefix(n, prefixes) for n in names)
