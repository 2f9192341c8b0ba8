"""Preprocessing of an evaluation as tensor operations, which a graph can hold."""

import torch
from torch import Tensor, nn

from distrain.rundir.model_info import ModelInfo

# Fractional bits of Pillow's resampling weights.
_WEIGHT_BITS = 22


class Preprocessing(nn.Module):
    """Images of any size to the normalized input of a network.

    An image is resized (bilinear, antialiased) as Pillow does it: with weights in fixed
    point, first along the rows and then along the columns, and rounded to whole values
    after each. All sums are of integers below 2^53 in float64, so that every runtime
    computes the same pixels. (Pillow 13 takes the columns of some tall images first:
    there, values may differ by 1 of 255.)
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, info: ModelInfo) -> None:
        """Set the sizes and the normalization of a model's input."""
        super().__init__()
        self.crop = info.crop
        self.short_side = info.resized_side
        mean = torch.tensor(info.mean, dtype=torch.float32)
        std = torch.tensor(info.std, dtype=torch.float32)
        self.register_buffer("mean", mean[:, None, None])
        # A factor, not a divisor, as in `normalize_images`.
        self.register_buffer("factor", (1 / std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Preprocess n images of one size.

        Args:
            images: RGB, uint8 of shape (n, height, width, 3).

        Returns:
            float32 of shape (n, 3, crop, crop).
        """
        pixels = self.resize_and_crop(images)
        return (pixels.float() - self.mean) * self.factor

    def resize_and_crop(self, images: Tensor) -> Tensor:
        """Resize the short side of n images, and cut out the center.

        Args:
            images: RGB, uint8 of shape (n, height, width, 3).

        Returns:
            Whole numbers from 0 to 255: float64 of shape (n, 3, crop, crop).
        """
        planes = images.permute(0, 3, 1, 2).double()
        # Pixel positions, and from them the sizes: in a graph, sizes of tensors are not
        # tensors.
        rows = torch.arange(images.shape[1], dtype=torch.float64, device=images.device)
        columns = torch.arange(
            images.shape[2], dtype=torch.float64, device=images.device
        )
        shorter = torch.minimum(rows[-1], columns[-1]) + 1
        # Stored pixels per resized pixel, before sizes are rounded.
        ratio = shorter / self.short_side

        column_weights = self._make_weights(columns, ratio)
        row_weights = self._make_weights(rows, ratio)
        narrowed = _round_to_pixels(planes @ column_weights.T)
        return _round_to_pixels(row_weights @ narrowed)

    def _make_weights(self, positions: Tensor, ratio: Tensor) -> Tensor:
        """Return the weights of the stored pixels in each pixel of the crop.

        Args:
            positions: 0 to size - 1: float64 of shape (size,).
            ratio: stored pixels per resized pixel: float64 scalar.

        Returns:
            Weights times 2^22, whole numbers: float64 of shape (crop, size).
        """
        size = positions[-1] + 1
        resized = torch.floor(size / ratio + 0.5)
        scale = size / resized
        first = torch.floor((resized - self.crop) / 2) * scale
        # Pillow takes the corners of a window in single precision.
        start = first.float().double()
        end = (first + self.crop * scale).float()
        step = (end - start.float()).double() / self.crop
        cells = torch.arange(self.crop, dtype=torch.float64, device=positions.device)
        centers = start + (cells + 0.5) * step

        # A triangle around each center, wider where the image becomes smaller.
        half_width = step.clamp(min=1.0)
        distances = (positions + 0.5 - centers[:, None]).abs()
        weights = (1 - distances / half_width).clamp(min=0.0)
        weights = weights / weights.sum(1, keepdim=True)
        return torch.floor(weights * 2.0**_WEIGHT_BITS + 0.5)


def _round_to_pixels(sums: Tensor) -> Tensor:
    """Round sums of pixels times 2^22 to whole values from 0 to 255."""
    half = 2.0 ** (_WEIGHT_BITS - 1)
    return torch.floor((sums + half) / 2.0**_WEIGHT_BITS).clamp(0.0, 255.0)
