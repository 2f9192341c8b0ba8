"""What the loader delivers, against plain numpy; that nothing but seed, epoch and sample matters; its life cycle."""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from narrow import loader_sections
from photos import STATISTICS, encoded, kinds, open_set, picture, write_set
from waiting import await_that

import distrain.data.loader
from distrain.data.batch import (
    BatchRequest,
    iter_evaluation_requests,
    iter_training_requests,
)
from distrain.data.decoding.augment import draw_augment_params, make_eval_params
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.image import decode_rgb, encode_ppm
from distrain.data.decoding.pil import PilDecoder
from distrain.data.loader import Loader
from distrain.data.order import Cursor, SampleOrder
from distrain.data.shards.dataset import Dataset
from distrain.errors import RunError
from distrain.rundir.checkpoint import hash_tensors
from distrain.training.run_data import build_order

CPU = torch.device("cpu")
KINDS = kinds()
RESIZED = {"crop": 64, "short_side": 72}
RANDOM_RESIZED = {"crop": 64, "short_side": 72, "window": "random_resized"}


def requests(ids, batch, epoch=0, virtual_worker=0):
    """Ids in chunks of `batch`, the last one padded."""
    ids = np.asarray(ids)
    for chunk, start in enumerate(range(0, len(ids), batch)):
        part = ids[start : start + batch]
        padding = batch - len(part)
        yield BatchRequest(
            Cursor(epoch, chunk),
            virtual_worker,
            np.append(part, [part[0]] * padding).astype(np.int64),
            padding,
        )


def deliver(config, dataset, requests, batch, augmented=True):
    options = {"batch_size": batch, "device": CPU, "use_augmentation": augmented}
    with Loader(
        dataset, STATISTICS, requests, **loader_sections(config), **options
    ) as loader:
        return list(loader)


def by_id(batches):
    """Image and weight of each sample; padding is left out."""
    found = {}
    for batch in batches:
        for i, sample in enumerate(batch.sample_ids.tolist()):
            if batch.sample_weights[i] or sample in batch.bad_samples:
                assert sample not in found, "delivered twice"
                found[sample] = batch.images[i].clone()
    return found


def hashed(batches):
    return hash_tensors({str(i): image for i, image in by_id(batches).items()})


def resampled(pixels, start, size, crop):
    """A window resized by a triangle filter as wide as the scale, in float64: what bilinear and antialiased mean."""
    image = pixels.astype(np.float64)
    for axis in (0, 1):
        scale, n = size[axis] / crop, image.shape[axis]
        support = max(scale, 1.0)
        centres = start[axis] + (np.arange(crop) + 0.5) * scale
        distance = np.abs(np.arange(n)[None] + 0.5 - centres[:, None]) / support
        weights = np.maximum(0, 1 - distance)
        weights /= weights.sum(1, keepdims=True)
        image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
    return image


