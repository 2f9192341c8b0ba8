"""Labels are counted without the images, of packed and of indexed sets, and damage is named."""

from collections import Counter

import numpy as np
import pytest
from sets import SetWriter
from shapes import SHAPES, images

from distrain.data.prepare.index import index_dataset
from distrain.data.prepare.open import open_source
from distrain.data.shards.dataset import Dataset, open_shard_store
from distrain.data.shards.label_counts import count_labels
from distrain.data.shards.manifest import Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.store import Store
from distrain.errors import AttemptError

STATISTICS = ColorStatistics.from_covariance(np.full(3, 100.0), np.eye(3) * 400)
# Of five classes, one of which has no sample; four shards of two row groups at most.
LABELS = [0, 3, 3, 1, 4, 3, 0, 3, 3, 3, 4, 4, 4, 0, 3, 3, 3, 3, 3, 1, 1, 0]


@pytest.fixture
def packed(tmp_path):
    store = Store(str(tmp_path))
    writer = SetWriter(store, tuple("abcde"), (8, 8), group_rows=3, shard_groups=2)
    for i, label in enumerate(LABELS):
        # Images of 100 kB, which are not read.
        writer.add(bytes(100_000), label, f"{i}.jpg")
    writer.finish(STATISTICS)
    return store


def test_of_a_packed_set(packed):
    counts = count_labels(packed, Manifest.load(packed), 0.0)
    assert counts == [LABELS.count(label) for label in range(5)]
    assert packed.counters.bytes_read < 100_000


@pytest.mark.parametrize("shape", ["hub", "webdataset"])
def test_of_an_indexed_set(tmp_path, shape):
    url = SHAPES[shape](tmp_path, images())
    index_dataset(*open_source(url), str(tmp_path / "index"))
    dataset = Dataset.open(tmp_path / "index")
    store = open_shard_store(dataset.manifest, dataset.store)
    found = count_labels(store, dataset.manifest, 0.0)
    labels = Counter(row.label for row in dataset)
    assert found == [labels[label] for label in range(len(dataset.classes))]


def test_damage_is_named(packed):
    manifest = Manifest.load(packed)
    path = manifest.shards[1].path
    data = packed.read(path)
    packed.write(path, data[: len(data) // 2])
    with pytest.raises(AttemptError, match=f"{path} "):
        count_labels(packed, manifest, 0.0)
    packed.remove(path)
    with pytest.raises(AttemptError, match=f"{path} is missing"):
        count_labels(packed, manifest, 0.0)


def test_labels_that_are_no_classes(packed):
    fewer = Manifest.load(packed)
    object.__setattr__(fewer, "classes", ("a", "b"))
    with pytest.raises(
        AttemptError, match="does not have the labels that the manifest"
    ):
        count_labels(packed, fewer, 0.0)
