"""What a network is made of, layer by layer: shapes, parameters and multiply-accumulates."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LayerSummary(NamedTuple):
    """A layer that has no layers inside."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    """Of its output for one image."""
    num_parameters: int
    num_macs: int
    """Multiply-accumulates of its forward for one image; those of convolutions and linear layers are counted."""


def format_layer_table(model: nn.Module, side: int) -> Iterator[str]:
    """The layers of a network as text of at most 80 columns; see `layers`."""
    found = summarize_layers(model, side)
    whole = sum(p.numel() for p in model.parameters())
    if others := whole - sum(layer.num_parameters for layer in found):
        found.append(LayerSummary("(others)", "parameters", (), others, 0))
    macs = max(1, sum(layer.num_macs for layer in found))
    names = min(14, max(5, *(len(layer.name) for layer in found)))
    kinds = min(19, max(4, *(len(layer.kind) for layer in found)))
    yield f"{'layer':<{names}} {'kind':<{kinds}} {'output':>11} {'parameters':>11}     % {'10^6 MACs':>9}     %"
    for name, kind, shape, parameters, count in found:
        short = (
            name
            if len(name) <= names
            else "\N{HORIZONTAL ELLIPSIS}" + name[1 - names :]
        )
        size = "x".join(str(n) for n in shape)
        share, part = (
            f"{n / of:>5.1%}" if n else f"{'-':>5}"
            for n, of in ((parameters, whole), (count, macs))
        )
        millions = f"{count / 1e6:>9,.2f}" if count else f"{'-':>9}"
        yield f"{short:<{names}} {kind[:kinds]:<{kinds}} {size:>11} {parameters:>11,} {share} {millions} {part}"
    yield f"{whole:,} parameters, {macs / 1e6:,.2f} million multiply-accumulates (MACs) at {side} x {side}"


def summarize_layers(model: nn.Module, side: int) -> list[LayerSummary]:
    """The layers of a network in the order in which an image of `side` x `side` pixels passes them."""
    found: list[LayerSummary] = []
    hooks = [
        layer.register_forward_hook(_make_summary_hook(name, found))
        for name, layer in model.named_modules()
        if not any(True for _ in layer.children())
    ]
    device = next(model.parameters()).device
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def _make_summary_hook(
    name: str, summaries: list[LayerSummary]
) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that adds a layer to those that were found."""

    def record_layer(layer: nn.Module, _: Any, output: Tensor) -> None:
        shape = tuple(output.shape[1:])
        again = any(earlier.name == name for earlier in summaries)
        parameters = 0 if again else sum(p.numel() for p in layer.parameters())
        summaries.append(
            LayerSummary(
                name,
                _describe_layer_kind(layer),
                shape,
                parameters,
                _count_macs(layer, output),
            )
        )

    return record_layer


def _describe_layer_kind(layer: nn.Module) -> str:
    """The class, with what tells layers of one class apart."""
    name = type(layer).__name__
    if isinstance(layer, nn.Conv2d):
        size = "x".join(str(k) for k in layer.kernel_size)
        stride = f"/{layer.stride[0]}" if layer.stride[0] > 1 else ""
        groups = f" in {layer.groups}" if layer.groups > 1 else ""
        return f"{name} {size}{stride}{groups}"
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return f"{name} {layer.kernel_size}/{layer.stride}"
    return name


def _count_macs(layer: nn.Module, output: Tensor) -> int:
    if isinstance(layer, nn.Conv2d):
        return output[0].numel() * layer.weight[0].numel()
    if isinstance(layer, nn.Linear):
        return output[0].numel() * layer.in_features
    return 0
