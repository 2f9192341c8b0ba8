import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pyarrow.parquet as pq
import pytest
from crc32c import crc32c
from sets import SetWriter

from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import MANIFEST_FILE, Manifest
from distrain.data.shards.stats import ColorStatistics
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, RunError, UserError

STATISTICS = ColorStatistics.from_covariance(np.full(3, 100.0), np.eye(3) * 400)


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 256, rng.integers(0, 300), dtype=np.uint8).tobytes(), i % 3)
        for i in range(n)
    ]


def write(folder, data, classes=("a", "b", "c"), **sizes):
    writer = SetWriter(
        Store(str(folder)),
        classes,
        (8, 8),
        **{"group_rows": 7, "shard_groups": 3, **sizes},
    )
    for i, (file, label) in enumerate(data):
        writer.add(file, label, f"{i}.jpg")
    return writer.finish(STATISTICS)


def reader(folder, memory=1 << 20, patience=0.0):
    store = Store(str(folder))
    return Dataset(
        store, Manifest.load(store), memory_bytes=memory, retry_seconds=patience
    )


@pytest.mark.parametrize("n", [1, 6, 7, 8, 21, 22, 100])
def test_rows_come_back(tmp_path, n):
    data = rows(n)
    manifest = write(tmp_path, data)
    dataset = reader(tmp_path)
    assert dataset.manifest.fingerprint == manifest.fingerprint
    assert manifest.num_rows == n == manifest.rows_per_group.sum()
    ids = np.random.default_rng(1).permutation(n)
    found = dataset.read_rows(ids)
    assert [(bytes(row.data), row.label) for row in found] == [data[i] for i in ids]


def test_layout_is_the_hubs(tmp_path):
    manifest = write(tmp_path, rows(10))
    table = pq.read_table(tmp_path / manifest.shards[0].path)
    assert table.column_names == ["image", "label", "height", "width", "crc32c"]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": ["a", "b", "c"], "_type": "ClassLabel"}
    first = table.slice(0, 1).to_pylist()[0]
    assert first["image"]["path"] == "0.jpg"
    assert first["crc32c"] == crc32c(first["image"]["bytes"])


def test_one_read_a_group_and_memory_is_bounded(tmp_path, monkeypatch):
    write(tmp_path, rows(70))
    dataset = reader(tmp_path, memory=4000)
    reads = []
    original = dataset.store.backend.read
    monkeypatch.setattr(
        dataset.store.backend,
        "read",
        lambda path, start, end: (
            reads.append((start, end)) or original(path, start, end)
        ),
    )
    for start in range(0, 70, 7):
        dataset.read_rows(np.arange(start, start + 7))
        dataset.read_rows(np.arange(start, start + 7))
        assert sum(dataset._get_group_bytes(g) for g in dataset._cached_groups) <= 4000
    assert dataset.num_groups_read == 10
    assert len(reads) == 10 + 4  # and one footer a shard


def test_rows_are_copied_where_their_groups_do_not_fit(tmp_path):
    data = rows(70)
    write(tmp_path, data)
    dataset = reader(tmp_path, memory=1)
    found = dataset.read_rows(np.arange(70))
    assert [bytes(row.data) for row in found] == [file for file, _ in data]
    assert all(row.data.base is None for row in found if len(row.data))
    assert not dataset._cached_groups
    kept = reader(tmp_path).read_rows(np.arange(5))
    assert all(row.data.base is not None for row in kept)


def test_samples_by_number(tmp_path):
    """Negative ones count from the end; none keeps its row group alive."""
    data = rows(70)
    write(tmp_path, data)
    dataset = Dataset.open(tmp_path)
    for sample_id in range(-70, 70):
        row = dataset[sample_id]
        assert (bytes(row.data), row.label) == data[sample_id]
        assert row.data.base is None
    for sample_id in (-71, 70):
        with pytest.raises(IndexError, match=f"sample {sample_id} of 70"):
            dataset[sample_id]


@pytest.mark.parametrize("where", ["group", "footer"])
def test_a_flipped_byte_is_a_storage_failure(tmp_path, where):
    manifest = write(tmp_path, rows(10))
    shard = manifest.shards[0]
    at = shard.groups[0].start + 20 if where == "group" else shard.footer_start + 5
    path = tmp_path / shard.path
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        RunError, match="shard-00000.parquet is damaged: .* read 4 times.*it again$"
    ):
        reader(tmp_path).read_rows(np.arange(3))


def test_a_read_that_fails_for_a_while_is_tried_again(tmp_path, monkeypatch):
    data = rows(10)
    write(tmp_path, data)
    dataset, failures = (
        reader(tmp_path, patience=60.0),
        iter([True, True, False, False]),
    )

    original = dataset.store.backend.read

    def read(path, start, end):
        if next(failures):
            raise ConnectionResetError("reset")
        return original(path, start, end)

    monkeypatch.setattr(dataset.store.backend, "read", read)
    assert bytes(dataset.read_rows(np.array([3]))[0].data) == data[3][0]
    assert dataset.store.counters.num_retries == 2


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, rows(10))
    (tmp_path / "shard-00000.parquet").unlink()
    with pytest.raises(RunError, match="shard-00000.parquet is missing"):
        reader(tmp_path, patience=60.0).read_rows(np.arange(3))


