"""Proof of an exported file: it is run on all images, and compared with distrain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distrain.data.decoding.bad_image import BadImageError
from distrain.data.decoding.image import (
    ImageFile,
    decode_rgb,
    encode_ppm,
    sanitize_file,
)
from distrain.data.prepare.source import Reject, Sample
from distrain.data.prepare.unlabeled import iter_unlabeled
from distrain.exporting.formats import ExportFormat, Runtime
from distrain.exporting.preprocessing import Preprocessing
from distrain.inference.predictor import Predictor

MIN_RESIZED_AGREEMENT = 0.99
"""Share of the resized images on which an exported file must agree with distrain."""
# Decoded images that are in memory at once, in each lane.
_MAX_DECODED_BYTES = 128 << 20


class ImageComparison(NamedTuple):
    """Comparison of distrain and an exported file on one image."""

    name: str
    is_resized: bool
    agrees: bool
    """The highest class is the same."""
    is_tie: bool
    """It is another one, of the same probability within the format's tolerance."""
    probability_difference: float
    """Largest difference of a class's probability; 1 if one is not finite."""
    num_different_pixels: int
    """Values of the network's input, before normalization, that differ."""
    pixel_difference: int
    """Largest difference of a value, from 0 to 255."""
    num_pixels: int
    """Values of the network's input."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of distrain and an exported file on images of one kind."""

    images: int
    agreeing: int
    """Images with the same highest class."""
    ties: int
    """Images with another one, of the same probability within the tolerance."""
    max_probability_difference: float
    max_pixel_difference: int
    """Largest difference of a pixel's value, from 0 to 255."""
    different_pixels: float
    """Share of the values of the network's input that differ."""
    disagreeing: tuple[str, ...]
    """Names of the images with another highest class, without ties."""

    @property
    def share(self) -> float:
        """Share of the images that agree, ties included; 1 of none."""
        return (self.agreeing + self.ties) / self.images if self.images else 1.0

    @staticmethod
    def summarize(comparisons: Sequence[ImageComparison]) -> "Agreement":
        """Sum up the comparisons of images."""
        num_pixels = sum(one.num_pixels for one in comparisons)
        num_different = sum(one.num_different_pixels for one in comparisons)
        return Agreement(
            images=len(comparisons),
            agreeing=sum(one.agrees for one in comparisons),
            ties=sum(one.is_tie for one in comparisons),
            max_probability_difference=max(
                (one.probability_difference for one in comparisons), default=0.0
            ),
            max_pixel_difference=max(
                (one.pixel_difference for one in comparisons), default=0
            ),
            different_pixels=num_different / num_pixels if num_pixels else 0.0,
            disagreeing=tuple(
                one.name for one in comparisons if not one.agrees and not one.is_tie
            ),
        )


