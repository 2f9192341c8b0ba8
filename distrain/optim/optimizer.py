"""What all optimizers share: torch's fused arithmetic, a complete state from the first step, a rate on the device."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Optimizer:
    """A torch optimizer whose state tensors exist from the start and are named after their parameters."""

    def __init__(
        self, rule: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], moments: tuple[str, ...]
    ) -> None:
        """`moments`: names of the rule's state tensors in the shape of the parameter, zero at first."""
        self._rule, self._parameters = rule, dict(parameters)
        for p in self._parameters.values():
            state = rule.state[p]
            for moment in moments:
                state[moment] = torch.zeros_like(p)
            if isinstance(rule, torch.optim.Adam):
                state["step"] = torch.zeros((), device=p.device)

    def step(self, lr: Tensor) -> None:
        """Move the parameters by their `grad`. `lr` is a float32 scalar on the device: 0 leaves the weights alone."""
        for group in self._rule.param_groups:
            group["lr"] = lr
        self._rule.step()

    def state(self) -> dict[str, Tensor]:
        """Every state tensor, by `<parameter>:<name>`."""
        return {f"{name}:{key}": t for name, p in self._parameters.items() for key, t in self._rule.state[p].items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state."""
        own = self.state()
        assert own.keys() == state.keys(), own.keys() ^ state.keys()
        for key, tensor in own.items():
            tensor.copy_(state[key])
