"""Which rows are for validation: properties of the choice."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.data.prepare.validation_rows import (
    RowHashes,
    choose_sides,
    count_sides,
    decode_sides,
    encode_sides,
)

# Label (-1: does not decode), hash of the file and number of the picture.
ROWS = st.lists(
    st.tuples(
        st.integers(-1, 2),
        st.integers(0, 2**64 - 1),
        st.integers(0, 12),
    ),
    max_size=40,
)
FRACTIONS = st.floats(0.01, 0.99)


def hashes_of(rows) -> RowHashes:
    """Hashes as the pass makes them; pixels that differ in their last byte, or first."""
    pixels = np.zeros((len(rows), 16), np.uint8)
    for i, (label, _, picture) in enumerate(rows):
        if label >= 0:
            pixels[i, 15 * (picture % 2)] = picture
    labels = np.array([label for label, _, _ in rows], np.int32)
    files = np.array([file if label >= 0 else 0 for label, file, _ in rows], np.uint64)
    return RowHashes(labels, files, pixels)


@given(rows=ROWS, fraction=FRACTIONS)
@settings(max_examples=200, deadline=None)
def test_the_first_of_equal_pictures_decides(rows, fraction):
    """As a plain loop says."""
    sides = choose_sides(hashes_of(rows), fraction)
    first: dict[int, int] = {}
    for i, (label, file, picture) in enumerate(rows):
        if label < 0:
            assert not sides.is_validation[i]
            assert not sides.follows[i]
            continue
        assert sides.follows[i] == (picture in first)
        leader = first.setdefault(picture, file)
        assert sides.is_validation[i] == (leader / 2**64 < fraction)
    counts = count_sides(sides, 3)
    assert sum(counts.train) + sum(counts.val) == sum(row[0] >= 0 for row in rows)
    assert len(counts.train) == len(counts.val) == 3


@given(rows=ROWS, more=ROWS, fraction=FRACTIONS, larger=FRACTIONS, data=st.data())
@settings(max_examples=200, deadline=None)
def test_more_rows_another_order_and_a_larger_fraction(
    rows, more, fraction, larger, data
):
    """Rows of pictures of their own keep their side; a larger fraction takes more."""
    chosen = choose_sides(hashes_of(rows), fraction).is_validation
    grown = choose_sides(hashes_of([*rows, *more]), fraction).is_validation
    assert grown[: len(rows)].tolist() == chosen.tolist()
    both = choose_sides(hashes_of(rows), max(fraction, larger)).is_validation
    assert np.all(both | ~chosen)

    # One row per picture, in any order.
    unique = list({row[2]: row for row in rows}.values())
    order = data.draw(st.permutations(range(len(unique))))
    before = choose_sides(hashes_of(unique), fraction).is_validation
    after = choose_sides(hashes_of([unique[i] for i in order]), fraction).is_validation
    assert after.tolist() == [before[i] for i in order]


@given(rows=ROWS)
@settings(max_examples=20, deadline=None)
def test_sides_are_kept_in_a_file(rows):
    sides = choose_sides(hashes_of(rows), 0.5)
    kept = decode_sides(encode_sides(sides))
    for before, after in zip(sides, kept, strict=True):
        assert before.dtype == after.dtype
        assert before.tolist() == after.tolist()