def test_a_label_out_of_range_is_named(tmp_path):
    write(tmp_path, rows(10))
    tree = json.loads((tmp_path / MANIFEST_FILE).read_text())
    tree["classes"] = ["a", "b"]
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(tree))
    with pytest.raises(
        AttemptError,
        match="row group 0 row 2 has label 2, but the manifest names 2 classes",
    ):
        reader(tmp_path).read_rows(np.arange(3))


def test_what_is_not_a_data_set(tmp_path):
    with pytest.raises(UserError, match="it does not exist"):
        reader(tmp_path / "none")
    with pytest.raises(UserError, match=r"it has no manifest.json"):
        reader(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(
        UserError, match=r"damaged \(not JSON\): restore it, or delete it and run"
    ):
        reader(tmp_path)
    with pytest.raises(
        UserError, match=f"{MANIFEST_FILE} is a file: name its folder, {tmp_path}$"
    ):
        reader(tmp_path / MANIFEST_FILE)
    (tmp_path / MANIFEST_FILE).write_text("[]")
    with pytest.raises(UserError, match="is not a distrain-shards-3 manifest"):
        reader(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{}")
    with pytest.raises(UserError, match="is not a distrain-shards-3 manifest"):
        reader(tmp_path)
    write(tmp_path / "grey", rows(3))
    tree = json.loads((tmp_path / "grey" / MANIFEST_FILE).read_text())
    del tree["eigenvalues"]
    (tmp_path / "grey" / MANIFEST_FILE).write_text(json.dumps(tree))
    with pytest.raises(
        UserError,
        match="has no color statistics, .*distrain stats prints the statistics of a data set",
    ):
        reader(tmp_path / "grey")
    write(tmp_path / "empty", [])
    with pytest.raises(UserError, match="is empty"):
        reader(tmp_path / "empty")
    write(tmp_path / "one", rows(1), classes=("a",))
    with pytest.raises(UserError, match="has fewer than two classes"):
        reader(tmp_path / "one")


def test_where_a_sample_lies(tmp_path):
    write(tmp_path, rows(50))
    assert (
        reader(tmp_path).describe_sample(30) == "shard-00001.parquet row group 1 row 2"
    )


def test_groups_are_fetched_ahead_within_the_memory(tmp_path):
    """As many as fit, none twice, and none that was fetched ahead goes before it was used."""
    write(tmp_path / "set", rows(70))
    dataset = reader(tmp_path / "set")
    sizes = [
        group.end - group.start
        for shard in dataset.manifest.shards
        for group in shard.groups
    ]
    small = Dataset(
        dataset.store, dataset.manifest, memory_bytes=4 * max(sizes), retry_seconds=0
    )
    with ThreadPoolExecutor(3) as pool:
        for ahead in range(0, 70, 7):
            queued = [
                small.find_row_groups(np.arange(i, i + 7))
                for i in range(ahead, min(ahead + 35, 70), 7)
            ]
            small.prefetch_row_groups(queued, pool)
            assert small._cached_bytes <= 4 * max(sizes)
            assert [
                row.label for row in small.read_rows(np.arange(ahead, ahead + 7))
            ] == [row.label for row in dataset.read_rows(np.arange(ahead, ahead + 7))]
    assert small.num_groups_read == 10


def test_a_fetch_ahead_that_failed_is_tried_again(tmp_path):
    write(tmp_path / "set", rows(14))
    dataset = reader(tmp_path / "set")
    path = next((tmp_path / "set").glob("*.parquet"))
    path.rename(path.with_suffix(".away"))
    with ThreadPoolExecutor(1) as pool:
        dataset.prefetch_row_groups([[0]], pool)
        with pytest.raises(AttemptError, match="is missing"):
            dataset.read_rows(np.arange(7))
        path.with_suffix(".away").rename(path)
        assert len(dataset.read_rows(np.arange(7))) == 7


def test_what_an_early_end_left_unfetched_is_fetched_when_asked_for(tmp_path):
    write(tmp_path / "set", rows(70))
    dataset, busy = reader(tmp_path / "set"), Event()
    pool = ThreadPoolExecutor(1)
    pool.submit(busy.wait)
    dataset.prefetch_row_groups([range(10)], pool)
    pool.shutdown(wait=False, cancel_futures=True)
    busy.set()
    assert len(dataset.read_rows(np.arange(70))) == 70
    with ThreadPoolExecutor(1) as another:
        dataset.prefetch_row_groups([range(10)], another)
    assert dataset.num_groups_read == 10
    assert dataset._cached_bytes == sum(dataset._get_group_bytes(g) for g in range(10))
