"""What needs a GPU. `tests/bench/gpu.sh` runs these; none has run yet where distrain was written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from distrain.checkpoint import digest
from distrain.data import dali
from distrain.data.decode import ppm
from distrain.data.loader import Loader
from distrain.layers import micro_step
from distrain.losses import cross_entropy
from distrain.model import build
from distrain.sections import AlexNet, AlexNet2012, AlexNetBN
from distrain.train import train
from distrain.world import World, numerics

sys.path.insert(0, str(Path(__file__).parent / "data"))
from photos import STATISTICS, encoded, kinds, picture, write_set
from test_loader import by_id, requests, resident

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files of one size that were proved, files of many sizes and kinds that were not, and raw pixels."""
    folder = tmp_path_factory.mktemp("sets")
    files = [encoded(picture(i, 80, 72), quality=60 + i) for i in range(40)]
    raw = [bytes(ppm(picture(i, 80, 72))) for i in range(40)]
    various = [encoded(picture(i, 70 + 7 * i, 400 - 8 * i)) for i in range(40)]
    return {
        "packed": write_set(folder / "packed", files, (80, 72), proved=True),
        "raw": write_set(folder / "raw", raw, (80, 72), proved=True, encoding="raw"),
        "as-is": write_set(folder / "various", various, proved=True),
        "unproved": write_set(folder / "kinds", list(kinds().values())),
    }


RESIZED = {"crop": 64, "short_side": 72}
GEOMETRIES = {"packed": {"crop": 64}, "raw": {"crop": 64}, "as-is": RESIZED, "unproved": RESIZED}


def delivered(narrow, dataset, augment, device, batch=8, ids=None, **data):
    config = narrow(device="auto", augment=augment, data=data)
    ids = np.arange(dataset.manifest.rows) if ids is None else ids
    options = {"batch": batch, "device": device, "augmented": True}
    with Loader(config, dataset, STATISTICS, requests(ids, batch), **options) as loader:
        return {k: image.cpu() for k, image in by_id(list(loader)).items()}


@pytest.mark.parametrize("normalise", ["loader", "device"])
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_mixed_decode_is_close_to_the_cpus(narrow, sets, gpu, name, normalise):
    """nvJPEG's inverse DCT and chroma upsampling round in other places: a few of 255 levels."""
    cpu, mixed = (
        delivered(narrow, sets[name], GEOMETRIES[name], device, normalise=normalise)
        for device in (torch.device("cpu"), gpu)
    )
    assert cpu.keys() == mixed.keys()
    for i in cpu:
        off = (cpu[i] - mixed[i]).abs().numpy() * STATISTICS.std[:, None, None]
        assert off.mean() < 2.0, (i, off.mean())
    if name == "raw":
        assert max(float((cpu[i] - mixed[i]).abs().max()) for i in cpu) < 1e-5


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_no_bit_depends_on_batch_place_or_threads(narrow, sets, gpu, name):
    plain = delivered(narrow, sets[name], GEOMETRIES[name], gpu)
    n = sets[name].manifest.rows
    for batch, threads in ((8, 1), (n, 4), (5, 2), (1, 8)):
        ids = np.random.default_rng(batch).permutation(n)
        other = delivered(narrow, sets[name], GEOMETRIES[name], gpu, batch, ids, decode_threads=threads)
        assert all(torch.equal(plain[i], other[i]) for i in plain)


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_hardware_decoder_load(narrow, sets, gpu, monkeypatch, load, record_property):
    """Whether pixels depend on a sample's place: must not at the load that is used, is told for the others."""
    monkeypatch.setattr(dali, "HARDWARE_DECODER_LOAD", load)
    large = {"crop": 64}
    plain = delivered(narrow, sets["packed"], large, gpu, 40)
    moved = delivered(narrow, sets["packed"], large, gpu, 40, np.arange(40)[::-1].copy())
    same = all(torch.equal(plain[i], moved[i]) for i in plain)
    monkeypatch.setattr(dali, "HARDWARE_DECODER_LOAD", 0.0)
    cuda = delivered(narrow, sets["packed"], large, gpu, 40)
    record_property("independent of place", same)
    record_property("equal to the CUDA decoder", all(torch.equal(plain[i], cuda[i]) for i in plain))
    assert same or load != 0.0


def test_bad_files_survive_a_thousand_rebuilds(narrow, tmp_path, gpu):
    """Each is named, no good one changes, and neither the process nor the GPU's memory grows."""
    good = encoded(picture(0, 72, 72))
    broken = bytearray(good)
    table = good.index(b"\xff\xc4") + 5
    broken[table : table + 16] = b"\xff" * 16
    dataset = write_set(tmp_path / "set", [bytes(broken) if i % 4 == 3 else good for i in range(64)], (72, 72))
    config = narrow(device="auto")
    sizes = []
    for _ in range(64):
        dataset.bad.clear()
        options = {"batch": 4, "device": gpu, "augmented": False}
        with Loader(config, dataset, STATISTICS, requests(range(64), 4), **options) as loader:
            found = list(loader)
            assert loader.rebuilds == 16
        assert dataset.bad.keys() == set(range(3, 64, 4))
        assert all(torch.equal(b.images[0], found[0].images[0]) for b in found)
        free, total = torch.cuda.mem_get_info()
        sizes.append((resident(), total - free))
    for early, late in zip(sizes[16], sizes[-1], strict=True):
        assert late - early < 128 << 20, sizes[::8]


@pytest.mark.parametrize("network", [AlexNet(), AlexNet2012(), AlexNet2012(layers="paper"), AlexNetBN()], ids=str)
def test_a_micro_batch_repeats_its_bits(narrow, gpu, network):
    """Rule 12: 100 repeats after other shapes."""
    config = narrow(device="auto")
    with numerics(config, gpu):
        model = build(network, 1000, seed=0).to(gpu)
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(32, 3, 224, 224, generator=generator).to(gpu), torch.arange(32, device=gpu)
        hashes = set()
        for i in range(100):
            with micro_step(0, 0, 1):
                model(torch.zeros(1 + i % 7, 3, 224, 224, device=gpu))
            with micro_step(0, 0, 0):
                loss = cross_entropy(model(images), labels).sum()
            gradients = torch.autograd.grad(loss * 2.0**40, list(model.parameters()))
            hashes.add(digest({str(k): g for k, g in enumerate(gradients)}))
    assert len(hashes) == 1


def test_a_run_and_its_resume_give_the_same_weights(narrow, console, gpu, tmp_path):
    config = narrow(device="auto", epochs=2)
    whole = train(config.model_copy(update={"run": str(tmp_path / "whole")}), World(gpu), console).weights
    world = World(gpu)
    console.advance = lambda step: world.stop.set() if step == 17 else None
    assert train(config, world, console).status == "stopped"
    del console.advance
    assert train(config, World(gpu), console).weights == whole
