"""Adam."""

from typing import TYPE_CHECKING

from distrain.fields import result_field
from distrain.optim.update_rule import ParamGroup, UpdateRule

if TYPE_CHECKING:
    from torch import Tensor


class Adam(UpdateRule, name="adam"):
    """Adam with bias-corrected moments (Kingma and Ba 2015, algorithm 1).

    Weight decay is coupled or decoupled.
    """

    beta1: float = result_field(0.9, ge=0, lt=1)
    """Decay rate of the first moment, at least 0 and below 1; default of the paper.
    [result]"""
    beta2: float = result_field(0.999, ge=0, lt=1)
    """Decay rate of the second moment, at least 0 and below 1; default of the paper.
    [result]"""
    eps: float = result_field(1e-8, gt=0)
    """Added to the square root of the second moment, above 0; default of the paper.
    [result]"""
    decoupled: bool = result_field(False)
    """false: weight decay is added to the gradient; true: weights shrink by lr times
    weight decay (Loshchilov and Hutter 2019). [result]"""

    def list_state_tensors(self) -> tuple[str, ...]:
        """Name the first and the second moment."""
        return ("exp_avg", "exp_avg_sq")

    def list_state_scalars(self) -> tuple[str, ...]:
        """Name the count of updates, which corrects the bias."""
        return ("step",)

    def update_group(
        self,
        group: ParamGroup,
        lr: "Tensor",
        lr_ratio: float,
    ) -> None:
        """Update by torch's fused kernel."""
        from torch.optim.adam import adam

        # The function, not the class: making torch's optimizer loads its compiler.
        adam(
            group.parameters,
            group.gradients,
            group.state["exp_avg"],
            group.state["exp_avg_sq"],
            # The maxima of AMSGrad, which is off.
            [],
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
