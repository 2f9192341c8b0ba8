"""Counter-based random numbers: every draw is a pure function of (seed, purpose, counter).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), vectorised.
NumPy's own generators are not used: their streams may change between NumPy versions, ours may not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_MASK = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_NUM_ROUNDS = 10


class Purpose(IntEnum):
    """What a draw is for. The second key word, so that no two uses ever share a stream. Never renumber."""

    ROW_GROUPS = 1
    LEFT_OUT = 2
    SHUFFLE_BLOCK = 3
    AUGMENT = 4
    DROPOUT = 5
    WEIGHTS = 6
    PACK = 7
    AUGMENT_CHUNK = 8


def philox4x32(
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
    for i in range(_NUM_ROUNDS):
        k0, k1 = (
            np.uint64((k + i * w) & 0xFFFFFFFF)
            for k, w in zip(key, _WEYL_INCREMENTS, strict=True)
        )
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _WORD_BITS) ^ c1 ^ k0,
            p1 & _LOW_MASK,
            (p0 >> _WORD_BITS) ^ c3 ^ k1,
            p0 & _LOW_MASK,
        )
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3)).astype(np.uint32)


def draw_words(
    seed: int,
    purpose: Purpose,
    a: ArrayLike = 0,
    b: ArrayLike = 0,
    c: ArrayLike = 0,
    d: ArrayLike = 0,
) -> NDArray[np.uint32]:
    """Four random 32-bit words for each counter (a, b, c, d): uint32 array of shape (4, *broadcast shape)."""
    return philox4x32((seed, int(purpose)), (a, b, c, d))


def draw_permutation(
    n: int, seed: int, purpose: Purpose, b: int = 0, c: int = 0, d: int = 0
) -> NDArray[np.int64]:
    """A random permutation of range(n): the order of n 64-bit keys (equal keys keep their order)."""
    # w: (words of a counter, counters); two keys from each counter
    w = draw_words(
        seed, purpose, np.arange((n + 1) // 2, dtype=np.uint64), b, c, d
    ).astype(np.uint64)
    keys = np.concatenate([(w[0] << _WORD_BITS) | w[1], (w[2] << _WORD_BITS) | w[3]])[
        :n
    ]
    return np.argsort(keys, kind="stable")


def derive_seed(seed: int, purpose: Purpose) -> int:
    """A 63-bit seed for a `torch.Generator`."""
    w = draw_words(seed, purpose)
    return (int(w[0]) << 31) ^ int(w[1])
