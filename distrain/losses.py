"""Losses on logits and integer labels, one value per sample.

The caller sums them over the valid samples and divides once. A loss of your own is a
subclass of `Loss`, named `package.module:Class` in the recipe.
"""

from abc import abstractmethod
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from distrain.errors import UserError
from distrain.fields import Choice, make_conflict, result_field

if TYPE_CHECKING:
    from torch import Tensor

_Weights = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(strict=False)]

# torch is imported inside the methods: reading a config must not load it.


class Loss(Choice):
    """Loss that training minimizes."""

    default_name = "cross_entropy"

    class_weights: Literal["balanced"] | _Weights | None = result_field(None)
    """Weight of each class in the training loss, in the order of the classes, or
    balanced: 1 / samples of the class; null: all alike. They are scaled to a mean of 1
    over the training set, and the sum of a batch is divided by its number of samples:
    torch divides by the sum of the batch's weights, so that the step of a batch without
    rare classes is larger there. Validation losses have no weights. [result]"""

    @field_validator("class_weights", mode="before")
    @classmethod
    def _check_class_weights(cls, value: Any) -> Any:
        if value is None or value == "balanced":
            return value
        is_list = isinstance(value, list | tuple)
        if is_list and all(_is_weight(weight) for weight in value):
            return value
        raise ValueError(
            f"must be balanced, or a list of one weight per class (0 or more), not "
            f"{value!r}"
        )

    @abstractmethod
    def __call__(
        self,
        logits: "Tensor",
        labels: "Tensor",
    ) -> "Tensor":
        """Compute the loss of each sample.

        Args:
            logits: float of shape (n, classes).
            labels: int64 of shape (n,), from 0 to classes - 1.

        Returns:
            float of shape (n,).
        """

    def check_num_classes(self, num_classes: int) -> None:
        """Refuse a number of classes that the loss is not defined for.

        Raises:
            UserError: the loss cannot be computed for this number of classes.
        """


class CrossEntropy(Loss, name="cross_entropy"):
    """Cross-entropy: -log softmax(logits)[label]."""

    label_smoothing: float = result_field(0.0, ge=0, lt=1)
    """Fraction of the target that is spread evenly over all classes, at least 0 and
    below 1 (Szegedy et al. 2016, section 7); 0: no smoothing. [result]"""

    def __call__(
        self,
        logits: "Tensor",
        labels: "Tensor",
    ) -> "Tensor":
        """Compute the cross-entropy with the label, or with the smoothed target."""
        import torch.nn.functional as F

        return F.cross_entropy(
            logits,
            labels,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )


class Hinge(Loss, name="hinge"):
    """Hinge loss: a margin between the label's score and those of other classes."""

    form: Literal["weston_watkins", "crammer_singer", "binary"] = result_field(
        "weston_watkins"
    )
    """weston_watkins: sum over all other classes (the multi-class SVM of lectures);
    crammer_singer: the worst other class alone; binary: max(0, margin - y s), with
    y = 1 for class 1 and -1 for class 0, and s = logit 1 - logit 0. [result]"""
    margin: float = result_field(1.0, gt=0)
    """Amount by which the label's score must exceed the others, above 0. [result]"""
    one_vs_rest: bool = result_field(False)
    """Use the binary form with more than two classes: one binary problem per class,
    with its logit as s and y = 1 for the label alone, summed. [result]"""

    @field_validator("one_vs_rest")
    @classmethod
    def _check_one_vs_rest(
        cls,
        value: bool,
        info: ValidationInfo,
    ) -> bool:
        if value and info.data.get("form") != "binary":
            raise make_conflict(
                "one_vs_rest belongs to form = binary: remove it, or set that form",
                "form",
            )
        return value

    def check_num_classes(self, num_classes: int) -> None:
        """Refuse the binary form for more than two classes, unless `one_vs_rest`."""
        if self.form == "binary" and num_classes > 2 and not self.one_vs_rest:
            raise UserError(
                "loss.form = binary is for two classes, and the data set has "
                f"{num_classes}: set loss.one_vs_rest = true, "
                "or loss.form = weston_watkins"
            )

    def __call__(
        self,
        logits: "Tensor",
        labels: "Tensor",
    ) -> "Tensor":
        """Compute the hinge loss of `form`.

        Weston and Watkins 1999, Crammer and Singer 2001, or binary.
        """
        if self.form == "binary":
            return self._compute_binary(logits, labels)
        import torch.nn.functional as F

        # (n, classes): max(0, score - label's score + margin), but 0 at the label.
        label_scores = logits.gather(1, labels[:, None])
        violations = (logits - label_scores + self.margin).clamp(min=0)
        is_label = F.one_hot(labels, logits.shape[1]).bool()
        violations = violations.masked_fill(is_label, 0)
        if self.form == "weston_watkins":
            return violations.sum(1)
        # amax, not max: it shares the gradient between equal classes, so that the
        # result does not depend on which of them a device finds first.
        return violations.amax(1)

    def _compute_binary(
        self,
        logits: "Tensor",
        labels: "Tensor",
    ) -> "Tensor":
        """Compute max(0, margin - y s), with the sign y of the label.

        For two classes s is the difference of their logits; for more there is one
        problem per class, with its logit as s, and the losses are summed.
        """
        import torch.nn.functional as F

        if logits.shape[1] == 2:
            sign = (2 * labels - 1).to(logits.dtype)
            score = logits[:, 1] - logits[:, 0]
            return (self.margin - sign * score).clamp(min=0)
        one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        signs = 2 * one_hot - 1
        return (self.margin - signs * logits).clamp(min=0).sum(1)


