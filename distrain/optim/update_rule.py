"""What an optimizer of a config is: its settings, and how it moves parameters.

An optimizer of your own is a subclass of `UpdateRule`, named `package.module:Class` in the recipe.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distrain.fields import Choice, result_field

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters with the same decay and the same rate."""

    parameters: "list[Tensor]"
    state: "dict[str, list[Tensor]]"
    """By the names that the rule gave, a tensor for each parameter."""
    weight_decay: float
    lr_scale: float
    """Over that of the others."""

    @property
    def gradients(self) -> "list[Tensor]":
        """The gradient of each parameter, which has one."""
        return collect_gradients(self.parameters)


class UpdateRule(Choice):
    """Moves parameters by their gradients.

    Biases may be treated unlike weights, as Krizhevsky's released source does.
    """

    default_name = "sgd"

    weight_decay: float = result_field(0.0, ge=0)
    """Factor of the weights. [result]"""
    decay_biases: bool = result_field(True)
    """Whether weight decay acts on biases and on the scales of normalisation, all that has one dimension. [result]"""
    bias_lr: float = result_field(1.0, gt=0)
    """Rate of biases over that of weights; the released source has 2. [result]"""
    clip_norm: float | None = result_field(None, gt=0)
    """Largest norm of the gradient of all parameters together; null: it is not clipped. [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """Names of the state tensors in the shape of the parameter, zero at first."""
        return ()

    def list_state_scalars(self) -> tuple[str, ...]:
        """Names of the state tensors of one number for each parameter, zero at first."""
        return ()

    def get_weight_decay(self, parameter: "Tensor") -> float:
        """The weight decay of a parameter."""
        return self.weight_decay if self.decay_biases or parameter.ndim > 1 else 0.0

    def transform_gradients(self, group: ParamGroup) -> None:
        """Change the gradients of a group in place before they are used, after they were clipped."""
        return

    @abstractmethod
    def update_group(self, group: ParamGroup, lr: "Tensor", lr_ratio: float) -> None:
        """Move the parameters of a group, and its state, in place; `group.weight_decay` is the rule's to apply.

        Args:
            group: what to move.
            lr: the group's rate, a float32 scalar on the device; 0 where the weights have to stay.
            change: this step's rate over the last one's.
        """


def collect_gradients(parameters: "Iterable[Tensor]") -> "list[Tensor]":
    """The gradient of each parameter, which has one."""
    found = []
    for p in parameters:
        assert p.grad is not None
        found.append(p.grad)
    return found
