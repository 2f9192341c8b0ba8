"""RGB mean and covariance of a set of images, exactly: sums of bytes and of their products are integers."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_CHANNEL_PAIRS = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]


class PixelMoments:
    """Sums over pixels as Python integers, which never round: the order of images does not matter."""

    def __init__(
        self,
        pixels: int = 0,
        sums: list[int] | None = None,
        products: list[int] | None = None,
    ) -> None:
        self.pixels = pixels
        self.sums = sums or [0] * 3
        """Of red, green and blue."""
        self.products = products or [0] * 6
        """Of RR, GG, BB, RG, RB and GB."""

    def add_image(self, image: NDArray[np.uint8]) -> None:
        """Add an RGB image of shape (height, width, 3)."""
        flat = image.reshape(-1, 3)
        # Exact in float64: at most 2^37 pixels of 255^2 each stay below 2^53. A channel at a time is six times faster
        # than one product of matrices.
        channels = [flat[:, i].astype(np.float64) for i in range(3)]
        self.pixels += len(flat)
        self.sums = [
            total + int(channel.sum())
            for total, channel in zip(self.sums, channels, strict=True)
        ]
        found = (channels[i] @ channels[j] for i, j in _CHANNEL_PAIRS)
        self.products = [
            total + int(product)
            for total, product in zip(self.products, found, strict=True)
        ]

    def merge_moments(self, other: "PixelMoments") -> None:
        """Add what another one has seen."""
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.products = [
            a + b for a, b in zip(self.products, other.products, strict=True)
        ]

    def to_statistics(self) -> "ColorStatistics":
        """Of all pixels added, in units of 0 to 255."""
        n, covariance = self.pixels, np.empty((3, 3))
        for (i, j), product in zip(_CHANNEL_PAIRS, self.products, strict=True):
            covariance[i, j] = covariance[j, i] = (
                n * product - self.sums[i] * self.sums[j]
            ) / (n * n)
        return ColorStatistics.from_covariance(
            np.array([s / n for s in self.sums]), covariance
        )


@dataclass(frozen=True, eq=False)
class ColorStatistics:
    """Colour statistics of a data set, RGB in units of 0 to 255.

    Eigenvalues and -vectors are stored with the set, so that every machine colours with the same ones.
    """

    mean: NDArray[np.float64]
    """Shape (3,)."""
    covariance: NDArray[np.float64]
    """Shape (3, 3)."""
    eigenvalues: NDArray[np.float64]
    """Of the covariance, shape (3,), the largest first."""
    eigenvectors: NDArray[np.float64]
    """One a column, shape (3, 3), in the order of the eigenvalues."""

    @staticmethod
    def from_covariance(
        mean: NDArray[np.float64], covariance: NDArray[np.float64]
    ) -> "ColorStatistics":
        """With the eigenvalues and eigenvectors of a covariance."""
        values, vectors = np.linalg.eigh(covariance)
        values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
        # An axis has no sign of its own: its largest component is made positive.
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(3)])
        return ColorStatistics(mean, covariance, values, vectors * signs)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel, shape (3,); 1 for a channel that does not vary."""
        variance = np.diag(self.covariance)
        return np.where(variance > 0, np.sqrt(variance), 1.0)

    def compute_principal_axes(
        self, unit: Literal["deviation", "variance"] = "deviation"
    ) -> NDArray[np.float64]:
        """Principal axes of the colours in units of 0 to 255, one a column, shape (3, 3), the largest first.

        The shift of Krizhevsky et al. 2012, section 4.1, is these axes times normal draws. Each is as long as its
        standard deviation, the root of the eigenvalue, as in the released source. The paper writes the eigenvalue,
        which has no unit of a pixel: `variance` takes it of colours from 0 to 1, as most code does.
        """
        lengths = (
            np.sqrt(self.eigenvalues) if unit == "deviation" else self.eigenvalues / 255
        )
        axes: NDArray[np.float64] = self.eigenvectors * lengths
        return axes
