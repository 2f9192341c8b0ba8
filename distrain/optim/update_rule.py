"""Base class of the optimizers that a config can name.

An optimizer of your own is a subclass of `UpdateRule`, named `package.module:Class` in
the recipe.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distrain.fields import Choice, result_field

if TYPE_CHECKING:
    from torch import Tensor


# Identity, not equality, compares groups: comparing tensors gives tensors.
@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters with the same weight decay and the same learning rate."""

    parameters: "list[Tensor]"
    state: "dict[str, list[Tensor]]"
    """State tensors by the rule's names for them, in the order of the parameters."""
    weight_decay: float
    lr_scale: float
    """Multiplier on the learning rate."""

    @property
    def gradients(self) -> "list[Tensor]":
        """Gradients of the parameters, in their order; each parameter must have one."""
        return collect_gradients(self.parameters)


class UpdateRule(Choice):
    """Settings of an optimizer, and the rule by which it updates parameters.

    Biases may be treated unlike weights, as Krizhevsky's released source does.
    """

    default_name = "sgd"

    weight_decay: float = result_field(0.0, ge=0)
    """Weight decay: factor of the weights; 0: none. [result]"""
    decay_biases: bool = result_field(True)
    """Apply weight decay to biases and to the scales of normalization too, that is, to
    every one-dimensional parameter. [result]"""
    bias_lr: float = result_field(1.0, gt=0)
    """Learning rate of biases over that of weights; the released source of 2012 has 2.
    [result]"""
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = result_field({})
    """Factors, above 0, on the learning rate of layers or parameters by name, such as
    {classifier.6: 10}: each holds for what is below the name, and the longest name
    wins. [result]"""
    clip_norm: float | None = result_field(None, gt=0)
    """Maximum norm of the gradient of all parameters together; null: no clipping.
    [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """Name the state tensors that have the parameter's shape, zero at first."""
        return ()

    def list_state_scalars(self) -> tuple[str, ...]:
        """Name the state tensors of one number per parameter, zero at first."""
        return ()

    def get_weight_decay(self, parameter: "Tensor") -> float:
        """Return the weight decay of a parameter."""
        return self.weight_decay if self.decay_biases or parameter.ndim > 1 else 0.0

    def transform_gradients(self, group: ParamGroup) -> None:
        """Transform the gradients of a group in place, after clipping."""
        return

    @abstractmethod
    def update_group(
        self,
        group: ParamGroup,
        lr: "Tensor",
        lr_ratio: float,
    ) -> None:
        """Update the parameters of a group and their state, in place.

        The rule has to apply `group.weight_decay` itself.

        Args:
            group: the parameters to update.
            lr: the group's learning rate, a float32 scalar on the device; 0 if the
                weights must stay as they are.
            lr_ratio: this step's learning rate over the last step's.
        """


def collect_gradients(parameters: "Iterable[Tensor]") -> "list[Tensor]":
    """Return the gradient of each parameter; each must have one."""
    gradients = []
    for p in parameters:
        assert p.grad is not None
        gradients.append(p.grad)
    return gradients
