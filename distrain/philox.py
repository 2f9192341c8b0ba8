"""Counter-based random numbers: every draw is a pure function of (seed, purpose, counter).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), vectorised.
NumPy's own generators are not used: their streams may change between NumPy versions, ours may not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for. The second key word, so that no two uses ever share a stream. Never renumber."""

    GROUPS = 1
    LEFT_OUT = 2
    BLOCK = 3
    AUGMENT = 4
    DROPOUT = 5
    WEIGHTS = 6
    PACK = 7
    CHUNK = 8


def philox(
    key: tuple[int, int], counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
) -> NDArray[np.uint32]:
    """Philox4x32-10 of each counter.

    Args:
        key: two 32-bit words.
        counter: four 32-bit words, each a scalar or an array; they broadcast to one shape.

    Returns:
        uint32 array of shape (4, *broadcast shape).
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for i in range(_ROUNDS):
        k0, k1 = (
            np.uint64((k + i * w) & 0xFFFFFFFF) for k, w in zip(key, _WEYL, strict=True)
        )
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ k0,
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ k1,
            p0 & _LOW,
        )
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3)).astype(np.uint32)


def words(
    seed: int,
    purpose: Purpose,
    a: ArrayLike = 0,
    b: ArrayLike = 0,
    c: ArrayLike = 0,
    d: ArrayLike = 0,
) -> NDArray[np.uint32]:
    """Four random 32-bit words for each counter (a, b, c, d): uint32 array of shape (4, *broadcast shape)."""
    return philox((seed, int(purpose)), (a, b, c, d))


def permutation(
    n: int, seed: int, purpose: Purpose, b: int = 0, c: int = 0, d: int = 0
) -> NDArray[np.int64]:
    """A random permutation of range(n): the order of n 64-bit keys (equal keys keep their order)."""
    # w: (words of a counter, counters); two keys from each counter
    w = words(seed, purpose, np.arange((n + 1) // 2, dtype=np.uint64), b, c, d).astype(
        np.uint64
    )
    keys = np.concatenate([(w[0] << _HALF) | w[1], (w[2] << _HALF) | w[3]])[:n]
    return np.argsort(keys, kind="stable")


def derived_seed(seed: int, purpose: Purpose) -> int:
    """A 63-bit seed for a `torch.Generator`."""
    w = words(seed, purpose)
    return (int(w[0]) << 31) ^ int(w[1])
