"""Prototypes in Triton of the parts of a step that are bound by memory: are they faster, and are their bits right?"""
# ruff: noqa: N803 -- Triton's constants are written in capitals. Its compiler reads annotations: tensors have none.

import torch
import triton
import triton.language as tl
from torch import Tensor

from distrain.models.layers import _hash_counters
from distrain.models.response_norm import _pow_minus_beta, _sum_neighbor_channels

BLOCK_SIZE = 4096
KEYS = (123456789, -987654321)


@triton.jit
def _add(gradient, total, flag, n, limit, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """total (+)= int64(gradient), truncated; what is not finite or out of range counts in the flag and adds 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
    sound = (g < limit) & (g > -limit)
    fixed = tl.where(sound, g, 0.0).to(tl.int64)
    if not FIRST:
        fixed += tl.load(total + at, mask=inside, other=0)
    tl.store(total + at, fixed, mask=inside)
    bad = tl.sum((inside & (sound == 0)).to(tl.int32), 0)
    if bad > 0:
        tl.atomic_add(flag, bad)


def add(
    gradient: Tensor, total: Tensor, flag: Tensor, limit: float, first: bool
) -> None:
    """Add a gradient in fixed point, in one pass."""
    n = gradient.numel()
    _add[(triton.cdiv(n, BLOCK_SIZE),)](
        gradient, total, flag, n, limit, first, BLOCK_SIZE, num_warps=8
    )


@triton.jit
def _finish(total, gradient, valid, n, scale, BLOCK: tl.constexpr):
    """gradient = fp32(double(total) / scale / valid)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    t = tl.load(total + at, mask=inside, other=0).to(tl.float64)
    v = tl.load(valid).to(tl.float64)
    s = tl.load(scale).to(tl.float64)
    tl.store(gradient + at, (t / s / v).to(tl.float32), mask=inside)


def finish(total: Tensor, gradient: Tensor, valid: Tensor, scale: Tensor) -> None:
    """Turn sums back into a gradient, in one pass."""
    n = total.numel()
    _finish[(triton.cdiv(n, BLOCK_SIZE),)](
        total, gradient, valid, n, scale, BLOCK_SIZE, num_warps=8
    )


@triton.jit
def _dropout(x, y, keys, n, threshold, inverse, BLOCK: tl.constexpr):
    """distrain's dropout: lowbias32 of the element's index with two keys, which lie on the device."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    h = at.to(tl.uint32)
    for i in tl.static_range(2):
        h = h ^ tl.load(keys + i).to(tl.uint32, bitcast=True)
        h = h ^ (h >> 16)
        h = h * 0x7FEB352D
        h = h ^ (h >> 15)
        h = h * 0x846CA68B
        h = h ^ (h >> 16)
    keep = h.to(tl.int32, bitcast=True).to(tl.float32) < threshold
    v = tl.load(x + at, mask=inside, other=0.0)
    tl.store(y + at, tl.where(keep, v * inverse, 0.0).to(v.dtype), mask=inside)


def dropout(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Drop elements out, by two int32 keys on the device."""
    y = torch.empty_like(x)
    n = x.numel()
    keep = 1 - p
    _dropout[(triton.cdiv(n, 1024),)](
        x, y, keys, n, keep * 2**32 - 2**31, 1 / keep, 1024
    )
    return y


@triton.jit
def _lrn(
    x,
    y,
    places,
    k,
    alpha,
    CHANNELS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = x s^-0.75 with s = k + alpha sum of x^2 over neighbouring channels; every x is read two or three times."""
    tower = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < places
    base = tower * CHANNELS * places + at
    total = tl.zeros((BLOCK,), tl.float32)
    for c in range(HALF):
        v = tl.load(x + base + c * places, mask=inside & (c < CHANNELS), other=0.0)
        total += v * v
    for c in range(CHANNELS):
        new = c + HALF
        old = c - HALF - 1
        v = tl.load(x + base + new * places, mask=inside & (new < CHANNELS), other=0.0)
        w = tl.load(x + base + old * places, mask=inside & (old >= 0), other=0.0)
        total += v * v - w * w
        r = tl.math.rsqrt(k + alpha * total)
        u = tl.load(x + base + c * places, mask=inside, other=0.0)
        tl.store(y + base + c * places, u * r * tl.sqrt(r), mask=inside)


def lrn(x: Tensor, half: int = 2, k: float = 2.0, alpha: float = 2e-5) -> Tensor:
    """Normalise (towers, channels, places) over neighbouring channels.

    A sliding sum cancels digits: this is a lead for speed, not the arithmetic to keep.
    """
    y = torch.empty_like(x)
    towers, channels, places = x.shape
    _lrn[(triton.cdiv(places, 256), towers)](
        x, y, places, k, alpha, channels, half, 256, num_warps=4
    )
    return y


def check(device: torch.device) -> dict[str, bool | int | float]:
    """Compare the prototypes with distrain's own functions."""
    found: dict[str, bool | int | float] = {}
    g = torch.randn(10_007, device=device) * 2.0**40
    total = torch.zeros(10_007, dtype=torch.int64, device=device)
    flag = torch.zeros(1, dtype=torch.int32, device=device)
    add(g, total, flag, 2.0**60, True)
    add(g, total, flag, 2.0**60, False)
    found["add is exact"] = bool(torch.equal(total, 2 * g.long())) and int(flag) == 0
    g[5], g[6] = float("nan"), 2.0**61
    add(g, total, flag, 2.0**60, False)
    found["add counts violations"] = int(flag)
    valid = torch.tensor([1000], device=device)
    scale = torch.tensor([2.0**38], dtype=torch.float64, device=device)
    out = torch.empty(10_007, device=device)
    finish(total, out, valid, scale)
    found["finish is exact"] = bool(
        torch.equal(out, total.double().div(2.0**38).div(1000).float())
    )
    x = torch.randn(64, 1000, device=device)
    kept = (
        _hash_counters(torch.arange(x.numel(), dtype=torch.int32, device=device), *KEYS)
        < 0.0
    )
    keys = torch.tensor(KEYS, dtype=torch.int32, device=device)
    dropped = x * kept.view(x.shape).float().div_(0.5)
    found["dropout is exact"] = bool(torch.equal(dropout(x, keys, 0.5), dropped))
    x = torch.randn(4, 48, 100, device=device)
    true = x * _pow_minus_beta(
        _sum_neighbor_channels(x.square(), 2).mul_(2e-5).add_(2.0), 0.75
    )
    found["lrn, most off"] = float((lrn(x) - true).abs().max())
    return found