def wanted(data, draws, i, crop, resize, seed_statistics=STATISTICS):
    """The same transform in numpy, float64; pixels in units of 0 to 255 before normalising, and normalised."""
    pixels = decode_rgb(data, 1 << 31)
    (top, left), size = draws.window_start[i], draws.window_size[i]
    if resize:
        window = resampled(pixels, draws.window_start[i], size, crop)
    else:
        window = pixels[
            int(top) : int(top) + crop, int(left) : int(left) + crop
        ].astype(np.float64)
    window = window[:, ::-1] if draws.mirror[i] else window
    return (
        (window + draws.color_shift[i] - seed_statistics.mean) / seed_statistics.std
    ).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("kinds") / "set", list(KINDS.values()))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """40 images of 80 x 72 that are known to decode."""
    files = [encoded(picture(i, 80, 72), quality=60 + i) for i in range(40)]
    return write_set(
        tmp_path_factory.mktemp("packed") / "set", files, (80, 72), proved=True
    )


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """40 JPEGs of various sizes that are known to decode."""
    files = [encoded(picture(i, 70 + 7 * i, 400 - 8 * i)) for i in range(40)]
    return write_set(tmp_path_factory.mktemp("photographs") / "set", files, proved=True)


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize(
    "augment", [RESIZED, RANDOM_RESIZED], ids=["short side", "random resized"]
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_file_equals_the_definition(
    every_kind, narrow, kind, augment, backend
):
    config = narrow(augment={**augment, "colour": 0.3}, data={"backend": backend})
    sample = list(KINDS).index(kind)
    (batch,) = deliver(config, every_kind, requests([sample], 1, epoch=3), 1)
    size = np.array([decode_rgb(KINDS[kind], 1 << 31).shape[:2]])
    draws = draw_augment_params(
        0,
        Cursor(3, 0),
        0,
        batch.sample_ids,
        size,
        config.augment,
        STATISTICS.compute_principal_axes(),
    )
    off = (
        batch.images[0].numpy() - wanted(KINDS[kind], draws, 0, 64, True)
    ) * STATISTICS.std[:, None, None]
    assert batch.sample_weights.all()
    # The result is rounded to bytes. PIL also rounds between the two axes.
    limit, mean = (2.0, 0.26) if backend == "dali" else (4.0, 0.5)
    assert np.abs(off).max() <= limit, np.abs(off).max()
    assert np.abs(off).mean() <= mean


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("normalise", ["loader", "device"])
@pytest.mark.parametrize("encoding", ["proved", "unproved", "raw"])
def test_a_window_without_resizing_is_exact(
    packed, tmp_path, narrow, encoding, normalise, backend
):
    files = [bytes(row.data) for row in packed.read_rows(np.arange(40))]
    stored = (
        [bytes(encode_ppm(decode_rgb(f, 1 << 31))) for f in files]
        if encoding == "raw"
        else files
    )
    options = {
        "proved": encoding != "unproved",
        "encoding": "raw" if encoding == "raw" else "jpeg",
    }
    dataset = write_set(tmp_path / "set", stored, (80, 72), **options)
    config = narrow(
        augment={"crop": 64, "colour": 0.3},
        data={"backend": backend, "normalise": normalise},
    )
    batches = deliver(config, dataset, requests(range(40), 7, epoch=5), 7)
    sizes = np.tile([80, 72], (40, 1))
    draws = draw_augment_params(
        0,
        Cursor(5, 0),
        0,
        np.arange(40),
        sizes,
        config.augment,
        STATISTICS.compute_principal_axes(),
    )
    assert set(draws.mirror) == {0, 1}
    found = by_id(batches)
    for i in range(40):
        np.testing.assert_allclose(
            found[i].numpy(), wanted(files[i], draws, i, 64, False), atol=5e-6
        )
    assert [int(n) for b in batches for n in b.labels[b.sample_weights > 0]] == [
        i % 3 for i in range(40)
    ]


def test_evaluation_takes_the_centre(packed, photographs, narrow):
    for dataset, augment, resize in (
        (packed, {"crop": 64}, False),
        (photographs, RESIZED, True),
    ):
        config = narrow(augment=augment, evaluate={"batch": 16})
        batches = deliver(
            config, dataset, iter_evaluation_requests(40, 16, 0, 1), 16, augmented=False
        )
        rows = dataset.read_rows(np.arange(40))
        draws = make_eval_params(
            np.array([row.image_size for row in rows]), config.augment
        )
        for i, image in by_id(batches).items():
            off = image.numpy() - wanted(bytes(rows[i].data), draws, i, 64, resize)
            assert np.abs(off * STATISTICS.std[:, None, None]).max() <= (
                1.0 if resize else 1e-3
            )
        last = batches[-1]
        assert last.images.shape == (16, 3, 64, 64)
        assert last.sample_weights.tolist() == [1.0] * 8 + [0.0] * 8
        assert not last.images[8:].any()


def test_decoding_a_slice_is_as_good_as_decoding_all(photographs, tmp_path, narrow):
    """The two graphs for files that are proved and files that are not."""
    files = [bytes(row.data) for row in photographs.read_rows(np.arange(40))]
    config = narrow(augment=RANDOM_RESIZED)
    slices, whole = (
        by_id(deliver(config, dataset, requests(range(40), 8), 8))
        for dataset in (photographs, write_set(tmp_path / "set", files))
    )
    for i in range(40):
        off = (slices[i] - whole[i]).numpy() * STATISTICS.std[:, None, None]
        assert np.abs(off).max() < 1.01
        assert (np.abs(off) > 0.5).mean() < 1e-3


@pytest.mark.parametrize("name", ["packed", "photographs", "every_kind"])
def test_no_bit_depends_on_anything_else(request, narrow, name):
    """Threads, batch sizes, the order in a batch, read-ahead, memory: a sample's pixels stay the same."""
    dataset = request.getfixturevalue(name)
    augment = {"crop": 64} if name == "packed" else RANDOM_RESIZED
    n = dataset.manifest.num_rows
    plain = by_id(deliver(narrow(augment=augment), dataset, requests(range(n), n), n))
    assert len(plain) == n
    rng = np.random.default_rng(0)
    for batch, threads, ahead in [
        (n, 1, 2),
        (n, 8, 2),
        (5, 3, 1),
        (48, 2, 5),
        (1, 4, 3),
        (7, 5, 2),
    ]:
        config = narrow(
            augment=augment, data={"decode_threads": threads, "read_ahead": ahead}
        )
        small = open_set(dataset.store.local_path, memory=10)
        found = by_id(
            deliver(config, small, requests(rng.permutation(n), batch), batch)
        )
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[i], plain[i]) for i in plain)