class Distance(Loss):
    """Distance of outputs from the label's one-hot vector, averaged over classes."""

    outputs: Literal["softmax", "logits"] = result_field("softmax")
    """Values compared with the one-hot vector: class probabilities, or the logits as
    they are. [result]"""

    @abstractmethod
    def compute_distance(
        self,
        outputs: "Tensor",
        one_hot: "Tensor",
    ) -> "Tensor":
        """Compute the distance of each pair of elements.

        Both arguments and the result have shape (n, classes).
        """

    def __call__(
        self,
        logits: "Tensor",
        labels: "Tensor",
    ) -> "Tensor":
        """Compute the mean of the distances over classes."""
        import torch.nn.functional as F

        one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        outputs = logits.softmax(1) if self.outputs == "softmax" else logits
        return self.compute_distance(outputs, one_hot).mean(1)


class L1(Distance, name="l1"):
    """Mean absolute error."""

    def compute_distance(
        self,
        outputs: "Tensor",
        one_hot: "Tensor",
    ) -> "Tensor":
        """Compute |x| of the difference x."""
        import torch.nn.functional as F

        return F.l1_loss(outputs, one_hot, reduction="none")


class L2(Distance, name="l2"):
    """Mean squared error."""

    def compute_distance(
        self,
        outputs: "Tensor",
        one_hot: "Tensor",
    ) -> "Tensor":
        """Compute x^2 of the difference x."""
        import torch.nn.functional as F

        return F.mse_loss(outputs, one_hot, reduction="none")


class SmoothL1(Distance, name="smooth_l1"):
    """x^2 / (2 threshold) where |x| < threshold, else |x| - threshold / 2.

    Girshick 2015.
    """

    threshold: float = result_field(1.0, gt=0)
    """Difference, above 0, at which the loss turns from quadratic to linear: torch's
    beta. [result]"""

    def compute_distance(
        self,
        outputs: "Tensor",
        one_hot: "Tensor",
    ) -> "Tensor":
        """Compute the smooth L1 loss of the difference."""
        import torch.nn.functional as F

        return F.smooth_l1_loss(outputs, one_hot, reduction="none", beta=self.threshold)


class Huber(Distance, name="huber"):
    """Smooth L1 times its threshold (Huber 1964)."""

    threshold: float = result_field(1.0, gt=0)
    """Difference, above 0, at which the loss turns from quadratic to linear: torch's
    delta. [result]"""

    def compute_distance(
        self,
        outputs: "Tensor",
        one_hot: "Tensor",
    ) -> "Tensor":
        """Compute the Huber loss of the difference."""
        import torch.nn.functional as F

        return F.huber_loss(outputs, one_hot, reduction="none", delta=self.threshold)


def _is_weight(value: Any) -> bool:
    """Return whether a value is a number, finite and at least 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and isfinite(value) and value >= 0
