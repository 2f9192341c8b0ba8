"""Micro-batches: which samples a rank asks for, and what the loader delivers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.augment import CENTER_WINDOW, EvalWindow
from distrain.data.decoding.decoder import DecodeInput, DecodePlan, normalize_images
from distrain.data.order import Cursor, SampleOrder


class BatchRequest(NamedTuple):
    """One micro-batch to load."""

    cursor: Cursor
    """Its epoch and step; in evaluation (0, number of the chunk)."""
    virtual_worker: int
    sample_ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    num_padding: int
    """Samples at the end that only fill up the shape, and get weight 0."""
    window: EvalWindow = CENTER_WINDOW
    """Window of an evaluation; training draws its windows."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one virtual worker in one step, ready for the model."""

    cursor: Cursor
    virtual_worker: int
    sample_ids: NDArray[np.int64]
    """Sample ids, shape (b,)."""
    pixels: torch.Tensor
    """The decoder's output, on the device: normalized floats or bytes."""
    labels: torch.Tensor
    """int64 of shape (b,)."""
    sample_weights: torch.Tensor
    """1 for a valid sample, 0 for padding or a bad sample, float32 of shape (b,)."""
    bad_samples: dict[int, str]
    """Reason by sample id of the bad samples in it."""
    to_images: Callable[[torch.Tensor], torch.Tensor]
    """Converts pixels to images."""

    @cached_property
    def images(self) -> torch.Tensor:
        """Normalized images, float32 of shape (b, 3, crop, crop).

        All zeros where the weight is 0.
        """
        return self.to_images(self.pixels)


class PendingBatch(NamedTuple):
    """Micro-batch that the decoder has been fed, or is fed next."""

    request: BatchRequest
    labels: torch.Tensor
    sample_weights: torch.Tensor
    bad_samples: dict[int, str]
    """Reason by sample id."""
    decode_input: DecodeInput
    blank_indices: set[int]
    """Positions in the batch that hold the placeholder."""

    def exclude_sample(
        self, index: int, placeholder: NDArray[np.uint8], crop: int, reason: str | None
    ) -> None:
        """Replace a sample by the placeholder, with weight 0.

        Args:
            index: the sample's position in the batch.
            placeholder: a blank image, in the form in which the decoder gets images.
            crop: side of the placeholder in pixels.
            reason: why the sample is bad; None: it is padding.
        """
        if reason is not None:
            self.bad_samples[int(self.request.sample_ids[index])] = reason
        self.sample_weights[index] = 0
        self.blank_indices.add(index)
        self.decode_input.images[index] = placeholder
        self.decode_input.image_sizes[index] = crop
        self.decode_input.augment_params.window_start[index] = 0
        self.decode_input.augment_params.window_size[index] = crop

    def to_micro_batch(
        self, pixels: torch.Tensor, plan: DecodePlan, device: torch.device
    ) -> MicroBatch:
        """Return the micro-batch on the device.

        Args:
            pixels: the decoder's output for this batch.
            plan: the decoder's.
            device: the device of the model.
        """
        # Locals, so that to_images does not keep the batch's files in memory.
        mirror = self.decode_input.augment_params.mirror
        mean = self.decode_input.mean
        is_blank: torch.Tensor | None = None
        if self.blank_indices:
            is_blank = (self.sample_weights == 0).to(device, non_blocking=True)

        def to_images(pixels: torch.Tensor) -> torch.Tensor:
            if not plan.normalize:
                pixels = normalize_images(pixels, mirror, mean, plan.std)
            elif is_blank is not None:
                # The images are zeroed in place below; the pixels must stay.
                pixels = pixels.clone()
            if is_blank is not None:
                pixels[is_blank] = 0
            return pixels

        return MicroBatch(
            cursor=self.request.cursor,
            virtual_worker=self.request.virtual_worker,
            sample_ids=self.request.sample_ids,
            pixels=pixels.to(device),
            labels=self.labels.to(device, non_blocking=True),
            sample_weights=self.sample_weights.to(device, non_blocking=True),
            bad_samples=self.bad_samples,
            to_images=to_images,
        )


def iter_training_requests(
    order: SampleOrder, steps: range, local_virtual_workers: range
) -> Iterator[BatchRequest]:
    """Yield the micro-batches of a rank, step by step.

    Args:
        order: the run's order of samples.
        steps: steps of the run, counted over all epochs.
        local_virtual_workers: virtual workers of this rank; each has one micro-batch
            per step.
    """
    for step in steps:
        cursor = order.get_cursor(step)
        for virtual_worker in local_virtual_workers:
            sample_ids = order.get_sample_ids(cursor, virtual_worker)
            yield BatchRequest(cursor, virtual_worker, sample_ids, num_padding=0)


def iter_evaluation_requests(
    num_rows: int,
    batch_size: int,
    rank: int,
    world_size: int,
    windows: Sequence[EvalWindow] = (CENTER_WINDOW,),
) -> Iterator[BatchRequest]:
    """Yield every `world_size`-th chunk of `batch_size` consecutive sample ids.

    The chunks do not depend on the number of ranks. The last one is padded to the same
    shape. A chunk is yielded once per window.
    """
    chunks = enumerate(range(0, num_rows, batch_size))
    for chunk, start in islice(chunks, rank, None, world_size):
        sample_ids = np.arange(start, start + batch_size)
        num_padding = max(0, start + batch_size - num_rows)
        # Pad with the chunk's first sample, which is read anyway.
        sample_ids[batch_size - num_padding :] = start
        cursor = Cursor(0, chunk)
        for window in windows:
            yield BatchRequest(cursor, 0, sample_ids, num_padding, window)
