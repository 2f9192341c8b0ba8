"""Sources of random structure: distrain reads what a plain reader reads, or refuses by name."""

import os
from pathlib import Path

import pytest
from structure.common import Reading, label_data, make_pool, run_cases
from structure.folders import Entry, read_folder, write_folder
from structure.kinds import KINDS, NUM_CASES

import distrain
from distrain.data.prepare.rejects import read_rejects
from distrain.data.storage.store import Store

CASES_PER_TEST = 50


def test_ci_runs_2000_cases():
    assert NUM_CASES.keys() == KINDS.keys()
    assert sum(NUM_CASES.values()) == 2000
    assert all(count % CASES_PER_TEST == 0 for count in NUM_CASES.values())


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        (kind, seed)
        for kind, count in NUM_CASES.items()
        for seed in range(count // CASES_PER_TEST)
    ],
)
def test_random_sources(kind, seed):
    num_cases = run_cases(KINDS[kind], seed, CASES_PER_TEST)
    print(f"{num_cases} cases of {kind}")  # noqa: T201
    assert num_cases == CASES_PER_TEST


def test_pack_stores_what_the_plain_reader_finds(tmp_path):
    """Through the whole command, with names of any bytes, junk, a loop and files that are no images."""
    case = [
        Entry(("cat", "0.jpg"), "image", 0),
        Entry(("cat", "deep", "1.png"), "image", 3),
        Entry(("cat", "._0.jpg"), "text", 0),
        Entry(("cat", "notes.txt"), "text", 0),
        Entry(("cat", "back"), "up", 0),
        Entry(("bytes\udcff", "b\udcfe.jpg"), "image", 4),
        Entry(("line\nbreak", "a b.JPEG"), "image", 6),
        Entry(("line\nbreak", "empty.jpg"), "empty", 0),
        Entry(("nothing", "Thumbs.db"), "image", 8),
        Entry(("0.avif",), "image", 10),
    ]
    options = write_folder(case, tmp_path)
    expected = read_folder(case, options)
    assert isinstance(expected, Reading)
    result = distrain.pack(options["url"], str(tmp_path / "set"), geometry="keep")
    print(result)
