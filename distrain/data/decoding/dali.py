"""DALI pipeline: decode, cut a window, mirror, shift colors and normalize.

Windows and other draws come from outside.
"""

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
"""Fraction of a batch for a GPU's JPEG engine. DALI picks these images by position in
the batch, and the engine's pixels may differ from the CUDA decoder's: with any value
but 0 a sample's pixels could depend on its position."""
_MACHINE_ERROR = re.compile(
    r"(?i)out of memory|bad_alloc|memory allocation|cuda (runtime|driver)"
)
_SAMPLE_ERROR = re.compile(r"Failed to decode sample #(\d+)")


class DaliDecoder:
    """Decoder that runs a DALI pipeline over what `source` returns.

    It runs `read_ahead` batches ahead of the caller. One definition serves both kinds
    of device: DALI's `mixed` decodes on a GPU, `cpu` without one. The GPU's number
    comes from the torch device, never from the rank.
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
        """Build the pipeline. `source` raises StopIteration at its end.

        Raises:
            UserError: DALI is not installed.
        """
        try:
            from nvidia.dali.pipeline import Pipeline
        except ImportError:
            raise UserError(
                "NVIDIA DALI is not installed here: install nvidia-dali-cuda130 (or "
                "-cuda120), or start a new run with data.backend=torch"
            ) from None
        use_gpu = device.type == "cuda"
        self._device = device
        self._copy_stream = torch.cuda.Stream(device) if use_gpu else None  # type: ignore[no-untyped-call]
        self._source_error: BaseException | None = None

        def next_inputs() -> list[Any]:
            try:
                return _make_inputs(source(), plan)
            except StopIteration:
                raise
            except BaseException as error:
                # DALI wraps it in a RuntimeError that looks like one of its own: keep
                # it, so that decode_batch can tell the two apart.
                self._source_error = error
                raise

        self._pipeline: Any = Pipeline(
            batch_size=plan.batch_size,
            num_threads=num_threads,
            device_id=(device.index or 0) if use_gpu else None,
            prefetch_queue_depth=read_ahead,
            # The other executor overwrites memory that torch still holds.
            exec_dynamic=True,
        )
        with self._pipeline:
            self._pipeline.set_outputs(_define_pipeline(next_inputs, plan, use_gpu))
        self._pipeline.build()

    def close(self) -> None:
        """Release the pipeline, its threads, and its reference to the source."""
        self._pipeline = None

    def decode_batch(self) -> torch.Tensor:
        """Return the next batch, of the plan's dtype and shape.

        It is in DALI's memory on a CPU, in torch's on a GPU.

        Raises:
            StopIteration: the source has ended.
            DecodeError: an image does not decode. The decoder is unusable afterwards.
            AttemptError: the machine's memory or GPU failed.
            Exception: the error that the source raised.
        """
        try:
            (images,) = self._pipeline.run()
        except RuntimeError as error:
            if self._source_error is not None:
                raise self._source_error from None
            raise _translate_dali_error(error) from error
        if self._copy_stream is None:
            tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
            return tensor
        return self._copy_to_torch(images, self._copy_stream)

    def _copy_to_torch(self, images: Any, stream: torch.cuda.Stream) -> torch.Tensor:
        """Copy a batch from DALI's memory on the GPU into torch's.

        DALI writes later batches over a batch's memory once Python has dropped the
        batch, in the order of DALI's own stream. torch's stream may be several
        micro-batches behind Python, and still have to read that memory.
        """
        # On a stream of its own, so that the copy does not wait for training.
        with torch.cuda.stream(stream):
            view: torch.Tensor = torch.utils.dlpack.from_dlpack(images.as_tensor())
            copy = view.clone()
        # Complete the copy before the caller drops `images`.
        stream.synchronize()
        # torch's allocator keeps the block (aligned to 512 bytes) until the stream that
        # reads it is done with it.
        copy.record_stream(torch.cuda.current_stream(self._device))
        return copy


def _translate_dali_error(error: RuntimeError) -> Exception:
    """Return an AttemptError if the machine failed, a DecodeError if an image did."""
    message = str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reason = lines[0] if lines else "no error message"
    # The line that names a sample or the codec says more than the first.
    for line in lines:
        if _SAMPLE_ERROR.search(line) or "nvImageCodec" in line:
            reason = line
            break

    if _MACHINE_ERROR.search(message):
        # It says nothing about the files.
        return AttemptError(f"DALI failed: {reason}")
    sample = _SAMPLE_ERROR.search(message)
    return DecodeError(int(sample[1]) if sample else None, f"DALI: {reason}")


def _define_pipeline(
    next_inputs: Callable[[], list[Any]], plan: DecodePlan, use_gpu: bool
) -> Any:
    """Define the operators of the pipeline and return its one output."""
    from nvidia.dali import fn, types

    # Declare the inputs, dtype and number of dimensions, in the order of _make_inputs.
    image_input = (types.UINT8, 3 if plan.is_raw else 1)
    window_inputs: list[tuple[Any, int]]
    if not plan.resize:
        window_inputs = [(types.INT32, 1)]
    elif plan.is_raw or plan.decode_full_image:
        window_inputs = [(types.FLOAT, 1), (types.FLOAT, 1)]
    else:
        window_inputs = [
            (types.FLOAT, 1),
            (types.FLOAT, 1),
            (types.INT32, 1),
            (types.INT32, 1),
        ]
    inputs = [image_input, *window_inputs]
    if plan.normalize:
        # Mirror and mean.
        inputs += [(types.INT32, 0), (types.FLOAT, 1)]
    images, *parameters = fn.external_source(
        source=next_inputs,
        num_outputs=len(inputs),
        batch=True,
        # DALI reads the arrays where they are, and keeps references to them.
        no_copy=True,
        dtype=[dtype for dtype, _ in inputs],
        ndim=[num_dimensions for _, num_dimensions in inputs],
        layout=["HWC" if plan.is_raw else ""] + [""] * (len(inputs) - 1),
    )

    images = _define_crop(images, parameters[: len(window_inputs)], plan, use_gpu)
    if plan.normalize:
        mirror, mean = parameters[-2:]
        images = fn.crop_mirror_normalize(
            images,
            mirror=mirror,
            mean=mean,
            std=plan.std.tolist(),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
    return images


def _define_crop(
    images: Any, window: list[Any], plan: DecodePlan, use_gpu: bool
) -> Any:
    """Define the operators that decode images and cut their windows to the crop."""
    from nvidia.dali import fn

    crop_shape = [plan.crop_size, plan.crop_size]
    slice_options: dict[str, Any] = {"shape": crop_shape, "axis_names": "HW"}
    decoder_options: dict[str, Any] = {
        "adjust_orientation": False,
        "device": "mixed" if use_gpu else "cpu",
        "hw_decoder_load": HARDWARE_DECODER_LOAD,
    }

    # Decode the whole image, or only what the window needs of it.
    if plan.is_raw:
        images = images.gpu() if use_gpu else images
    elif plan.decode_full_image:
        images = fn.decoders.image(images, **decoder_options)
    elif plan.resize:
        _, _, slice_start, slice_end = window
        images = fn.decoders.image_slice(
            images,
            start=slice_start,
            end=slice_end,
            axis_names="HW",
            **decoder_options,
        )
    else:
        images = fn.decoders.image_slice(
            images, start=window[0], **slice_options, **decoder_options
        )

    # Cut the window, unless the decoder did.
    if plan.resize:
        images = fn.resize(
            images, size=crop_shape, roi_start=window[0], roi_end=window[1]
        )
    elif plan.is_raw or plan.decode_full_image:
        images = fn.slice(images, start=window[0], **slice_options)
    return images


def _make_inputs(decode_input: DecodeInput, plan: DecodePlan) -> list[Any]:
    """Return the inputs of the pipeline for a batch, in _define_pipeline's order."""
    params = decode_input.augment_params
    start = params.window_start
    end = start + params.window_size
    window: list[Any]
    if not plan.resize:
        window = [start.astype(np.int32, order="C")]
    elif plan.is_raw or plan.decode_full_image:
        window = [
            start.astype(np.float32, order="C"),
            end.astype(np.float32, order="C"),
        ]
    else:
        # Decode a margin around the window, which the antialiasing filter sees: without
        # it, pixels would be up to 8 of 255 off.
        margin = np.ceil(params.window_size / plan.crop_size) + 1
        slice_start = np.floor(np.maximum(start - margin, 0))
        slice_end = np.ceil(np.minimum(end + margin, decode_input.image_sizes))
        low = slice_start.astype(np.int32, order="C")
        high = slice_end.astype(np.int32, order="C")
        window = [
            (start - low).astype(np.float32, order="C"),
            (end - low).astype(np.float32, order="C"),
            low,
            high,
        ]
    normalization = [params.mirror, decode_input.mean] if plan.normalize else []
    return [decode_input.images, *window, *normalization]
