"""RGB mean and covariance of a set of images, exactly: sums of bytes and of their products are integers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class PixelMoments:
    """Sums over pixels as Python integers, which never round: the order of images does not matter."""

    def __init__(self) -> None:
        self.pixels = 0
        self.sums = [0] * 3
        self.products = [[0] * 3 for _ in range(3)]

    def add(self, image: NDArray[np.uint8]) -> None:
        """Add an RGB image of shape (height, width, 3)."""
        flat = image.reshape(-1, 3).astype(np.float64)
        # Exact in float64: at most 2^37 pixels of 255^2 each stay below 2^53.
        sums, products = flat.sum(0), flat.T @ flat
        self.pixels += len(flat)
        for i in range(3):
            self.sums[i] += int(sums[i])
            for j in range(3):
                self.products[i][j] += int(products[i, j])

    def statistics(self) -> "Statistics":
        """Mean and covariance of all pixels added, in units of 0 to 255."""
        n = self.pixels
        covariance = [
            [(n * self.products[i][j] - self.sums[i] * self.sums[j]) / (n * n) for j in range(3)] for i in range(3)
        ]
        return Statistics(np.array([s / n for s in self.sums]), np.array(covariance))


@dataclass(frozen=True, eq=False)
class Statistics:
    """Colour statistics of a data set, RGB in units of 0 to 255."""

    mean: NDArray[np.float64]
    """Shape (3,)."""
    covariance: NDArray[np.float64]
    """Shape (3, 3)."""

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel, shape (3,); 1 for a channel that does not vary."""
        variance = np.diag(self.covariance)
        return np.where(variance > 0, np.sqrt(variance), 1.0)

    def principal_axes(self) -> NDArray[np.float64]:
        """Standard deviation times principal axis, one axis a column, shape (3, 3), the largest first.

        The shift of Krizhevsky et al. 2012, section 4.1, is these axes times normal draws. (The paper writes the
        eigenvalue; the released source multiplies by its root, which is what has the unit of a pixel.)
        """
        values, vectors = np.linalg.eigh(self.covariance)
        values, vectors = values[::-1], vectors[:, ::-1]
        # An axis has no sign of its own: its largest component is made positive.
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(3)])
        axes: NDArray[np.float64] = vectors * signs * np.sqrt(np.maximum(values, 0))
        return axes