@dataclass(frozen=True)
class Proof:
    """Agreement of distrain and an exported file, which get the same decoded images."""

    stored: Agreement
    """On images whose size needs no resizing: the input of the network is the same."""
    resized: Agreement
    """On images that both resize, each in its own way."""
    left_out: dict[str, str]
    """Reason by name of the images that do not decode."""

    @property
    def passed(self) -> bool:
        """True if there are images, and the file agrees on enough of them.

        On all that are used as stored, and on 99 % of those that are resized.
        """
        has_images = self.stored.images + self.resized.images > 0
        is_enough = self.resized.share >= MIN_RESIZED_AGREEMENT
        return has_images and not self.stored.disagreeing and is_enough

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as plain values for JSON."""
        return {"passed": self.passed, **asdict(self)}

    def describe(self) -> list[str]:
        """Return one sentence per kind of images, for people."""
        lines = []
        for kind, agreement in (
            ("images that are used as stored", self.stored),
            ("images that are resized", self.resized),
        ):
            if agreement.images:
                lines.append(_describe_agreement(kind, agreement))
        return lines or ["none of the images could be decoded"]


def prove_export(
    predictor: Predictor,
    export_format: ExportFormat,
    runtime: Runtime,
    data_url: str,
    on_images: Callable[[int], None],
) -> Proof:
    """Run an exported file on the images of a data set, and compare.

    Both get the same decoded pixels: distrain as a lossless file, which it resizes,
    cuts and normalizes as in an evaluation.

    Args:
        predictor: distrain, with the model that was exported.
        export_format: the format, for its tolerance.
        runtime: the exported file.
        data_url: packed or indexed data set.
        on_images: gets the number of images done; called from several threads.

    Raises:
        OSError: the data cannot be read.
    """
    comparer = _Comparer(predictor, export_format.tie_tolerance, runtime)
    left_out: dict[str, str] = {}
    comparisons: dict[int, list[ImageComparison]] = {}

    def compare_chunk(numbered: tuple[int, Sequence[Sample | Reject]]) -> None:
        start, chunk = numbered
        comparisons[start] = comparer.compare(chunk, left_out)
        on_images(len(chunk))

    chunks = _split(iter_unlabeled(data_url), predictor.model.config.evaluate.batch)
    with predictor.open_lanes() as lanes:
        lanes.for_each(compare_chunk, chunks)
    ordered = [one for start in sorted(comparisons) for one in comparisons[start]]
    return Proof(
        stored=Agreement.summarize([one for one in ordered if not one.is_resized]),
        resized=Agreement.summarize([one for one in ordered if one.is_resized]),
        left_out=dict(sorted(left_out.items())),
    )


class _Comparer:
    """Compares distrain and an exported file, image by image."""

    def __init__(
        self, predictor: Predictor, tie_tolerance: float, runtime: Runtime
    ) -> None:
        self._predictor = predictor
        self._tie_tolerance = tie_tolerance
        self._runtime = runtime
        info = predictor.model.info
        self._resized_side = info.resized_side
        self._preprocessing = Preprocessing(info)
        self._mean = torch.tensor(info.mean, dtype=torch.float64)[:, None, None]
        self._std = torch.tensor(info.std, dtype=torch.float64)[:, None, None]

    def compare(
        self, chunk: Sequence[Sample | Reject], left_out: dict[str, str]
    ) -> list[ImageComparison]:
        """Compare at most `evaluate.batch` images; those that are bad are left out."""
        compared = []
        decoded: dict[str, NDArray[np.uint8]] = {}
        num_bytes = 0
        for sample in chunk:
            pixels = self._decode(sample, left_out)
            if pixels is None:
                continue
            decoded[sample.name] = pixels
            num_bytes += pixels.nbytes
            if num_bytes > _MAX_DECODED_BYTES:
                compared += self._compare_decoded(decoded)
                decoded.clear()
                num_bytes = 0
        return compared + self._compare_decoded(decoded)

    def _decode(
        self, sample: Sample | Reject, left_out: dict[str, str]
    ) -> NDArray[np.uint8] | None:
        """Return the pixels of an image, upright: RGB of shape (height, width, 3)."""
        if isinstance(sample, Reject):
            left_out[sample.name] = sample.reason
            return None
        limit = self._predictor.model.config.data.pixel_limit
        try:
            file = sanitize_file(np.frombuffer(sample.data, np.uint8), limit)
            return decode_rgb(bytes(file.data), limit)
        except BadImageError as error:
            left_out[sample.name] = str(error)
            return None

    def _compare_decoded(
        self, decoded: dict[str, NDArray[np.uint8]]
    ) -> list[ImageComparison]:
        """Compare images whose pixels are given, by name."""
        if not decoded:
            return []
        # What distrain makes of them.
        files = [
            ImageFile(encode_ppm(pixels), *pixels.shape[:2])
            for pixels in decoded.values()
        ]
        inputs = self._predictor.decode_files(files)
        logits = self._predictor.compute_logits(inputs)
        expected = logits.double().softmax(1).numpy()
        input_pixels = (inputs.double() * self._std + self._mean).round()

        # What the exported file makes of them: images of one size at a time.
        shapes = [pixels.shape for pixels in decoded.values()]
        images = list(decoded.values())
        comparisons: dict[int, ImageComparison] = {}
        for shape in dict.fromkeys(shapes):
            indices = [i for i, other in enumerate(shapes) if other == shape]
            stack = np.stack([images[i] for i in indices])
            probabilities = self._runtime.compute_probabilities(stack)
            cropped = self._preprocessing.resize_and_crop(torch.from_numpy(stack))
            for k, i in enumerate(indices):
                comparisons[i] = self._compare_image(
                    list(decoded)[i],
                    expected[i],
                    probabilities[k],
                    input_pixels[i] - cropped[k],
                    is_resized=min(shape[:2]) != self._resized_side,
                )
        return [comparisons[i] for i in range(len(images))]

    def _compare_image(
        self,
        name: str,
        expected: NDArray[np.float64],
        probabilities: NDArray[np.float64],
        pixel_differences: Tensor,
        *,
        is_resized: bool,
    ) -> ImageComparison:
        """Compare the probabilities (classes,) of one image."""
        label = int(expected.argmax())
        exported_label = int(probabilities.argmax())
        differences = np.abs(expected - probabilities)
        # A network that has diverged agrees with nothing.
        is_finite = bool(np.isfinite(differences).all())
        agrees = is_finite and label == exported_label
        margin = float(expected[label] - expected[exported_label])
        absolute = pixel_differences.abs()
        return ImageComparison(
            name=name,
            is_resized=is_resized,
            agrees=agrees,
            is_tie=is_finite and not agrees and margin < self._tie_tolerance,
            probability_difference=float(differences.max()) if is_finite else 1.0,
            num_different_pixels=int((absolute > 0).sum()),
            pixel_difference=int(absolute.max()),
            num_pixels=absolute.numel(),
        )


def _split(
    samples: Iterator[Sample | Reject], size: int
) -> Iterator[tuple[int, list[Sample | Reject]]]:
    """Yield chunks of samples, with the number of the first."""
    chunk: list[Sample | Reject] = []
    num_done = 0
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield num_done, chunk
            num_done += size
            chunk = []
    if chunk:
        yield num_done, chunk


def _describe_agreement(kind: str, agreement: Agreement) -> str:
    ties = ""
    if agreement.ties:
        ties = f" ({agreement.ties:,} more are ties)"
    pixels = "all pixels are the same"
    if agreement.max_pixel_difference:
        pixels = (
            f"{agreement.different_pixels:.1%} of the pixels differ, by at most "
            f"{agreement.max_pixel_difference} of 255"
        )
    return (
        f"the same class as distrain on {agreement.agreeing:,} of "
        f"{agreement.images:,} {kind}{ties}; probabilities differ by at most "
        f"{agreement.max_probability_difference:.1e}; {pixels}"
    )
