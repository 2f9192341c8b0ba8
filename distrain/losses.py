"""Losses on logits and integer labels, one value per sample: the caller sums over valid samples and divides once.

A loss of your own is a subclass of `Loss`, named `package.module:Class` in the recipe.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationInfo, field_validator

from distrain.errors import UserError
from distrain.fields import Choice, result_field

if TYPE_CHECKING:
    from torch import Tensor


class Loss(Choice):
    """What is minimised."""

    default_name = "cross_entropy"

    @abstractmethod
    def __call__(self, logits: "Tensor", labels: "Tensor") -> "Tensor":
        """The loss of each sample: logits (n, classes) and labels int64 (n,) to (n,)."""

    def check_num_classes(self, num_classes: int) -> None:
        """Refuse what cannot be computed of so many classes. Raises UserError."""


class CrossEntropy(Loss, name="cross_entropy"):
    """-log softmax of the label's logit, averaged over the valid samples of the global batch."""

    label_smoothing: float = result_field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes alike (Szegedy et al. 2016, section 7). [result]"""

    def __call__(self, logits: "Tensor", labels: "Tensor") -> "Tensor":
        """-log softmax(logits)[label], or of the smoothed target."""
        import torch.nn.functional as F

        return F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.label_smoothing
        )


class Hinge(Loss, name="hinge"):
    """A margin between the label's score and the others'."""

    form: Literal["weston_watkins", "crammer_singer", "binary"] = result_field(
        "weston_watkins"
    )
    """weston_watkins: the sum over all other classes (the multi-class SVM of lectures); crammer_singer: the worst other
    class alone; binary: max(0, margin - y s) with y = 1 or -1. [result]"""
    margin: float = result_field(1.0, gt=0)
    """By how much the label's score must be above. [result]"""
    one_vs_rest: bool = result_field(False)
    """For the binary form with more than two classes: the sum over one binary problem a class. [result]"""

    @field_validator("one_vs_rest")
    @classmethod
    def _check_one_vs_rest(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("form") != "binary":
            raise ValueError(
                "one_vs_rest belongs to form = binary: remove it, or set that form"
            )
        return value

    def check_num_classes(self, num_classes: int) -> None:
        """Refuse the two-class hinge of more classes."""
        if self.form == "binary" and num_classes > 2 and not self.one_vs_rest:
            raise UserError(
                f"loss.form = binary is for two classes, and the data set has {num_classes}: set loss.one_vs_rest = true, "
                "or loss.form = weston_watkins"
            )

    def __call__(self, logits: "Tensor", labels: "Tensor") -> "Tensor":
        """Weston and Watkins 1999, Crammer and Singer 2001, or binary."""
        if self.form == "binary":
            return self._compute_binary(logits, labels)
        import torch.nn.functional as F

        # max(0, score - label's score + margin) of each other class, 0 at the label: (n, classes)
        above = (logits - logits.gather(1, labels[:, None]) + self.margin).clamp(min=0)
        others = above.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), 0)
        return others.sum(1) if self.form == "weston_watkins" else others.amax(1)

    def _compute_binary(self, logits: "Tensor", labels: "Tensor") -> "Tensor":
        """max(0, margin - y s): s is the difference of two logits, or there is one problem per class, summed."""
        import torch.nn.functional as F

        if logits.shape[1] == 2:
            sign = (2 * labels - 1).to(logits.dtype)
            return (self.margin - sign * (logits[:, 1] - logits[:, 0])).clamp(min=0)
        signs = 2 * F.one_hot(labels, logits.shape[1]).to(logits.dtype) - 1
        return (self.margin - signs * logits).clamp(min=0).sum(1)


class Distance(Loss):
    """A distance between outputs and the one-hot vector of the label, averaged over classes."""

    outputs: Literal["softmax", "logits"] = result_field("softmax")
    """What is compared with the one-hot vector. [result]"""

    @abstractmethod
    def compute_distance(self, outputs: "Tensor", one_hot: "Tensor") -> "Tensor":
        """The distance of each pair of elements: two of (n, classes) to (n, classes)."""

    def __call__(self, logits: "Tensor", labels: "Tensor") -> "Tensor":
        """The mean over classes of the distances."""
        import torch.nn.functional as F

        one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        outputs = logits.softmax(1) if self.outputs == "softmax" else logits
        return self.compute_distance(outputs, one_hot).mean(1)


class L1(Distance, name="l1"):
    """Mean absolute error."""

    def compute_distance(self, outputs: "Tensor", one_hot: "Tensor") -> "Tensor":
        """|x|."""
        import torch.nn.functional as F

        return F.l1_loss(outputs, one_hot, reduction="none")


class L2(Distance, name="l2"):
    """Mean squared error."""

    def compute_distance(self, outputs: "Tensor", one_hot: "Tensor") -> "Tensor":
        """x^2."""
        import torch.nn.functional as F

        return F.mse_loss(outputs, one_hot, reduction="none")


class SmoothL1(Distance, name="smooth_l1"):
    """x^2 / (2 threshold) where |x| is below it, else |x| - threshold / 2 (Girshick 2015)."""

    threshold: float = result_field(1.0, gt=0)
    """Where quadratic becomes linear: beta. [result]"""

    def compute_distance(self, outputs: "Tensor", one_hot: "Tensor") -> "Tensor":
        """Quadratic where it is small, linear where it is large."""
        import torch.nn.functional as F

        return F.smooth_l1_loss(outputs, one_hot, reduction="none", beta=self.threshold)


class Huber(Distance, name="huber"):
    """Smooth L1 times its threshold (Huber 1964)."""

    threshold: float = result_field(1.0, gt=0)
    """Where quadratic becomes linear: delta. [result]"""

    def compute_distance(self, outputs: "Tensor", one_hot: "Tensor") -> "Tensor":
        """Quadratic where it is small, linear where it is large."""
        import torch.nn.functional as F

        return F.huber_loss(outputs, one_hot, reduction="none", delta=self.threshold)