def test_another_process_gets_the_same_bits(photographs, narrow, plain_environment):
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_loader import *
from distrain.config import parse_config
schedule = {{"name": "constant", "lr": 1.0}}
config = parse_config({{"data": {{"train": "x"}}, "augment": {RESIZED}, "schedule": schedule}}, "test")
print(hashed(deliver(config, open_set({photographs.store.local_path!r}), requests(range(40), 9), 9)))
"""
    own = hashed(
        deliver(narrow(augment=RESIZED), photographs, requests(range(40), 40), 40)
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        check=True,
        env=plain_environment,
    )
    assert found.stdout.strip() == own


def training(config, dataset, steps, hosted=None):
    order = build_order(config, dataset.manifest.rows_per_group)
    wanted = iter_training_requests(
        order, steps, hosted or range(config.virtual_workers)
    )
    return deliver(config, dataset, wanted, config.micro_batch_size)


def test_any_step_can_be_the_first(packed, narrow):
    config = narrow(global_batch=12, virtual_workers=3)
    whole = training(config, packed, range(9))
    later = training(config, packed, range(5, 9))
    for a, b in zip(whole[5 * 3 :], later, strict=True):
        assert (a.cursor, a.virtual_worker) == (b.cursor, b.virtual_worker)
        assert torch.equal(a.images, b.images)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("draws", ["sample", "chunk"])
def test_any_number_of_ranks_delivers_the_same(photographs, narrow, ranks, draws):
    config = narrow(
        global_batch=20, virtual_workers=5, augment={**RESIZED, "draws": draws}
    )
    alone = {
        (b.cursor, b.virtual_worker): b.images
        for b in training(config, photographs, range(4))
    }
    spread = {}
    for rank in range(ranks):
        hosted = range(5 * rank // ranks, 5 * (rank + 1) // ranks)
        spread |= {
            (b.cursor, b.virtual_worker): b.images
            for b in training(config, photographs, range(4), hosted)
        }
    assert spread.keys() == alone.keys()
    assert all(torch.equal(spread[k], alone[k]) for k in alone)


def test_colour_is_one_shift_an_image_and_epoch(packed, narrow):
    """With colour and without: the difference is constant over an image, and differs between images and epochs."""
    shifts = []
    for epoch in (0, 1):
        plain, coloured = (
            by_id(
                deliver(
                    narrow(augment={"crop": 64, "colour": c}),
                    packed,
                    requests(range(40), 8, epoch),
                    8,
                )
            )
            for c in (0.0, 0.1)
        )
        for i in range(40):
            difference = (coloured[i] - plain[i]).reshape(3, -1)
            assert float(difference.std(1).max()) < 1e-5
            shifts.append(difference.mean(1).numpy() * STATISTICS.std)
    assert len({tuple(np.round(s, 4)) for s in shifts}) == 80
    sizes = np.tile([80, 72], (40, 1))
    draws = [
        draw_augment_params(
            0,
            Cursor(e, 0),
            0,
            np.arange(40),
            sizes,
            narrow().augment,
            STATISTICS.compute_principal_axes(),
        )
        for e in (0, 1)
    ]
    np.testing.assert_allclose(
        shifts, np.concatenate([d.color_shift for d in draws]), atol=1e-3
    )


@pytest.mark.parametrize("normalise", ["loader", "device"])
@pytest.mark.parametrize("augmented", [True, False])
def test_pixels_are_divided_by_the_scale(packed, narrow, normalise, augmented):
    """By the training set's deviations, or by one number, in evaluation too."""
    found = {}
    for scale in (None, 1.1):
        config = narrow(
            augment={"crop": 64, "scale": scale}, data={"normalise": normalise}
        )
        found[scale] = by_id(
            deliver(config, packed, requests(range(40), 8), 8, augmented=augmented)
        )
    for i in range(40):
        pixels = found[None][i].numpy() * STATISTICS.std[:, None, None]
        np.testing.assert_allclose(found[1.1][i].numpy() * 1.1, pixels, atol=1e-3)


def test_colours_in_variances(packed, narrow):
    """Along an axis of deviation s, the second shift is s / 255 times the first."""
    shifts = {}
    for unit in ("deviation", "variance"):
        plain = {"crop": 64, "colour_unit": unit}
        images = [
            by_id(
                deliver(
                    narrow(augment={**plain, "colour": c}),
                    packed,
                    requests(range(8), 8),
                    8,
                )
            )
            for c in (0.0, 0.1)
        ]
        shifts[unit] = np.array(
            [
                (images[1][i] - images[0][i]).mean((1, 2)).numpy() * STATISTICS.std
                for i in range(8)
            ]
        )
    inwards = {unit: shift @ STATISTICS.eigenvectors for unit, shift in shifts.items()}
    ratio = np.sqrt(STATISTICS.eigenvalues) / 255
    np.testing.assert_allclose(
        inwards["variance"], inwards["deviation"] * ratio, atol=2e-3
    )
    assert np.abs(inwards["variance"]).max() > 0.01


