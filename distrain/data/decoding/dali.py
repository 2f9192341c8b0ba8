"""The DALI graph: decode, cut a window, mirror, shift colours and normalise. Windows and draws come from outside."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distrain.data.decoding.decoder import (
    DecodeError,
    DecodeInput,
    DecodePlan,
    InputSource,
)
from distrain.errors import AttemptError, UserError

HARDWARE_DECODER_LOAD = 0.0
"""Share of a batch for a GPU's JPEG engine. It is taken by position, and the engine's pixels may differ from those of
the CUDA decoder: with any share but 0 a sample's pixels might depend on its place."""
_MACHINE_ERROR = re.compile(
    r"(?i)out of memory|bad_alloc|memory allocation|cuda (runtime|driver)"
)
_SAMPLE_ERROR = re.compile(r"Failed to decode sample #(\d+)")


class DaliDecoder:
    """Runs the graph over what `source` returns, ahead of the caller by `read_ahead` batches.

    One definition serves both devices: `mixed` decodes on a GPU, `cpu` without one. The GPU's number comes from the
    torch device, never from the rank.
    """

    def __init__(
        self,
        source: InputSource,
        plan: DecodePlan,
        *,
        device: torch.device,
        num_threads: int,
        read_ahead: int,
    ) -> None:
        """Build the graph. `source` raises StopIteration at its end.

        Raises:
            UserError: DALI is not installed.
        """
        try:
            from nvidia.dali.pipeline import Pipeline
        except ImportError:
            raise UserError(
                "NVIDIA DALI is not installed here: install it, or set data.backend=torch"
            ) from None
        gpu = device.type == "cuda"
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if gpu else None  # type: ignore[no-untyped-call]
        self._source_error: BaseException | None = None

        def next_inputs() -> list[Any]:
            try:
                return _make_inputs(source(), plan)
            except StopIteration:
                raise
            except (
                BaseException
            ) as error:  # kept, since what DALI raises of its own looks alike
                self._source_error = error
                raise

        self._pipeline: Any = Pipeline(
            batch_size=plan.batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=read_ahead,
            exec_dynamic=True,  # the other executor overwrites memory that torch still holds
        )
        with self._pipeline:
            self._pipeline.set_outputs(_define_pipeline(next_inputs, plan, gpu))
        self._pipeline.build()

    def close(self) -> None:
        """Let the graph go, with its threads: it holds on to its source."""
        self._pipeline = None

    def decode_batch(self) -> torch.Tensor:
        """Return the next batch, of the graph's type and shape: on a CPU in DALI's memory, on a GPU in torch's.

        Raises:
            StopIteration: the source has ended.
            RefusedError: an image does not decode. The decoder is of no use afterwards.
            AttemptError: the machine's memory or GPU failed.
            Exception: what the source raised.
        """
        try:
            (images,) = self._pipeline.run()
        except RuntimeError as error:
            if self._source_error is not None:
                raise self._source_error from None
            lines = [
                line.strip() for line in str(error).splitlines() if line.strip()
            ] or ["no word"]
            named = _SAMPLE_ERROR.search(str(error))
            reason = next(
                (
                    line
                    for line in lines
                    if _SAMPLE_ERROR.search(line) or "nvImageCodec" in line
                ),
                lines[0],
            )
            if _MACHINE_ERROR.search(str(error)):  # says nothing about the files
                raise AttemptError(f"DALI failed: {reason}") from error
            raise DecodeError(
                int(named[1]) if named else None, f"DALI: {reason}"
            ) from error
        if self._copy_stream is None:
            tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
            return tensor
        return self._copy_to_torch(images, self._copy_stream)

    def _copy_to_torch(self, images: Any, stream: torch.cuda.Stream) -> torch.Tensor:
        """Copy a batch from DALI's memory on the GPU into torch's.

        DALI writes later batches over a batch's memory as soon as Python has dropped the batch, in the order of DALI's
        own stream. torch's stream may be several micro-batches behind Python and still have to read it. The copy is
        made on a stream of its own, so that it does not wait for training, and is complete on return. torch's allocator
        keeps the block, aligned to 512 bytes, until the stream it is recorded on has read it.
        """
        with torch.cuda.stream(stream):
            own: torch.Tensor = torch.utils.dlpack.from_dlpack(
                images.as_tensor()
            ).clone()
        stream.synchronize()
        own.record_stream(torch.cuda.current_stream(self._device))
        return own


