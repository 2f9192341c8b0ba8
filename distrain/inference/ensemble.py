"""Class probabilities of a chunk of images, averaged over crops and networks.

The average does not depend on the order in which its terms are computed: they are added
as integers. A single crop of a single network is not averaged, so that its logits are
those of validation during training.
"""

import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from distrain.data.batch import MicroBatch
from distrain.data.decoding.augment import (
    CENTER_WINDOW,
    TEN_CROP_WINDOWS,
    EvalWindow,
)

# Fractional bits of a probability: sums of up to 2^13 terms fit an int64.
_PROBABILITY_BITS = 50


class Crops(NamedTuple):
    """Crops of each image whose probabilities are averaged."""

    name: str
    windows: tuple[EvalWindow, ...]
    with_mirrored: bool
    """Mirror each window left to right, too."""


CROPS: Mapping[str, Crops] = {
    crops.name: crops
    for crops in (
        Crops("center", (CENTER_WINDOW,), with_mirrored=False),
        Crops("ten", TEN_CROP_WINDOWS, with_mirrored=True),
    )
}
"""By name. ten: four corners and the center, and their mirror images (Krizhevsky et al.
2012, section 4.1)."""


class ChunkPrediction(NamedTuple):
    """Prediction of a chunk of n images."""

    batch: MicroBatch
    """Any of the chunk's batches: they have the same samples."""
    logits: Tensor
    """Float of shape (n, classes): of the network; of an average, the logarithm of the
    probabilities."""
    probabilities: Tensor
    """float64 of shape (n, classes)."""


class Ensemble:
    """Networks whose probabilities are averaged, over all crops of an image.

    Called from several lanes at once, with the parts of a chunk in any order.
    """

    def __init__(
        self, networks: list[Callable[[Tensor], Tensor]], crops: Crops
    ) -> None:
        """Prepare the averages.

        Args:
            networks: each returns the logits (n, classes) of normalized images.
            crops: crops to average over.
        """
        self._networks = networks
        self._crops = crops
        self._num_parts = len(networks) * len(crops.windows)
        self._lock = threading.Lock()
        # By chunk: sums of the probabilities, and number of parts that are missing.
        self._sums: dict[int, Tensor] = {}
        self._num_missing: dict[int, int] = {}

    def add_part(self, network: int, batch: MicroBatch) -> ChunkPrediction | None:
        """Compute one window of a chunk by one network.

        Args:
            network: number of the network.
            batch: the window of each image.

        Returns:
            The prediction of the chunk, by the call that completes it.
        """
        compute_logits = self._networks[network]
        logits = compute_logits(batch.images)
        if self._num_parts == 1 and not self._crops.with_mirrored:
            return ChunkPrediction(batch, logits, logits.double().softmax(1))

        # Add the probabilities in fixed point.
        part = _to_fixed_point(logits)
        if self._crops.with_mirrored:
            part += _to_fixed_point(compute_logits(batch.images.flip(3)))
        chunk = batch.cursor.step
        with self._lock:
            if chunk in self._sums:
                part += self._sums[chunk]
            self._sums[chunk] = part
            num_missing = self._num_missing.get(chunk, self._num_parts) - 1
            self._num_missing[chunk] = num_missing
            if num_missing:
                return None
            total = self._sums.pop(chunk)
            del self._num_missing[chunk]

        # The average is at least the smallest fixed-point number, whose logarithm is
        # finite.
        num_terms = self._num_parts * (2 if self._crops.with_mirrored else 1)
        scale = 2.0**_PROBABILITY_BITS * num_terms
        probabilities = total.clamp(min=1).double() / scale
        return ChunkPrediction(batch, probabilities.log(), probabilities)


def _to_fixed_point(logits: Tensor) -> Tensor:
    """Return the probabilities times 2^50: int64 of shape (n, classes)."""
    probabilities = logits.double().softmax(1)
    # A network that has diverged predicts nothing: NaN would become any integer.
    finite = torch.nan_to_num(probabilities, nan=0.0)
    return (finite * 2.0**_PROBABILITY_BITS).long()
