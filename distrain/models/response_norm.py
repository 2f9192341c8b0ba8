"""Response normalization of 2012, over neighboring channels and neighboring places.

torch has the first kind only, without a deterministic CUDA backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LocalResponseNorm(nn.Module):
    """Response normalization over neighboring channels, as in the source of 2012.

    b = a / (k + alpha / size * sum of a^2 over `size` neighboring channels)^beta.
    Krizhevsky et al. 2012, section 3.3, writes alpha without the division; the released
    source divides, and so does torch. The sums are made of shifted slices: torch's own
    layer goes through avg_pool3d, whose CUDA backward is not deterministic.
    """

    def __init__(
        self,
        size: int = 5,
        *,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
        groups: int = 1,
    ) -> None:
        """Set the parameters of the formula.

        Args:
            size: number of channels in a sum, odd.
            alpha: factor on the mean of the squares.
            beta: exponent.
            k: constant term.
            groups: number of towers; channels of different towers are not neighbors.
        """
        super().__init__()
        assert size % 2 == 1, size
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (n, c, ...); the result has the same shape.

        bf16 is computed, and returned, in fp32.
        """
        towers = x.float() if x.dtype == torch.bfloat16 else x
        towers = towers.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, -1)
        y: Tensor = _LocalResponseNormFunction.apply(
            towers,
            self.size // 2,
            self.k,
            self.alpha / self.size,
            self.beta,
        )
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """Return the parameters for `print`."""
        return (
            f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, "
            f"groups={self.groups}"
        )


class _LocalResponseNormFunction(torch.autograd.Function):
    """y = x s^-beta with s = k + alpha * sum of x^2 over neighboring channels.

    On a CPU it works tower by tower: all of one stays in a core's cache, which makes
    this cheaper than the convolution before it (over the whole batch at once it cost
    1.4 times as much, and by torch's autograd four times). Backward computes the sums
    again, which takes less memory than keeping them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        half_size: int,
        k: float,
        alpha: float,
        beta: float,
    ) -> Tensor:
        """Normalize x of shape (towers, channels, places)."""
        ctx.save_for_backward(x)
        ctx.arguments = half_size, k, alpha, beta
        y = torch.empty_like(x)
        for x_i, y_i in zip(_split_by_tower(x), _split_by_tower(y), strict=True):
            s = _sum_neighbor_channels(x_i.square(), half_size).mul_(alpha).add_(k)
            torch.mul(x_i, _pow_minus_beta(s, beta), out=y_i)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradient of x from that of y.

        g s^-beta - 2 alpha beta x * sum of g x s^(-beta - 1) over neighboring channels.
        """
        (x,) = ctx.saved_tensors
        half_size, k, alpha, beta = ctx.arguments
        x_gradient = torch.empty_like(x)
        towers = zip(
            _split_by_tower(x),
            _split_by_tower(gradient),
            _split_by_tower(x_gradient),
            strict=True,
        )
        for x_i, g_i, out_i in towers:
            s = _sum_neighbor_channels(x_i.square(), half_size).mul_(alpha).add_(k)
            # The first term: g s^-beta.
            torch.mul(g_i, _pow_minus_beta(s, beta), out=out_i)
            # The second one. out x / s is g x s^(-beta - 1): no second power.
            terms = (out_i * x_i).div_(s)
            sums = _sum_neighbor_channels(terms, half_size)
            out_i.addcmul_(sums, x_i, value=-2 * alpha * beta)
        # Only x has a gradient: the other arguments are numbers.
        return x_gradient, None, None, None, None


def _split_by_tower(x: Tensor) -> tuple[Tensor, ...]:
    # A GPU takes all towers at once: each further kernel would cost a launch. So does
    # an exported graph, whose number of images is not known. The bits are the same.
    is_split = x.device.type == "cpu" and not torch.compiler.is_exporting()
    return torch.split(x, 1) if is_split else (x,)


def _sum_neighbor_channels(x: Tensor, half_size: int) -> Tensor:
    """Sum x over `half_size` channels before, the channel itself, and as many after it.

    x and the result have shape (towers, channels, ...).
    """
    total = x.clone()
    num_channels = x.shape[1]
    # Channels beyond the first and last one count as 0. The order of the additions is
    # part of the result.
    for distance in range(1, min(half_size, num_channels - 1) + 1):
        total[:, distance:].add_(x[:, : num_channels - distance])
        total[:, : num_channels - distance].add_(x[:, distance:])
    return total


def _pow_minus_beta(s: Tensor, beta: float) -> Tensor:
    """Compute s^-beta."""
    if beta != 0.75:
        return s.pow(-beta)
    # The beta of 2012 by roots, which are faster than the logarithm of a power.
    root = s.rsqrt()
    return root * root.sqrt()


class SpatialResponseNorm(nn.Module):
    """Response normalization over neighboring places of the same channel.

    b = a / (1 + alpha / size^2 * sum of a^2 over size x size places)^beta. The released
    source of 2012 has it after the second response normalization (`cnorm2`); the paper
    does not mention it.
    """

    def __init__(
        self,
        size: int = 5,
        *,
        alpha: float = 1e-3,
        beta: float = 0.75,
    ) -> None:
        """Set the parameters of the formula.

        Args:
            size: side of the square in pixels; places outside of the image count as 0.
            alpha: factor on the mean of the squares.
            beta: exponent.
        """
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x of shape (n, c, h, w); the result has the same shape."""
        mean_squares = F.avg_pool2d(
            x.square(),
            self.size,
            stride=1,
            padding=self.size // 2,
        )
        return x * _pow_minus_beta(1 + self.alpha * mean_squares, self.beta)

    def extra_repr(self) -> str:
        """Return the parameters for `print`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}"
