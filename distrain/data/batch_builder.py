"""Builder of the decoder's input: reads and checks images, draws augmentation."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.batch import BatchRequest, PendingBatch
from distrain.data.config import Augment, DataConfig
from distrain.data.decoding.augment import (
    AugmentParams,
    draw_augment_params,
    make_eval_params,
)
from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.decoder import DecodeInput, DecodePlan
from distrain.data.decoding.image import (
    encode_ppm,
    sanitize_file,
    view_ppm_pixels,
)
from distrain.data.shards.dataset import Dataset, Row
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.errors import AttemptError


class Normalization(NamedTuple):
    """What is subtracted from each channel of the pixels, and what divides it.

    Both have shape (3,), RGB in units of 0 to 255.
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


class BatchBuilder:
    """Builds the decoder's input, one micro-batch at a time."""

    def __init__(
        self,
        dataset: Dataset,
        statistics: ColorStatistics | Normalization,
        *,
        data: DataConfig,
        augment: Augment,
        seed: int,
        batch_size: int,
        use_augmentation: bool,
    ) -> None:
        """Prepare what all batches share.

        Args:
            dataset: where the samples are; bad samples are looked up and added there.
            statistics: for normalization and colors; always the training set's. Without
                augmentation, the normalization is enough.
            data: how samples are read and decoded.
            augment: how samples are augmented.
            seed: seed of the draws, 32 bits.
            batch_size: samples per micro-batch.
            use_augmentation: draw windows, mirrors and colors; otherwise take the
                center.
        """
        self._dataset = dataset
        self._data_config = data
        self._augment_config = augment
        self._seed = seed
        self._use_augmentation = use_augmentation
        if isinstance(statistics, ColorStatistics):
            normalization = get_normalization(statistics, augment)
            self._color_axes = statistics.compute_principal_axes(augment.colour_unit)
        else:
            assert not use_augmentation, "a color shift takes the colors' axes"
            normalization = statistics
        self.plan = _make_decode_plan(
            dataset.manifest,
            normalization,
            data,
            augment,
            batch_size=batch_size,
            use_augmentation=use_augmentation,
        )
        """Plan of what the decoder does with the images."""
        self._channel_mean = normalization.mean
        blank = np.zeros((augment.crop, augment.crop, 3), np.uint8)
        self.placeholder = blank if self.plan.is_raw else encode_ppm(blank)
        """Blank image that takes the place of bad samples and of padding."""

    def build_batch(self, request: BatchRequest) -> PendingBatch:
        """Read and check the files of a micro-batch, and draw their augmentation."""
        crop = self.plan.crop_size
        rows = self._dataset.read_rows(request.sample_ids)
        files = [self.placeholder] * len(rows)
        sizes = [(crop, crop)] * len(rows)

        # Check all files but those of the padding.
        num_samples = len(rows) - request.num_padding
        bad_reasons: dict[int, str] = {}
        for i in range(num_samples):
            sample_id = int(request.sample_ids[i])
            try:
                files[i], sizes[i] = self._prepare_image(sample_id, rows[i])
            except BadImageError as error:
                bad_reasons[i] = str(error)

        # Draw for every sample, those with placeholders too.
        image_sizes = np.array(sizes)
        augment_params = self._make_augment_params(request, image_sizes)
        mean = self._channel_mean - augment_params.color_shift
        decode_input = DecodeInput(files, image_sizes, augment_params, mean)
        pending = PendingBatch(
            request,
            labels=torch.tensor([row.label for row in rows]),
            sample_weights=torch.ones(len(rows)),
            bad_samples={},
            decode_input=decode_input,
            blank_indices=set(),
        )

        # Drawn windows may exceed a placeholder: `exclude_sample` resets them.
        for i in [*bad_reasons, *range(num_samples, len(rows))]:
            pending.exclude_sample(i, self.placeholder, crop, bad_reasons.get(i))
        return pending

    def _make_augment_params(
        self, request: BatchRequest, image_sizes: NDArray[np.int64]
    ) -> AugmentParams:
        if not self._use_augmentation:
            return make_eval_params(image_sizes, self._augment_config, request.window)
        return draw_augment_params(
            self._seed,
            request.cursor,
            request.virtual_worker,
            request.sample_ids,
            image_sizes,
            self._augment_config,
            self._color_axes,
        )

    def _prepare_image(
        self, sample_id: int, row: Row
    ) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Return a sample's file, or its raw pixels, and its height and width.

        Raises:
            BadImageError: the sample is bad; it is added to the dataset's bad samples.
            AttemptError: this machine has too little memory.
        """
        known_bad = self._dataset.bad_samples
        if sample_id in known_bad:
            raise BadImageError(known_bad[sample_id])
        try:
            if self.plan.is_raw:
                return view_ppm_pixels(row.data, *row.image_size), row.image_size
            return self._sanitize_file(row)
        except BadImageError as error:
            known_bad[sample_id] = str(error)
            raise
        except MemoryError:
            raise AttemptError(
                f"there is not enough memory to decode sample {sample_id}: free some, "
                "or lower data.memory or data.pixel_limit"
            ) from None

    def _sanitize_file(self, row: Row) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        file = sanitize_file(
            row.data, self._data_config.pixel_limit, self._dataset.manifest.reading
        )
        image_size = (file.height, file.width)
        # The plan of a data set of one size may rely on that size.
        expected_size = self._dataset.manifest.image_size
        if expected_size is not None and expected_size != image_size:
            height, width = expected_size
            raise BadImageError(
                f"{file.width} x {file.height} pixels in a data set of {width} x "
                f"{height}"
            )
        return file.data, image_size


def get_normalization(statistics: ColorStatistics, augment: Augment) -> Normalization:
    """Return the normalization of images of a training set with these statistics."""
    std = statistics.std if augment.scale is None else np.full(3, augment.scale)
    mean = statistics.mean
    return Normalization(mean.astype(np.float32), std.astype(np.float32))


def _make_decode_plan(
    manifest: Manifest,
    normalization: Normalization,
    data: DataConfig,
    augment: Augment,
    *,
    batch_size: int,
    use_augmentation: bool,
) -> DecodePlan:
    """Return the decoder's plan for images that are stored as the manifest says."""
    # Images need no resizing if they are stored at the size that crops are cut from.
    is_stored_at_size = manifest.image_size is not None and (
        augment.short_side is None or augment.short_side == min(manifest.image_size)
    )
    draws_resized = use_augmentation and augment.window == "random_resized"

    return DecodePlan(
        batch_size=batch_size,
        crop_size=augment.crop,
        is_raw=manifest.encoding == "raw",
        resize=not is_stored_at_size or draws_resized,
        decode_full_image=not manifest.verified,
        normalize=data.normalise == "loader",
        std=normalization.std,
    )
