"""Counter-based random numbers.

Every draw is a pure function of (seed, purpose, counter).
Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
2, 3" (SC'11), vectorized. NumPy's own generators are not used: their streams may change
between NumPy versions, ours may not.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The constants of the paper; any other value makes another generator.
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW_MASK = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)
_NUM_ROUNDS = 10


class Purpose(IntEnum):
    """Use of a draw.

    It is the second word of the key, so that no two uses ever share a stream.
    """

    # Never renumber: the numbers decide the draws, and so the weights of every run.
    ROW_GROUPS = 1
    LEFT_OUT = 2
    SHUFFLE_BLOCK = 3
    AUGMENT = 4
    DROPOUT = 5
    WEIGHTS = 6
    PACK = 7
    AUGMENT_CHUNK = 8


def philox4x32(
    key: tuple[int, int],
    counter: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike],
) -> NDArray[np.uint32]:
    """Return the Philox4x32-10 words of each counter.

    Args:
        key: two 32-bit words.
        counter: four 32-bit words, each a scalar or an array; they broadcast to one
            shape.

    Returns:
        uint32 array of shape (4, *broadcast shape).
    """
    # Words are held in uint64, so that a product of two 32-bit words fits.
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    for i in range(_NUM_ROUNDS):
        # The key of round i: Weyl increments modulo 2^32, in Python's unbounded ints.
        k0, k1 = (
            np.uint64((word + i * increment) & 0xFFFFFFFF)
            for word, increment in zip(key, _WEYL_INCREMENTS, strict=True)
        )
        # The round: the high word of each product is mixed with a word and the key,
        # the low word passes on as it is.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        c0 = (p1 >> _WORD_BITS) ^ c1 ^ k0
        c2 = (p0 >> _WORD_BITS) ^ c3 ^ k1
        c1 = p1 & _LOW_MASK
        c3 = p0 & _LOW_MASK
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3)).astype(np.uint32)


def draw_words(
    seed: int,
    purpose: Purpose,
    a: ArrayLike = 0,
    b: ArrayLike = 0,
    c: ArrayLike = 0,
    d: ArrayLike = 0,
) -> NDArray[np.uint32]:
    """Draw four random 32-bit words for each counter (a, b, c, d).

    Returns:
        uint32 array of shape (4, *broadcast shape).
    """
    return philox4x32((seed, int(purpose)), (a, b, c, d))


def draw_permutation(
    n: int,
    seed: int,
    purpose: Purpose,
    b: int = 0,
    c: int = 0,
    d: int = 0,
) -> NDArray[np.int64]:
    """Draw a random permutation of range(n): the order of n random 64-bit keys.

    Equal keys keep their order. b, c and d are the last three counter words; the first
    one counts the pairs of keys.
    """
    # Each counter has four words, which make two keys; w: (4 words, counters).
    counters = np.arange((n + 1) // 2, dtype=np.uint64)
    w = draw_words(seed, purpose, counters, b, c, d).astype(np.uint64)
    first_keys = (w[0] << _WORD_BITS) | w[1]
    second_keys = (w[2] << _WORD_BITS) | w[3]
    keys = np.concatenate([first_keys, second_keys])[:n]
    # A stable sort: the permutation is the same on every platform.
    return np.argsort(keys, kind="stable")


def derive_seed(seed: int, purpose: Purpose) -> int:
    """Derive a 63-bit seed for a `torch.Generator`."""
    w = draw_words(seed, purpose)
    # Shifted by 31, not 32, to stay below 2^63: the words share bit 31. Never change
    # it: it decides initial weights.
    return (int(w[0]) << 31) ^ int(w[1])
