"""The DALI path against plain numpy and PIL."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distrain.data.loader import Loader, evaluation_requests, training_requests
from distrain.data.manifest import Manifest
from distrain.data.order import Order
from distrain.data.shards import Dataset, ShardWriter
from distrain.data.store import Store
from distrain.errors import RunError
from distrain.job import order_of

CPU = torch.device("cpu")


def open_set(url):
    store = Store(str(url))
    return Dataset(store, Manifest.load(store), memory=1 << 26, patience=0)


@pytest.fixture
def photos(tmp_path):
    """40 noisy colour images of 80 x 72, of several kinds of file; 4 of them do not decode."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(Store(str(tmp_path / "photos")), ("a", "b"), 80, 72, group_rows=6)
    from distrain.data.stats import PixelMoments

    moments = PixelMoments()
    for i in range(40):
        image = Image.fromarray(rng.integers(0, 256, (80, 72, 3), dtype=np.uint8))
        moments.add(np.asarray(image))
        file = io.BytesIO()
        kind, mode = [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("JPEG", "CMYK"), ("BMP", "RGB")][i % 5]
        image.convert(mode).save(file, kind)
        data = file.getvalue()
        writer.add({7: b"", 13: b"<html>", 20: data[: len(data) // 2], 31: data[:100]}.get(i, data), i % 2, str(i))
    writer.finish(moments.statistics())
    return tmp_path / "photos"


BAD = {7, 13, 20, 31}


def batches(config, dataset, requests, size):
    with Loader(config, dataset, dataset.manifest.statistics, requests, batch=size, device=CPU) as loader:
        return list(loader)


def training(config, dataset, steps=None):
    order = order_of(config, dataset.manifest.group_rows)
    hosted = range(config.virtual_workers)
    requests = training_requests(config, dataset, order, steps or range(2 * order.steps), hosted)
    return batches(config, dataset, requests, config.micro_batch)


def reference(dataset, sample, draws, i, crop):
    """The same transform in PIL and numpy, float64."""
    row = dataset.rows(np.array([sample]))[0]
    image = np.asarray(Image.open(io.BytesIO(bytes(row.data))).convert("RGB")).astype(np.float64)
    top, left = draws.start[i]
    window = image[top : top + crop, left : left + crop]
    if draws.mirror[i]:
        window = window[:, ::-1]
    statistics = dataset.manifest.statistics
    return ((window + draws.colour[i] - statistics.mean) / statistics.std).transpose(2, 0, 1)


def test_equals_the_numpy_reference(photos, narrow):
    dataset = open_set(photos)
    config = narrow(global_batch=10, virtual_workers=2, augment={"crop": 64, "colour": 0.3})
    order = order_of(config, dataset.manifest.group_rows)
    requests = list(training_requests(config, dataset, order, range(2 * order.steps), range(2)))
    found = batches(config, dataset, requests, 5)
    assert len(found) == len(requests) == 16
    seen = set()
    for batch, request in zip(found, requests, strict=True):
        assert (batch.cursor, batch.virtual_worker) == (request.cursor, request.virtual_worker)
        assert batch.images.shape == (5, 3, 64, 64)
        for i, sample in enumerate(batch.ids.tolist()):
            assert batch.labels[i] == sample % 2
            assert bool(batch.weights[i]) == (sample not in BAD)
            if sample in BAD:
                assert not batch.images[i].any(), "a placeholder is the all-zero normalised image"
            else:
                wanted = reference(dataset, sample, request.draws, i, 64)
                np.testing.assert_allclose(batch.images[i].numpy(), wanted, atol=5e-6)
                seen.add(bool(request.draws.mirror[i]))
    assert seen == {False, True}
    assert set().union(*(b.bad for b in found)) == BAD
    reasons = {k: v for b in found for k, v in b.bad.items()}
    assert "no image format" in reasons[7]
    assert "truncated" in reasons[20]


@pytest.mark.parametrize("change", [{"decode_threads": 1}, {"decode_threads": 5}, {"read_ahead": 5}, {"memory": 10}])
def test_operation_settings_change_no_bit(photos, narrow, change):
    dataset = open_set(photos)
    settings = {"global_batch": 12, "virtual_workers": 3, "augment": {"crop": 64}}
    plain = training(narrow(**settings), dataset)
    store = Store(str(photos))
    other = Dataset(store, Manifest.load(store), memory=change.get("memory", 1 << 20), patience=0)
    changed = training(narrow(**settings, data=change), other)
    for a, b in zip(plain, changed, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.weights, b.weights)
        assert np.array_equal(a.ids, b.ids)


def test_any_step_can_be_the_first(digits, narrow):
    dataset, config = open_set(digits / "train"), narrow()
    whole = training(config, dataset, range(30))
    later = training(config, dataset, range(17, 30))
    for a, b in zip(whole[17 * 4 :], later, strict=True):
        assert a.cursor == b.cursor
        assert torch.equal(a.images, b.images)


def test_evaluation_delivers_each_once(digits, narrow):
    dataset, config = open_set(digits / "val"), narrow(evaluate={"batch": 50})
    found = batches(config, dataset, evaluation_requests(config, dataset, 0, 1), 50)
    assert len(found) == 8
    ids = np.concatenate([b.ids[b.weights.numpy() > 0] for b in found])
    assert np.array_equal(ids, np.arange(359))
    last = found[-1]
    assert last.images.shape == (50, 3, 64, 64)
    assert int(last.weights.sum()) == 9
    assert not last.images[9:].any()


def test_a_storage_failure_reaches_the_caller_and_is_no_bad_sample(photos, narrow):
    path = photos / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    dataset = open_set(photos)
    config = narrow(global_batch=10, virtual_workers=2)
    with pytest.raises(RunError, match="is damaged"):
        training(config, dataset)


def test_closing_early_ends_the_thread(digits, narrow):
    dataset, config = open_set(digits / "train"), narrow()
    order = Order(dataset.manifest.group_rows, 0, 4, 16, 100)
    requests = training_requests(config, dataset, order, range(10_000), range(4))
    loader = Loader(config, dataset, dataset.manifest.statistics, requests, batch=16, device=CPU)
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)


def test_loaders_leave_no_threads(digits, narrow):
    """DALI's graph holds on to its source: it must be let go, or every evaluation leaks it."""
    dataset, config = open_set(digits / "val"), narrow()
    counts = []
    for _ in range(6):
        batches(config, dataset, evaluation_requests(config, dataset, 0, 1), 128)
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert counts[-1] <= counts[0] + 1, counts


def test_a_file_that_only_dali_refuses_is_one_sentence(tmp_path, narrow):
    """A header that the walk accepts and a body that DALI does not: its samples are named."""
    from distrain.data.decode import encode, jpeg_size
    from distrain.data.stats import Statistics

    pixels = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    good = encode(pixels, 90)
    broken = bytearray(good)
    table = good.index(b"\xff\xc4") + 5  # the code counts of the first Huffman table
    broken[table : table + 16] = b"\xff" * 16
    assert jpeg_size(np.frombuffer(bytes(broken), np.uint8)) == (72, 72)
    writer = ShardWriter(Store(str(tmp_path / "set")), ("a", "b"), 72, 72)
    for i in range(8):
        writer.add(bytes(broken) if i == 5 else good, i % 2, str(i))
    writer.finish(Statistics(np.zeros(3), np.eye(3)))
    config = narrow(global_batch=4, virtual_workers=1)
    with pytest.raises(
        RunError, match=r"files that do not decode, pack them again: 5 \(shard-00000.parquet row group 0 row 5\): "
    ):
        training(config, open_set(tmp_path / "set"), range(2))
