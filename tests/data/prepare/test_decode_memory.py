import pytest

from distrain.data.prepare import decode_memory
from distrain.data.prepare.decode_memory import count_decoding_threads


@pytest.mark.parametrize(
    ("gib", "megapixels", "expected"),
    [(64, 50, 8), (4, 50, 2), (1, 50, 1), (0, 50, 1), (1, 1, 8), (0.2, 0, 8)],
)
def test_memory_bounds_the_threads_that_decode(monkeypatch, gib, megapixels, expected):
    monkeypatch.setattr(decode_memory, "count_available_cores", lambda: 8)
    monkeypatch.setattr(
        decode_memory, "count_available_memory", lambda: int(gib * 2**30)
    )
    assert count_decoding_threads(megapixels * 10**6) == expected
