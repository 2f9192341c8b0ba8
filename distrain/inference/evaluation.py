"""Result of an evaluation: accuracy with intervals, per class, and confusions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distrain.inference.image_table import ImageTable
from distrain.inference.trained_model import ModelOrigin
from distrain.training.evaluate import EvalResult

FORMAT_VERSION = 1
# Two-sided quantile of the normal distribution for 95 %.
_Z_95 = 1.959963984540054
# What may make the bits of two evaluations differ; other versions do not.
_HARDWARE_KEYS = ("device", "cpu_capability")


class Interval(NamedTuple):
    """Interval of 95 % confidence for a fraction."""

    low: float
    high: float


class ClassResult(NamedTuple):
    """Accuracy on the images of one class."""

    name: str
    num_samples: int
    top1_count: int
    top5_count: int
    top1: float
    """Fraction of its images whose highest class is it; 0 if it has no image."""
    interval: Interval
    """Interval of `top1`."""


class Confusion(NamedTuple):
    """Images of one class for which another is the highest."""

    label: str
    predicted: str
    num_samples: int
    fraction: float
    """Share of the images of `label`."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Result of an evaluation; the same for any number of workers and lanes."""

    origins: tuple[ModelOrigin, ...]
    """The models, whose probabilities are averaged if there are several."""
    data: str
    """URL of the data set, without credentials."""
    data_fingerprint: str
    crops: str
    """center or ten."""
    loss_name: str
    settings: Mapping[str, Any]
    """Settings that the bits depend on: size of a chunk, precision, decoder."""
    classes: tuple[str, ...]
    result: EvalResult
    """Counts, accuracies and mean loss."""
    images: ImageTable
    """Result of each image."""
    left_out: Mapping[str, str]
    """Reason by name of the images that do not decode."""
    hardware_hash: str
    """SHA-256 of the images and logits of the first chunk as computed here."""
    environment: Mapping[str, str]
    """Versions and kind of hardware."""

    @property
    def top1_interval(self) -> Interval:
        """Interval of the top-1 accuracy."""
        return compute_wilson_interval(self.result.top1_count, self.result.num_samples)

    @property
    def top5_interval(self) -> Interval:
        """Interval of the top-5 accuracy."""
        return compute_wilson_interval(self.result.top5_count, self.result.num_samples)

    @property
    def hardware_differences(self) -> dict[str, tuple[str, str]]:
        """Kind of processor or GPU at training and here, by name, if it differs."""
        differences = {}
        for origin in self.origins:
            for key in _HARDWARE_KEYS:
                before = str(origin.environment.get(key))
                now = str(self.environment.get(key))
                if before != now:
                    differences[key] = (before, now)
        return differences

    def compute_class_results(self) -> list[ClassResult]:
        """Return the accuracy on each class, in their order."""
        images = self.images
        num_classes = len(self.classes)

        def count_labels(chosen: NDArray[np.bool_]) -> list[int]:
            labels = images.labels[images.is_valid & chosen]
            counts: list[int] = np.bincount(labels, minlength=num_classes).tolist()
            return counts

        counts = zip(
            self.classes,
            count_labels(np.ones(len(images.labels), bool)),
            count_labels(images.ranks < 1),
            count_labels(images.ranks < 5),
            strict=True,
        )
        return [
            ClassResult(
                name,
                num_samples,
                top1_count,
                top5_count,
                top1_count / num_samples if num_samples else 0.0,
                compute_wilson_interval(top1_count, num_samples),
            )
            for name, num_samples, top1_count, top5_count in counts
        ]

    def count_confusions(self) -> list[Confusion]:
        """Return the pairs of classes that are confused, the most frequent first."""
        images = self.images
        num_classes = len(self.classes)
        # A tie in rank goes to the lower class, so the first is wrong if the rank is 1.
        is_wrong = images.is_valid & (images.ranks > 0)
        pairs = images.labels * num_classes + images.top_classes[:, 0]
        values, counts = np.unique(pairs[is_wrong], return_counts=True)
        sizes = np.bincount(images.labels[images.is_valid], minlength=num_classes)
        confusions = []
        # By count, and then in the order of the classes.
        for i in np.argsort(-counts, kind="stable"):
            label, predicted = divmod(int(values[i]), num_classes)
            count = int(counts[i])
            names = (self.classes[label], self.classes[predicted])
            confusions.append(Confusion(*names, count, count / int(sizes[label])))
        return confusions

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values for JSON, without the images."""
        result = self.result
        return {
            "format": FORMAT_VERSION,
            "models": [
                {
                    "run": origin.run,
                    "checkpoint": origin.checkpoint,
                    "step": origin.step,
                    "weights": origin.weights,
                    "reduction": origin.reduction,
                }
                for origin in self.origins
            ],
            "data": {"url": self.data, "fingerprint": self.data_fingerprint},
            "crops": self.crops,
            "settings": dict(self.settings),
            "images": result.num_samples,
            "left_out": dict(self.left_out),
            "top1": _describe_fraction(
                result.top1, result.top1_count, self.top1_interval
            ),
            "top5": _describe_fraction(
                result.top5, result.top5_count, self.top5_interval
            ),
            "loss": {
                "name": self.loss_name,
                # JSON has no NaN.
                "mean": None if math.isnan(result.loss) else result.loss,
            },
            "classes": [
                {
                    "class": row.name,
                    "images": row.num_samples,
                    "top1_count": row.top1_count,
                    "top5_count": row.top5_count,
                    "top1": row.top1,
                    "interval": list(row.interval),
                }
                for row in self.compute_class_results()
            ],
            "confusions": [
                {
                    "class": row.label,
                    "predicted": row.predicted,
                    "images": row.num_samples,
                    "fraction": row.fraction,
                }
                for row in self.count_confusions()
            ],
            "hardware": {
                "hash": self.hardware_hash,
                "environment": dict(self.environment),
                "differs_from_training": {
                    key: {"training": before, "here": now}
                    for key, (before, now) in self.hardware_differences.items()
                },
            },
        }


def compute_wilson_interval(count: int, total: int) -> Interval:
    """Return the interval of 95 % confidence for a fraction (Wilson 1927).

    Unlike the normal approximation it is right near 0 and 1, and for few images.

    Args:
        count: images that are right.
        total: all images; 0 gives the interval from 0 to 1.
    """
    if not total:
        return Interval(0.0, 1.0)
    z2 = _Z_95**2
    fraction = count / total
    center = (fraction + z2 / (2 * total)) / (1 + z2 / total)
    variance = fraction * (1 - fraction) / total + z2 / (4 * total**2)
    half = _Z_95 * math.sqrt(variance) / (1 + z2 / total)
    # Exactly 0 and 1 at the ends, where rounding gives numbers beside them.
    low = center - half if count else 0.0
    high = center + half if count < total else 1.0
    return Interval(low, high)


def format_accuracy(fraction: float, interval: Interval) -> str:
    """Return an accuracy with its interval, for people."""
    return f"{fraction:.2%}  (95% interval {interval.low:.2%} to {interval.high:.2%})"


def list_worst_classes(rows: Sequence[ClassResult], count: int) -> list[ClassResult]:
    """Return the classes with images that have the lowest top-1, the lowest first."""
    with_images = [row for row in rows if row.num_samples]
    return sorted(with_images, key=lambda row: row.top1)[:count]


def _describe_fraction(fraction: float, count: int, interval: Interval) -> Any:
    return {"fraction": fraction, "count": count, "interval": list(interval)}
