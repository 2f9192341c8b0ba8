"""Results of an evaluation per image: what all of its numbers are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.training.evaluate import (
    LOSS_FRACTION_BITS,
    EvalResult,
    SampleScores,
    sum_scores,
)

MAX_TOP_CLASSES = 5
COLUMNS = (
    "sample_ids",
    "labels",
    "is_valid",
    "ranks",
    "fixed_losses",
    "is_finite",
    "top_classes",
    "top_probabilities",
)
"""Arrays of an `ImageTable`, one row per image."""


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Results of n images, each counted once, in ascending order of sample ids.

    Images that do not decode are in it, and marked.
    """

    sample_ids: NDArray[np.int64]
    """Shape (n,)."""
    labels: NDArray[np.int64]
    """Class of each image, shape (n,)."""
    is_valid: NDArray[np.bool_]
    """True where the image was decoded and counts, shape (n,)."""
    ranks: NDArray[np.int64]
    """Classes that rank above the label, shape (n,): 0 where the first is right."""
    fixed_losses: NDArray[np.int64]
    """Loss times 2^32, shape (n,); 0 where it is not finite."""
    is_finite: NDArray[np.bool_]
    """True where the loss is finite, shape (n,)."""
    top_classes: NDArray[np.int64]
    """Highest classes, the first one first, shape (n, k); k is 5, or all classes."""
    top_probabilities: NDArray[np.float64]
    """Their probabilities, shape (n, k)."""
    bad_samples: dict[int, str]
    """Reason by sample id of the images that do not decode."""

    @property
    def losses(self) -> NDArray[np.float64]:
        """Loss of each image, shape (n,); NaN where it is not finite or not valid."""
        losses = self.fixed_losses / 2.0**LOSS_FRACTION_BITS
        return np.where(self.is_finite & self.is_valid, losses, np.nan)

    def summarize(self, chosen: NDArray[np.bool_] | None = None) -> EvalResult:
        """Return counts and mean loss of the valid images, as training reports them.

        Args:
            chosen: the images that count, shape (n,). Default: all.
        """
        is_counted = self.is_valid if chosen is None else self.is_valid & chosen
        scores = SampleScores(
            torch.from_numpy(self.ranks),
            torch.from_numpy(self.fixed_losses),
            torch.from_numpy(self.is_finite),
        )
        sums = sum_scores(scores, torch.from_numpy(is_counted)).tolist()
        return EvalResult.from_sums(sums, self.bad_samples)

    @staticmethod
    def merge(parts: Sequence["ImageTable"]) -> "ImageTable":
        """Join tables of different images, in the order of their sample ids."""
        bad_samples = {}
        for part in parts:
            bad_samples.update(part.bad_samples)
        order = np.argsort(np.concatenate([part.sample_ids for part in parts]))

        def join(name: str) -> NDArray[np.generic]:
            arrays = [getattr(part, name) for part in parts]
            joined: NDArray[np.generic] = np.concatenate(arrays)[order]
            return joined

        joined_columns = {name: join(name) for name in COLUMNS}
        return ImageTable(
            **joined_columns,  # type: ignore[arg-type]
            bad_samples={sample: bad_samples[sample] for sample in sorted(bad_samples)},
        )
