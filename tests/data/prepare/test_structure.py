"""Sources of random structure: distrain reads what a plain reader reads, or refuses by name."""

import numpy as np
import pytest
from structure.common import Reading, label_data, run_cases
from structure.folders import Entry
from structure.kinds import KINDS, NUM_CASES
from structure.parquets import TEXT_TYPES, File, Table
from structure.tars import Member

from distrain.data.prepare.open import open_source
from distrain.data.prepare.pack import pack_dataset
from distrain.data.prepare.pack_options import Geometry, PackOptions
from distrain.data.shards.dataset import Dataset
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


ENTRIES = [
    Entry(("cat", "0.jpg"), "image", 0),
    Entry(("cat", "deep", "1.jpg"), "image", 2),
    Entry(("cat", "._0.jpg"), "text", 0),
    Entry(("cat", "notes.txt"), "text", 0),
    Entry(("cat", "back"), "up", 0),
    Entry(("bytes\udcff", "b\udcfe.jpg"), "image", 4),
    Entry(("line\nbreak", "a b.JPEG"), "image", 6),
    Entry(("line\nbreak", "empty.jpg"), "empty", 0),
    Entry(("nothing", "Thumbs.db"), "image", 8),
    Entry(("0.avif",), "image", 10),
]
SHARDS = [
    [Member("./x/0.cls", b"cat"), Member("./x/0.jpg", 0), Member("x/._0.jpg", 2)],
    [
        Member("1.avif", 4),
        Member("2.jpg", 6),
        Member("1.txt", b"notes"),
        Member("2.json", b'{"label": "dog"}'),
        Member("1.cls", b"dog"),
        Member("2.jpg", 8),
        Member("3.jpg", 10),
    ],
]
_OPTIONS = {"use_dictionary": True, "compression": "zstd"}
_ROWS = [(0, "cat"), (2, "dog"), (None, "dog"), (-1, "cat"), (4, None), (4, "cat")]
TABLE = Table(
    [File(_ROWS, "list", TEXT_TYPES[3], ("boxes", "id"), 4, _OPTIONS)],
    *("default", "image", "label"),
    prefix=None,
    has_classes=False,
)


@pytest.mark.parametrize(
    ("kind", "case"),
    [("folders", ENTRIES), ("samples", SHARDS), ("parquet", TABLE)],
)
def test_pack_stores_what_the_plain_reader_finds(kind, case, tmp_path):
    """Through the whole command; what is no image is a reject of it."""
    place = tmp_path / "source"
    place.mkdir()
    options = KINDS[kind].write(case, place)
    expected = KINDS[kind].read(case, options)
    assert isinstance(expected, Reading)
    source = open_source(**options).source
    store = Store(str(tmp_path / "set"))
    result = pack_dataset(source, store.url, PackOptions(Geometry("keep")))
    dataset = Dataset(store, result.manifest, memory_bytes=1 << 20, retry_seconds=0)
    stored = [
        (result.manifest.classes[row.label], label_data(bytes(row.data)))
        for row in dataset.read_rows(np.arange(len(dataset)))
    ]
    wanted = [image for image in expected.images if str(image.data).startswith("image")]
    bad = [image.name for image in expected.images if image not in wanted]
    assert sorted(stored) == sorted((image.class_name, image.data) for image in wanted)
    assert result.manifest.classes == expected.classes
    if KINDS[kind].has_names:
        names = sorted(reject.name for reject in result.rejects)
        assert names == sorted(expected.rejects + bad)
    assert len(result.rejects) == len(expected.rejects + bad) > 0
