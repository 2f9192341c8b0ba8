import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.philox import (
    Purpose,
    derive_seed,
    draw_permutation,
    draw_words,
    philox4x32,
)

# Known answers of the authors' Random123 library, kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 2,
        (0xFFFFFFFF,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN)
def test_known_answers(key, counter, answer):
    assert tuple(philox4x32(key, counter).tolist()) == answer


def test_vectorised_equals_one_by_one():
    many = draw_words(7, Purpose.AUGMENT, np.arange(50), 3, np.arange(50)[::-1])
    for i in range(50):
        assert np.array_equal(many[:, i], draw_words(7, Purpose.AUGMENT, i, 3, 49 - i))


@given(st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_permutation_is_one(n, seed):
    assert np.array_equal(
        np.sort(draw_permutation(n, seed, Purpose.SHUFFLE_BLOCK)), np.arange(n)
    )


def test_permutations_are_uniform():
    # 6 orders of 3 items, 6,000 draws: each 1,000 +- 5 standard deviations
    found = [
        tuple(draw_permutation(3, seed, Purpose.SHUFFLE_BLOCK)) for seed in range(6000)
    ]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(6000 * 1 / 6 * 5 / 6)


def test_derived_seeds_differ():
    seeds = {derive_seed(s, p) for s in range(100) for p in Purpose}
    assert len(seeds) == 100 * len(Purpose)
    assert all(0 <= s < 2**63 for s in seeds)