def _define_pipeline(
    next_inputs: Callable[[], list[Any]], plan: DecodePlan, use_gpu: bool
) -> Any:
    """The graph's one output."""
    from nvidia.dali import fn, types

    window: tuple[
        tuple[Any, int], ...
    ]  # type and dimensions of what says where the window is
    if not plan.resize:
        window = ((types.INT32, 1),)
    elif plan.is_raw or plan.decode_full_image:
        window = ((types.FLOAT, 1), (types.FLOAT, 1))
    else:
        window = (
            (types.FLOAT, 1),
            (types.FLOAT, 1),
            (types.INT32, 1),
            (types.INT32, 1),
        )
    after = ((types.INT32, 0), (types.FLOAT, 1)) if plan.normalize else ()
    kinds = ((types.UINT8, 3 if plan.is_raw else 1), *window, *after)
    images, *place = fn.external_source(
        source=next_inputs,
        num_outputs=len(kinds),
        batch=True,
        no_copy=True,
        dtype=[kind for kind, _ in kinds],
        ndim=[dimensions for _, dimensions in kinds],
        layout=["HWC" if plan.is_raw else ""] + [""] * (len(kinds) - 1),
    )
    device = "mixed" if use_gpu else "cpu"
    options: dict[str, Any] = {
        "adjust_orientation": False,
        "device": device,
        "hw_decoder_load": HARDWARE_DECODER_LOAD,
    }
    cut: dict[str, Any] = {
        "shape": [plan.crop_size, plan.crop_size],
        "axis_names": "HW",
    }
    if plan.is_raw:
        images = images.gpu() if use_gpu else images
    elif plan.decode_full_image:
        images = fn.decoders.image(images, **options)
    elif plan.resize:
        images = fn.decoders.image_slice(
            images, start=place[2], end=place[3], axis_names="HW", **options
        )
    else:
        images = fn.decoders.image_slice(images, start=place[0], **cut, **options)
    if plan.resize:
        images = fn.resize(
            images,
            size=[plan.crop_size, plan.crop_size],
            roi_start=place[0],
            roi_end=place[1],
        )
    elif plan.is_raw or plan.decode_full_image:
        images = fn.slice(images, start=place[0], **cut)
    if plan.normalize:
        mirror, mean = place[-2:]
        images = fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=mean,
            std=plan.std.tolist(),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
    return images


def _make_inputs(decode_input: DecodeInput, plan: DecodePlan) -> list[Any]:
    """What the graph's external source delivers for a batch; the order is that of `_define`."""
    start, end = (
        decode_input.augment_params.window_start,
        decode_input.augment_params.window_start
        + decode_input.augment_params.window_size,
    )
    window: list[Any]
    if not plan.resize:
        window = [start.astype(np.int32, order="C")]
    elif plan.is_raw or plan.decode_full_image:
        window = [
            start.astype(np.float32, order="C"),
            end.astype(np.float32, order="C"),
        ]
    else:
        # The antialiasing filter sees so far beyond the window: cut off there, pixels would be up to 8 of 255 off.
        margin = np.ceil(decode_input.augment_params.window_size / plan.crop_size) + 1
        low = np.floor(np.maximum(start - margin, 0)).astype(np.int32, order="C")
        high = np.ceil(np.minimum(end + margin, decode_input.image_sizes)).astype(
            np.int32, order="C"
        )
        window = [
            (start - low).astype(np.float32, order="C"),
            (end - low).astype(np.float32, order="C"),
            low,
            high,
        ]
    return [
        decode_input.images,
        *window,
        *(
            (decode_input.augment_params.mirror, decode_input.mean)
            if plan.normalize
            else ()
        ),
    ]
