"""RGB mean and covariance of a set of images, exactly.

Sums of bytes and of their products are integers, so no rounding occurs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# RR, GG, BB, RG, RB, GB.
_CHANNEL_PAIRS = [(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]


class PixelMoments:
    """Sums over pixels as Python integers, so the order of images does not matter."""

    def __init__(
        self,
        pixels: int = 0,
        sums: list[int] | None = None,
        products: list[int] | None = None,
    ) -> None:
        self.pixels = pixels
        """Number of pixels added."""
        self.sums = sums or [0] * 3
        """Sums of red, green and blue, in units of 0 to 255."""
        self.products = products or [0] * 6
        """Sums of the products RR, GG, BB, RG, RB and GB."""

    def add_image(self, image: NDArray[np.uint8]) -> None:
        """Add an RGB image of shape (height, width, 3), or 4 with a byte of padding."""
        flat = image.reshape(-1, image.shape[2])
        # Exact in float64: at most 2^37 pixels of 255^2 each stay below 2^53. One
        # channel at a time is six times faster than one product of matrices.
        channels = [flat[:, i].astype(np.float64) for i in range(3)]
        self.merge_moments(
            PixelMoments(
                pixels=len(flat),
                sums=[int(channel.sum()) for channel in channels],
                products=[int(channels[i] @ channels[j]) for i, j in _CHANNEL_PAIRS],
            )
        )

    def merge_moments(self, other: "PixelMoments") -> None:
        """Add the sums of another one."""
        self.pixels += other.pixels
        self.sums = _add_elements(self.sums, other.sums)
        self.products = _add_elements(self.products, other.products)

    def to_statistics(self) -> "ColorStatistics":
        """Return the statistics of all pixels added, in units of 0 to 255."""
        n = self.pixels
        covariance = np.empty((3, 3))
        for pair, product in zip(_CHANNEL_PAIRS, self.products, strict=True):
            i, j = pair
            # Integers up to the division, which is the only operation that rounds.
            product_of_sums = self.sums[i] * self.sums[j]
            value = (n * product - product_of_sums) / (n * n)
            covariance[i, j] = value
            covariance[j, i] = value
        mean = np.array([total / n for total in self.sums])
        return ColorStatistics.from_covariance(mean, covariance)


def _add_elements(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True, eq=False)
class ColorStatistics:
    """Color statistics of a data set, RGB in units of 0 to 255.

    Eigenvalues and eigenvectors are stored with the data set, so that every machine
    shifts colors by the same ones.
    """

    mean: NDArray[np.float64]
    """Shape (3,)."""
    covariance: NDArray[np.float64]
    """Shape (3, 3)."""
    eigenvalues: NDArray[np.float64]
    """Eigenvalues of the covariance, shape (3,), the largest first."""
    eigenvectors: NDArray[np.float64]
    """One per column, shape (3, 3), in the order of the eigenvalues."""

    @staticmethod
    def from_covariance(
        mean: NDArray[np.float64], covariance: NDArray[np.float64]
    ) -> "ColorStatistics":
        """Compute eigenvalues and eigenvectors, and return all four."""
        # eigh sorts ascending. Rounding may make an eigenvalue of 0 slightly negative.
        eigenvalues, eigenvectors = np.linalg.eigh(covariance)
        eigenvalues = np.maximum(eigenvalues[::-1], 0)
        eigenvectors = eigenvectors[:, ::-1]
        # The sign of an eigenvector is arbitrary: make its largest component positive.
        largest = np.abs(eigenvectors).argmax(0)
        signs = np.sign(eigenvectors[largest, np.arange(3)])
        return ColorStatistics(mean, covariance, eigenvalues, eigenvectors * signs)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel, shape (3,); 1 for a constant channel."""
        variance = np.diag(self.covariance)
        deviation = np.sqrt(variance)
        return np.where(variance > 0, deviation, 1.0)

    def compute_principal_axes(
        self, unit: Literal["deviation", "variance"] = "deviation"
    ) -> NDArray[np.float64]:
        """Return the principal axes of the colors, one per column, the largest first.

        Shape (3, 3), in units of 0 to 255. The shift of Krizhevsky et al. 2012, section
        4.1, is these axes times normal draws.

        Args:
            unit: length of an axis. `deviation`: the standard deviation along it, which
                is the root of the eigenvalue, as in the released source. `variance`:
                the eigenvalue of colors from 0 to 1, as in most code; the paper writes
                the eigenvalue, which does not have the unit of a pixel.
        """
        lengths = np.sqrt(self.eigenvalues)
        if unit == "variance":
            # The eigenvalue of colors from 0 to 1 is that of ours over 255^2; times 255
            # for a shift in units of 0 to 255.
            lengths = self.eigenvalues / 255
        axes: NDArray[np.float64] = self.eigenvectors * lengths
        return axes