def test_a_storage_failure_reaches_the_caller_and_is_no_bad_sample(
    packed, tmp_path, narrow
):
    files = [bytes(row.data) for row in packed.read_rows(np.arange(40))]
    write_set(tmp_path / "set", files, (80, 72), proved=True)
    path = tmp_path / "set" / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RunError, match="is damaged"):
        training(
            narrow(global_batch=10, virtual_workers=2),
            open_set(tmp_path / "set"),
            range(4),
        )


def endless(dataset, narrow, **changes):
    order = SampleOrder(dataset.manifest.rows_per_group, 0, 2, 4, 100)
    options = {"batch_size": 4, "device": CPU, "use_augmentation": True}
    options |= loader_sections(narrow(**changes))
    return Loader(
        dataset,
        STATISTICS,
        iter_training_requests(order, range(100_000), range(2)),
        **options,
    )


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_closing_early_ends_the_thread(packed, narrow, backend):
    loader = endless(packed, narrow, data={"backend": backend})
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_ten_loaders_leave_no_thread_and_no_file(packed, narrow, backend):
    """DALI's graph holds on to its source; and no garbage collection, which is rare from Python 3.12 on."""

    def left() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    config = narrow(data={"backend": backend})
    deliver(
        config, packed, requests(range(40), 8), 8
    )  # libraries keep threads of their own from their first use on
    gc.collect()
    before = left()
    gc.disable()
    try:
        for _ in range(10):
            deliver(config, packed, requests(range(40), 8), 8)
        # A thread that has been joined is there for a moment still, and so are those that OpenMP had given it.
        await_that(
            lambda: all(n <= m for n, m in zip(left(), before, strict=True)),
            f"{before} again, not {left()}",
            10,
        )
    finally:
        gc.enable()


class OnGpu:
    """Stands in for a batch in DALI's memory on a GPU, and for torch's stream there: notes what is done, in order."""

    device = torch.device("cuda", 2)

    def __init__(self, calls):
        self.calls, self.memory = calls, torch.arange(6.0)

    def as_tensor(self):
        self.calls.append("dlpack")
        return self.memory

    def synchronize(self):
        self.calls.append("waited for")


def test_pixels_on_a_gpu_are_copied_before_dali_may_reuse_their_memory(monkeypatch):
    """On a stream of the loader's own, which is waited for; then torch's own stream is noted as the reader."""
    calls = []

    @contextmanager
    def on(stream):
        calls.append("on the loader's stream")
        yield
        calls.append("off it")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: f"torch's on {device}"
    )
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: calls.append(f"kept for {stream}"),
    )
    batch = OnGpu(calls)
    decoder = object.__new__(DaliDecoder)
    decoder._device, decoder._copy_stream, decoder._source_error = (
        batch.device,
        batch,
        None,
    )
    decoder._pipeline = SimpleNamespace(run=lambda: (batch,))
    found = decoder.decode_batch()
    batch.memory.zero_()  # as DALI does with a later batch
    assert found.tolist() == list(range(6))
    assert calls == [
        "on the loader's stream",
        "dlpack",
        "off it",
        "waited for",
        "kept for torch's on cuda:2",
    ]


@pytest.mark.parametrize(("said", "found"), [(3, 3), (None, 5)])
def test_all_cores_of_the_rank_decode_where_nobody_says_how_many(
    packed, narrow, monkeypatch, said, found
):
    started = []

    class Decoder(PilDecoder):
        def __init__(self, *arguments, num_threads, **options):
            started.append(num_threads)
            super().__init__(*arguments, num_threads=num_threads, **options)

    monkeypatch.setattr(distrain.data.loader, "PilDecoder", Decoder)
    config = narrow(data={"backend": "torch", "decode_threads": said})
    options = {"batch_size": 8, "device": CPU, "use_augmentation": True, "num_cores": 5}
    with Loader(
        packed, STATISTICS, requests(range(8), 8), **loader_sections(config), **options
    ) as loader:
        next(loader)
    assert started == [found]


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def test_memory_does_not_grow_over_batches_and_epochs(packed, narrow):
    with endless(packed, narrow) as loader:
        for _ in range(400):
            next(loader)
        before = resident()
        for _ in range(1200):
            next(loader)
        assert resident() - before < 8 << 20


def test_a_dataset_of_various_sizes_knows_them(photographs):
    assert isinstance(photographs, Dataset)
    assert photographs.manifest.image_size is None
    assert [row.image_size for row in photographs.read_rows(np.array([0, 39]))] == [
        (70, 400),
        (343, 88),
    ]
