"""Adam."""

from typing import TYPE_CHECKING

from distrain.fields import result_field
from distrain.optim.update_rule import ParamGroup, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


class Adam(UpdateRule, name="adam"):
    """Bias-corrected first and second moments (Kingma and Ba 2015, algorithm 1); decay coupled or decoupled."""

    beta1: float = result_field(0.9, ge=0, lt=1)
    """Decay of the first moment. [result]"""
    beta2: float = result_field(0.999, ge=0, lt=1)
    """Decay of the second moment. [result]"""
    eps: float = result_field(1e-8, gt=0)
    """Added to the root of the second moment. [result]"""
    decoupled: bool = result_field(False)
    """false: decay is added to the gradient; true: weights shrink by lr times decay (Loshchilov and Hutter 2019).
    [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """The first and the second moment."""
        return ("exp_avg", "exp_avg_sq")

    def list_state_scalars(self) -> tuple[str, ...]:
        """The steps done."""
        return ("step",)

    def update_group(self, group: ParamGroup, lr: "Tensor", lr_ratio: float) -> None:
        """By torch's fused kernel."""
        from torch.optim.adam import adam

        adam(
            group.parameters,
            group.gradients,
            group.state["exp_avg"],
            group.state["exp_avg_sq"],
            [],  # of AMSGrad
            group.state["step"],
            fused=True,
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self.eps,
            maximize=False,
        )
