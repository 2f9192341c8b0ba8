"""The DALI graph: decode a window, mirror, shift colours and normalise. Windows and draws come from outside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Feed(NamedTuple):
    """What DALI gets for one batch of n samples."""

    files: list[NDArray[np.uint8]]
    """n image files that decode; they may be views, DALI holds on to them."""
    start: NDArray[np.int32]
    """Top and left of the window in pixels, shape (n, 2)."""
    mirror: NDArray[np.int32]
    """1: flip left to right, shape (n,)."""
    mean: NDArray[np.float32]
    """Subtracted from every pixel, RGB in units of 0 to 255, shape (n, 3): the colour shift is folded in."""


class Decoder:
    """Runs the graph over what `source` returns, ahead of the caller by `read_ahead` batches.

    One definition serves both devices: `mixed` decodes on a GPU, `cpu` without one. The GPU's number comes from the
    torch device, never from the rank.
    """

    def __init__(
        self,
        source: Callable[[], Feed],
        *,
        batch: int,
        crop: int,
        std: NDArray[np.float32],
        device: torch.device,
        threads: int,
        read_ahead: int,
    ) -> None:
        """Build the graph. `source` raises StopIteration at its end."""
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        gpu = device.type == "cuda"
        self._pipeline: Any = Pipeline(
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=read_ahead,
            exec_dynamic=True,  # the other executor overwrites memory that torch still holds
        )
        with self._pipeline:
            files, start, mirror, mean = fn.external_source(
                source=source,
                num_outputs=4,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT],
                ndim=[1, 1, 0, 1],
            )
            # hw_decoder_load = 0: the hardware decoder takes a share of each batch by position, and its pixels may
            # differ, so that a sample's pixels would depend on its place.
            images = fn.decoders.image_slice(
                files,
                start=start,
                shape=[crop, crop],
                axis_names="HW",
                adjust_orientation=False,
                device="mixed" if gpu else "cpu",
                hw_decoder_load=0.0,
            )
            images = fn.crop_mirror_normalize(
                images, mirror=mirror, mean=mean, std=std.tolist(), dtype=types.FLOAT, output_layout="CHW"
            )
            self._pipeline.set_outputs(images)
        self._pipeline.build()

    def close(self) -> None:
        """Let the graph go, with its threads: it holds on to its source."""
        self._pipeline = None

    def run(self) -> torch.Tensor:
        """The next batch, float32 of shape (n, 3, crop, crop), sharing DALI's memory. Raises StopIteration."""
        (images,) = self._pipeline.run()
        tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
        return tensor
