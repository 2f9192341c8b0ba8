"""Losses on logits and integer labels, one value a sample: the caller sums over valid samples and divides once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.errors import UserError
from distrain.sections import CrossEntropy, Distance, Hinge, Loss


def loss_of(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample: logits (n, classes) and labels int64 (n,) to (n,)."""
    if isinstance(loss, CrossEntropy):
        return cross_entropy(logits, labels, loss.label_smoothing)
    if isinstance(loss, Hinge):
        form = {"weston_watkins": weston_watkins, "crammer_singer": crammer_singer, "binary": binary_hinge}[loss.form]
        return form(logits, labels, loss.margin)
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    outputs = logits.softmax(1) if loss.outputs == "softmax" else logits
    if isinstance(loss, Distance):
        errors = (F.l1_loss if loss.name == "l1" else F.mse_loss)(outputs, one_hot, reduction="none")
    elif loss.name == "smooth_l1":
        errors = F.smooth_l1_loss(outputs, one_hot, reduction="none", beta=loss.threshold)
    else:
        errors = F.huber_loss(outputs, one_hot, reduction="none", delta=loss.threshold)
    return errors.mean(1)


def check_loss(loss: Loss, classes: int) -> None:
    """Refuse what cannot be computed of so many classes.

    Raises:
        UserError: two-class hinge on more classes.
    """
    if isinstance(loss, Hinge) and loss.form == "binary" and classes > 2 and not loss.one_vs_rest:
        raise UserError(
            f"loss.form = binary is for two classes, and the data set has {classes}: set loss.one_vs_rest = true, or "
            "loss.form = weston_watkins"
        )


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log softmax(logits)[label], or of the smoothed target: (n, classes) and int64 (n,) to (n,)."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def weston_watkins(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """Sum over the other classes of max(0, score - label's score + margin) (Weston and Watkins 1999)."""
    return _others(logits, labels, margin).sum(1)


def crammer_singer(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """The largest of those terms (Crammer and Singer 2001)."""
    return _others(logits, labels, margin).amax(1)


def _others(logits: Tensor, labels: Tensor, margin: float) -> Tensor:
    """max(0, score - label's score + margin) of each other class, 0 at the label."""
    above = (logits - logits.gather(1, labels[:, None]) + margin).clamp(min=0)
    return above.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), 0)


def binary_hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    """max(0, margin - y s) with y = 1 or -1: s is the difference of two logits, or one problem a class, summed."""
    if logits.shape[1] == 2:
        sign = (2 * labels - 1).to(logits.dtype)
        return (margin - sign * (logits[:, 1] - logits[:, 0])).clamp(min=0)
    signs = 2 * F.one_hot(labels, logits.shape[1]).to(logits.dtype) - 1
    return (margin - signs * logits).clamp(min=0).sum(1)


def correct(logits: Tensor, labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """How many valid samples have their label among the k highest logits: int64 scalar.

    A tie goes to the lower class, and a logit that is not a number counts as higher: the count is the same on
    every device.
    """
    target = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=labels.device)
    below = (logits < target) | ((logits == target) & (classes >= labels[:, None]))
    hit = (~below).sum(1) < k
    return (hit & (weights > 0)).sum()
