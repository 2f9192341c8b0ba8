"""What all optimizers share: groups, clipping, a complete state from the first step, a rate on the device.

The arithmetic is that of torch's fused optimizers, by the functions under its optimizer classes: those load torch's
compiler when they are made, which takes a second and more.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from distrain.optim.update_rule import ParamGroup, UpdateRule, collect_gradients

_CHUNK_ELEMENTS = 1 << 17


class Optimizer:
    """Moves parameters by an update rule; its state tensors exist from the start, named after their parameters."""

    def __init__(
        self, update_rule: UpdateRule, named_parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Make the state of `parameters`, which are given by name."""
        self._update_rule, self._named_parameters = update_rule, dict(named_parameters)
        self._state: dict[Tensor, dict[str, Tensor]] = {
            p: {
                **{
                    name: torch.zeros_like(p, requires_grad=False)
                    for name in update_rule.list_state_tensors()
                },
                **{
                    name: torch.zeros((), device=p.device)
                    for name in update_rule.list_state_scalars()
                },
            }
            for p in named_parameters.values()
        }
        self._param_groups = list(self._make_param_groups())

    def _make_param_groups(self) -> Iterator[ParamGroup]:
        """The groups of parameters that are moved alike."""
        found: dict[tuple[float, float], list[Tensor]] = {}
        for name, p in self._named_parameters.items():
            rate = (
                self._update_rule.bias_lr if name.rpartition(".")[2] == "bias" else 1.0
            )
            found.setdefault((self._update_rule.get_weight_decay(p), rate), []).append(
                p
            )
        for (decay, rate), members in found.items():
            state = {
                name: [self._state[p][name] for p in members]
                for name in self._state[members[0]]
            }
            yield ParamGroup(members, state, decay, rate)

    @torch.no_grad()
    def step(self, lr: Tensor, lr_ratio: float = 1.0) -> None:
        """Move the parameters by their `grad`, which each of them has.

        Args:
            lr: float32 scalar on the device; 0 leaves the weights alone.
            change: this step's rate over the last one's.
        """
        self._transform_gradients()
        for group in self._param_groups:
            self._update_rule.update_group(group, lr * group.lr_scale, lr_ratio)

    def _transform_gradients(self) -> None:
        """Clip them, and do what the rule does to them before it uses them."""
        if self._update_rule.clip_norm is not None:
            gradients = collect_gradients(self._named_parameters.values())
            whole = compute_total_norm(gradients)
            factor = torch.where(
                whole > self._update_rule.clip_norm,
                self._update_rule.clip_norm / whole,
                1.0,
            ).float()
            for gradient in gradients:
                gradient.mul_(factor)
        for group in self._param_groups:
            self._update_rule.transform_gradients(group)

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor, by `<parameter>:<name>`."""
        return {
            f"{name}:{key}": t
            for name, p in self._named_parameters.items()
            for key, t in self._state[p].items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        own = self.state_dict()
        assert own.keys() == state_dict.keys(), own.keys() ^ state_dict.keys()
        for key, tensor in own.items():
            tensor.copy_(state_dict[key])


def compute_total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of tensors together: float64 scalar on their device.

    Squares are summed in float64 over fixed chunks, and these in a fixed order: in float32 the norm of 61 million
    numbers was 0.15 % off, and another one for another number of threads. On a CPU chunk after chunk stays in a core's
    cache; on a GPU the chunks of a tensor are the rows of one view, since each further kernel costs a launch.
    """
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu":
            for chunk in torch.split(flat, _CHUNK_ELEMENTS):
                total = total + chunk.double().square().sum()
        else:
            total = total + _sum_squares(flat)
    return total.sqrt()


def _sum_squares(flat: Tensor) -> Tensor:
    """Of a tensor of shape (n,), in float64, over rows of `_CHUNK` elements and what is left: float64 scalar."""
    whole = len(flat) // _CHUNK_ELEMENTS * _CHUNK_ELEMENTS
    sums = flat[:whole].view(-1, _CHUNK_ELEMENTS).double().square_().sum(1)
    return torch.cat([sums, flat[whole:].double().square_().sum()[None]]).sum()
