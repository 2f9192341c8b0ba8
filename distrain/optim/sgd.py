"""Momentum SGD with weight decay."""

from typing import TYPE_CHECKING, Literal

from pydantic import ValidationInfo, field_validator

from distrain.fields import make_conflict, result_field
from distrain.optim.update_rule import ParamGroup, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor

# Part of the tensor names in checkpoints, as torch names it.
MOMENTUM_BUFFER = "momentum_buffer"


class SGD(UpdateRule, name="sgd"):
    """Momentum SGD with weight decay (Sutskever 2013; Krizhevsky et al. 2012)."""

    form: Literal["torch", "paper"] = result_field("torch")
    """torch: v <- momentum v + g + decay w; w <- w - lr v. paper: v <- momentum v - lr
    (g + decay w); w <- w + v (Krizhevsky et al. 2012, section 5). They differ where the
    learning rate changes: the paper's velocity keeps the old rate. [result]"""
    momentum: float = result_field(0.9, ge=0, lt=1)
    """Fraction of the velocity that each step keeps, at least 0 and below 1. The
    default is that of Krizhevsky et al. 2012. [result]"""
    nesterov: bool = result_field(False)
    """Use Nesterov momentum, in torch's formulation (Sutskever et al. 2013).
    [result]"""
    weight_decay: float = result_field(5e-4, ge=0)
    """Factor of the weights that is added to the gradient. The default is that of
    Krizhevsky et al. 2012. [result]"""

    @field_validator("nesterov")
    @classmethod
    def _check_nesterov(
        cls,
        value: bool,
        info: ValidationInfo,
    ) -> bool:
        if value and not info.data.get("momentum"):
            raise make_conflict(
                "nesterov needs momentum: raise it, or remove nesterov",
                "momentum",
            )
        if value and info.data.get("form") == "paper":
            raise make_conflict(
                "the paper's form has no nesterov: remove it, or set form = torch",
                "form",
            )
        return value

    def list_state_tensors(self) -> tuple[str, ...]:
        """Name the velocity, which exists only with momentum."""
        return (MOMENTUM_BUFFER,) if self.momentum else ()

    def update_group(
        self,
        group: ParamGroup,
        lr: "Tensor",
        lr_ratio: float,
    ) -> None:
        """Update in the form that the config names."""
        # For the paper's form the buffer keeps u = -v / lr of the paper's v. Then
        # u <- momentum (previous lr / lr) u + g + weight_decay w, and w <- w - lr u:
        # torch's kernel with momentum / lr_ratio.
        momentum = self.momentum / lr_ratio if self.form == "paper" else self.momentum
        apply_momentum_sgd(
            group,
            lr,
            momentum=momentum,
            weight_decay=group.weight_decay,
            nesterov=self.nesterov,
        )


def apply_momentum_sgd(
    group: ParamGroup,
    lr: "Tensor",
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> None:
    """Apply v <- momentum v + g + weight_decay w; w <- w - lr v, in place.

    By torch's fused kernel.
    """
    from torch.optim.sgd import sgd

    # The function, not the class: making torch's optimizer loads its compiler.
    sgd(
        group.parameters,
        group.gradients,
        # A new list, which mypy accepts as the list[Tensor | None] that torch declares.
        [*group.state[MOMENTUM_BUFFER]] if momentum else [],
        fused=True,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
    )
