"""Summary of a network, layer by layer: shapes, parameters and multiply-accumulates."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LayerSummary(NamedTuple):
    """Summary of a layer that contains no other layers."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    """Shape of the output for one image."""
    num_parameters: int
    num_macs: int
    """Multiply-accumulates of a forward of one image; those of convolutions and linear
    layers are counted."""


class ModelSummary(NamedTuple):
    """Summary of a network."""

    side: int
    """Height and width in pixels of the image that the shapes are for."""
    layers: list[LayerSummary]
    """In the order in which an image passes them; their parameters add up to all."""


def format_layer_table(summary: ModelSummary) -> Iterator[str]:
    """Format a summary as lines of at most 80 columns."""
    layers = summary.layers
    total_parameters = sum(layer.num_parameters for layer in layers)
    # At least 1, to divide by.
    total_macs = max(1, sum(layer.num_macs for layer in layers))

    # Columns are as wide as their longest entry, up to what 80 columns allow.
    name_width = min(14, max(5, *(len(layer.name) for layer in layers)))
    kind_width = min(19, max(4, *(len(layer.kind) for layer in layers)))
    yield (
        f"{'layer':<{name_width}} {'kind':<{kind_width}} {'output':>11} "
        f"{'parameters':>11}     % {'10^6 MACs':>9}     %"
    )
    for layer in layers:
        name = _shorten_name(layer.name, name_width)
        kind = layer.kind[:kind_width]
        shape = "x".join(str(size) for size in layer.output_shape)
        parameter_share = _format_share(layer.num_parameters, total_parameters)
        mac_share = _format_share(layer.num_macs, total_macs)
        millions = f"{layer.num_macs / 1e6:,.2f}" if layer.num_macs else "-"
        yield (
            f"{name:<{name_width}} {kind:<{kind_width}} {shape:>11} "
            f"{layer.num_parameters:>11,} {parameter_share} {millions:>9} {mac_share}"
        )
    yield (
        f"{total_parameters:,} parameters, {total_macs / 1e6:,.2f} million "
        f"multiply-accumulates (MACs) at {summary.side} x {summary.side}"
    )


def _shorten_name(name: str, width: int) -> str:
    # The end of a name says more than its beginning: `features.0.conv1`.
    if len(name) <= width:
        return name
    return "\N{HORIZONTAL ELLIPSIS}" + name[1 - width :]


def _format_share(count: int, total: int) -> str:
    return f"{count / total:>5.1%}" if count else f"{'-':>5}"


def summarize_layers(model: nn.Module, side: int) -> list[LayerSummary]:
    """Summarize the layers of a network, in the order in which an image passes them.

    The network may be on the meta device. It runs an evaluation forward of one image of
    `side` x `side` pixels, and is left as it was. Parameters outside of the layers,
    such as a class token, come last, as a layer named (others).
    """
    summaries: list[LayerSummary] = []
    hooks = []
    for name, layer in model.named_modules():
        # A layer that contains others is covered by them.
        has_children = next(layer.children(), None) is not None
        if not has_children:
            hook = layer.register_forward_hook(_make_summary_hook(name, summaries))
            hooks.append(hook)
    device = next(model.parameters()).device
    was_training = model.training
    # Evaluation: a training forward would need the keys of a micro-batch.
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()

    num_parameters = sum(p.numel() for p in model.parameters())
    num_others = num_parameters - sum(layer.num_parameters for layer in summaries)
    if num_others:
        summaries.append(LayerSummary("(others)", "parameters", (), num_others, 0))
    return summaries


def _make_summary_hook(
    name: str,
    summaries: list[LayerSummary],
) -> Callable[[nn.Module, Any, Tensor], None]:
    """Make a forward hook that appends a layer's summary to a list."""

    def record_layer(
        layer: nn.Module,
        _: Any,
        output: Tensor,
    ) -> None:
        # A layer that is used several times has one line per use; its parameters count
        # once.
        is_seen = any(earlier.name == name for earlier in summaries)
        num_parameters = 0
        if not is_seen:
            num_parameters = sum(p.numel() for p in layer.parameters())
        summary = LayerSummary(
            name=name,
            kind=_describe_layer_kind(layer),
            output_shape=tuple(output.shape[1:]),
            num_parameters=num_parameters,
            num_macs=_count_macs(layer, output),
        )
        summaries.append(summary)

    return record_layer


def _describe_layer_kind(layer: nn.Module) -> str:
    """Describe a layer by its class, and by kernel, stride and groups."""
    name = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        kernel = "x".join(str(side) for side in layer.kernel_size)
        stride = f"/{layer.stride[0]}" if layer.stride[0] > 1 else ""
        groups = f" in {layer.groups}" if layer.groups > 1 else ""
        return f"{name} {kernel}{stride}{groups}"
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return f"{name} {layer.kernel_size}/{layer.stride}"
    return name


def _count_macs(layer: nn.Module, output: Tensor) -> int:
    # Each element of the output is a sum of as many products as a filter has weights.
    if isinstance(layer, nn.Conv2d):
        return output[0].numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return output[0].numel() * layer.in_features
    return 0
