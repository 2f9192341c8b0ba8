"""Predict the classes of images: files, folders, archives, or pixels in memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data.batch import BatchRequest, PendingBatch
from distrain.data.config import Augment
from distrain.data.decoding.augment import make_eval_params
from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.decoder import DecodeError, DecodeInput, DecodePlan
from distrain.data.decoding.image import (
    ImageFile,
    decode_rgb,
    encode_ppm,
    sanitize_file,
)
from distrain.data.decoding.pil import PilDecoder
from distrain.data.order import Cursor
from distrain.data.prepare.source import Reject, Sample
from distrain.data.prepare.unlabeled import iter_unlabeled
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.numerics import set_torch_numerics
from distrain.distributed.world import make_local_world
from distrain.errors import RunError, UserError
from distrain.inference.scoring import find_top_classes
from distrain.inference.trained_model import TrainedModel, open_trained_model
from distrain.training.forward_pass import predict_logits

if TYPE_CHECKING:
    from PIL import Image

ImageLike: TypeAlias = "bytes | NDArray[np.uint8] | Image.Image"
"""Bytes of an image file, RGB pixels of shape (height, width, 3), or a PIL image."""


class ClassProbability(NamedTuple):
    """Class, and how probable the network takes it to be."""

    name: str
    label: int
    """Number of the class."""
    probability: float


class Prediction(NamedTuple):
    """Prediction of one image."""

    name: str
    """Path or URL, or a position in an archive or a data set."""
    classes: tuple[ClassProbability, ...]
    """The five highest classes, the highest first; none if there is a problem."""
    problem: str | None = None
    """Why the image could not be decoded."""


class Predictor:
    """Trained model that predicts the classes of images.

    Images are decoded, resized, cut and normalized as in an evaluation, and computed in
    chunks of the same size, padded if there are fewer: on a CPU, the prediction of an
    image has the bits that an evaluation gives it.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        checkpoint: str | int = "newest",
        overrides: Sequence[str] = (),
    ) -> None:
        """Open a trained model.

        Args:
            model: run directory, a folder in its `checkpoints`, or an exported folder
                (path or URL).
            checkpoint: which checkpoint of a run directory: "newest", "best" (by its
                top-1 in validation), or the number of a step.
            overrides: `key.sub=value` changes to fields of the run's config that do not
                decide the weights, such as lanes, device or data.backend.

        Raises:
            UserError: there is no such checkpoint, or an override is wrong.
        """
        self.model: TrainedModel = open_trained_model(
            str(model), checkpoint=checkpoint, overrides=overrides
        )
        """The model, its classes and where it comes from."""
        config = self.model.config
        self._world = make_local_world(config.device)
        self._module = self.model.module.to(self._world.device)
        self._num_lanes = config.lanes or (
            1 if self._world.device.type == "cuda" else self._world.num_cores
        )
        self._plan = _make_plan(self.model)
        self._augment = make_eval_augment(self.model)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, by label."""
        return self.model.info.classes

    def predict(self, *images: str | Path) -> Iterator[Prediction]:
        """Predict the images of files, folders, archives and data sets, in their order.

        Args:
            images: paths or URLs: image files, folders with images at any depth, .tar
                or .parquet files or folders of those, packed or indexed data sets.

        Returns:
            The prediction of each image, computed as it is asked for; a file that
            cannot be read as an image has a `problem` instead.

        Raises:
            UserError: there is nothing at a path.
            OSError: it cannot be read.
            RunError: there is not enough memory for an image.
        """
        # Check that there is something at each, before the first prediction.
        opened = [iter_unlabeled(str(source)) for source in images]
        return self._predict_stream(chain.from_iterable(opened))

    def _predict_stream(
        self, images: Iterator[Sample | Reject]
    ) -> Iterator[Prediction]:
        """Predict images as they are asked for, in groups that fill all lanes."""
        group_size = self.model.config.evaluate.batch * self._num_lanes
        while group := list(islice(images, group_size)):
            yield from self._predict_group(group)

    def predict_images(self, images: Iterable[ImageLike]) -> list[Prediction]:
        """Predict images in memory; they are named by their number, from 0."""
        samples = [
            Sample(str(i), -1, _to_file(image)) for i, image in enumerate(images)
        ]
        size = self.model.config.evaluate.batch * self._num_lanes
        groups = [samples[i : i + size] for i in range(0, len(samples), size)]
        return [
            prediction for group in groups for prediction in self._predict_group(group)
        ]

    def _predict_group(self, group: Sequence[Sample | Reject]) -> list[Prediction]:
        """Predict as many images as all lanes take at a time."""
        config = self.model.config
        size = config.evaluate.batch
        chunks = [(i, group[i : i + size]) for i in range(0, len(group), size)]
        predictions: dict[int, list[Prediction]] = {}

        def predict_chunk(numbered: tuple[int, Sequence[Sample | Reject]]) -> None:
            start, chunk = numbered
            predictions[start] = self._predict_chunk(chunk)

        with self.open_lanes() as lanes:
            lanes.for_each(predict_chunk, chunks)
        return [p for start, _ in chunks for p in predictions[start]]

    @contextmanager
    def open_lanes(self) -> Iterator[LanePool]:
        """Start threads that compute as those of an evaluation do."""
        config = self.model.config
        exact = config.reduction.mode == "exact"
        device = self._world.device
        with (
            set_torch_numerics(device, precision=config.precision, exact=exact),
            LanePool(self._num_lanes, config.threads, device) as lanes,
        ):
            yield lanes

    def _predict_chunk(self, chunk: Sequence[Sample | Reject]) -> list[Prediction]:
        """Predict at most `evaluate.batch` images."""
        # Decode each by PIL first, which says what is wrong with it.
        problems: dict[int, str] = {}
        files: dict[int, ImageFile] = {}
        for i, sample in enumerate(chunk):
            if isinstance(sample, Reject):
                problems[i] = sample.reason
                continue
            try:
                files[i] = _check_file(sample.data, self.model.config.data.pixel_limit)
            except BadImageError as error:
                problems[i] = str(error)
            except MemoryError:
                raise RunError(
                    f"there is not enough memory to decode {sample.name}: free some, "
                    "or lower lanes or data.pixel_limit"
                ) from None

        # Compute the others.
        tops: dict[int, tuple[ClassProbability, ...]] = {}
        while files:
            try:
                images = self.decode_files(list(files.values()))
            except DecodeError as error:
                # PIL decodes it, and the decoder of the evaluation does not.
                bad = list(files)[error.index or 0]
                problems[bad] = str(error)
                del files[bad]
                continue
            tops = dict(zip(files, self._compute_tops(images), strict=True))
            break
        return [
            Prediction(sample.name, tops.get(i, ()), problems.get(i))
            for i, sample in enumerate(chunk)
        ]

    def decode_files(self, files: Sequence[ImageFile]) -> Tensor:
        """Decode, resize, cut and normalize images as in an evaluation.

        Args:
            files: n files that are safe to decode, at most `evaluate.batch`.

        Returns:
            float32 of shape (n, 3, crop, crop).

        Raises:
            DecodeError: one does not decode.
        """
        config = self.model.config
        n = len(files)
        sizes = np.array([(file.height, file.width) for file in files])
        params = make_eval_params(sizes, self._augment)
        mean = np.tile(self.model.normalization.mean, (n, 1))
        images = [file.data for file in files]
        decode_input = DecodeInput(images, sizes, params, mean)
        pending = PendingBatch(
            BatchRequest(Cursor(0, 0), 0, np.arange(n), num_padding=0),
            labels=torch.zeros(n, dtype=torch.int64),
            sample_weights=torch.ones(n),
            bad_samples={},
            decode_input=decode_input,
            blank_indices=set(),
        )
        decoder_class = DaliDecoder if config.data.backend == "dali" else PilDecoder
        inputs = iter([decode_input])
        decoder = decoder_class(
            lambda: next(inputs),
            self._plan,
            device=self._world.device,
            num_threads=1,
            read_ahead=1,
        )
        try:
            pixels = decoder.decode_batch()
            return pending.to_micro_batch(pixels, self._plan, self._world.device).images
        finally:
            decoder.close()

    def compute_logits(self, images: Tensor) -> Tensor:
        """Return the logits of normalized images, within `open_lanes`.

        Args:
            images: float32 of shape (n, 3, crop, crop), at most `evaluate.batch`.

        Returns:
            float32 of shape (n, classes).
        """
        # Pad to the size of an evaluation's chunk: another size may give other bits.
        n = len(images)
        padded = images.new_zeros((self.model.config.evaluate.batch, *images.shape[1:]))
        padded[:n] = images
        return predict_logits(self.model.config, self._module, padded)[:n]

    def _compute_tops(self, images: Tensor) -> list[tuple[ClassProbability, ...]]:
        """Return the highest classes of each image."""
        logits = self.compute_logits(images)
        top = find_top_classes(logits, logits.double().softmax(1))
        labels_of_each = top.classes.tolist()
        values_of_each = top.probabilities.tolist()
        return [
            tuple(
                ClassProbability(self.classes[label], label, probability)
                for label, probability in zip(labels, values, strict=True)
            )
            for labels, values in zip(labels_of_each, values_of_each, strict=True)
        ]


def make_eval_augment(model: TrainedModel) -> Augment:
    """Return the sizes with which images of any size become a model's input.

    An image that has the size of the training set's stored images is used as it is.
    """
    sizes = {"short_side": model.info.resized_side}
    return model.config.augment.model_copy(update=sizes)


def _make_plan(model: TrainedModel) -> DecodePlan:
    """Return the decoder's plan for files of any size that were checked before."""
    config = model.config
    return DecodePlan(
        batch_size=config.evaluate.batch,
        crop_size=model.info.crop,
        is_raw=False,
        # An image of the stored size is not changed by it.
        resize=True,
        decode_full_image=False,
        normalize=config.data.normalise == "loader",
        std=model.normalization.std,
    )


def _check_file(data: bytes, pixel_limit: int) -> ImageFile:
    """Return a file that is safe to decode. Raises BadImageError: it does not."""
    file = sanitize_file(np.frombuffer(data, np.uint8), pixel_limit)
    decode_rgb(bytes(file.data), pixel_limit)
    return file


def _to_file(image: ImageLike) -> bytes:
    """Return an image in memory as the bytes of a file.

    Raises:
        UserError: it is neither bytes, RGB pixels nor a PIL image.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"an image of dtype {pixels.dtype} and shape {pixels.shape} is not one: "
            "give the bytes of a file, a PIL image, or uint8 RGB pixels of shape "
            "(height, width, 3)"
        )
    return bytes(encode_ppm(np.ascontiguousarray(pixels)))
