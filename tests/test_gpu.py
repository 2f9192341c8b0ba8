"""What needs a GPU. `tests/bench/gpu/sheet.sh` runs these there, with checks that take longer.

With SHEET_DEVICE=cpu in the environment they run on the CPU, so that they do not rot where there is no GPU.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from narrow import loader_sections

from distrain.data.decoding import dali
from distrain.data.decoding.image import encode_ppm
from distrain.data.loader import Loader
from distrain.distributed.world import World
from distrain.inference.predictor import Predictor
from distrain.launch.evaluation import evaluate
from distrain.trainer import train

sys.path.insert(0, str(Path(__file__).parent / "data"))
from photos import STATISTICS, encoded, kinds, picture, write_set
from test_loader import by_id, requests

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return torch.device(os.environ.get("SHEET_DEVICE", "cuda:0"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files of one size that were proved, files of many sizes and kinds that were not, and raw pixels."""
    folder = tmp_path_factory.mktemp("sets")
    files = [encoded(picture(i, 80, 72), quality=60 + i) for i in range(40)]
    raw = [bytes(encode_ppm(picture(i, 80, 72))) for i in range(40)]
    various = [encoded(picture(i, 70 + 7 * i, 400 - 8 * i)) for i in range(40)]
    return {
        "packed": write_set(folder / "packed", files, (80, 72), proved=True),
        "raw": write_set(folder / "raw", raw, (80, 72), proved=True, encoding="raw"),
        "as-is": write_set(folder / "various", various, proved=True),
        "unproved": write_set(folder / "kinds", list(kinds().values())),
    }


RESIZED = {"crop": 64, "short_side": 72}
GEOMETRIES = {
    "packed": {"crop": 64},
    "raw": {"crop": 64},
    "as-is": RESIZED,
    "unproved": RESIZED,
}


def delivered(narrow, dataset, augment, device, batch=8, ids=None, **data):
    config = narrow(device="auto", augment=augment, data=data)
    ids = np.arange(dataset.manifest.num_rows) if ids is None else ids
    options = {"batch_size": batch, "device": device, "use_augmentation": True}
    with Loader(
        dataset, STATISTICS, requests(ids, batch), **loader_sections(config), **options
    ) as loader:
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
    n = sets[name].manifest.num_rows
    for batch, threads in ((8, 1), (n, 4), (5, 2), (1, 8)):
        ids = np.random.default_rng(batch).permutation(n)
        other = delivered(
            narrow,
            sets[name],
            GEOMETRIES[name],
            gpu,
            batch,
            ids,
            decode_threads=threads,
        )
        assert all(torch.equal(plain[i], other[i]) for i in plain)


@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_hardware_decoder_load(narrow, sets, gpu, monkeypatch, load, record_property):
    """Whether pixels depend on a sample's place: must not at the load that is used, is told for the others."""
    monkeypatch.setattr(dali, "HARDWARE_DECODER_LOAD", load)
    large = {"crop": 64}
    plain = delivered(narrow, sets["packed"], large, gpu, 40)
    moved = delivered(
        narrow, sets["packed"], large, gpu, 40, np.arange(40)[::-1].copy()
    )
    same = all(torch.equal(plain[i], moved[i]) for i in plain)
    monkeypatch.setattr(dali, "HARDWARE_DECODER_LOAD", 0.0)
    cuda = delivered(narrow, sets["packed"], large, gpu, 40)
    record_property("independent of place", same)
    record_property(
        "equal to the CUDA decoder", all(torch.equal(plain[i], cuda[i]) for i in plain)
    )
    assert same or load != 0.0


def test_a_run_and_its_resume_give_the_same_weights(narrow, console, gpu, tmp_path):
    config = narrow(device="auto", epochs=2)
    whole = train(
        config.model_copy(update={"run": str(tmp_path / "whole")}), World(gpu), console
    ).weights
    world = World(gpu)
    console.set_step = lambda step: world.stop_requested.set() if step == 17 else None
    assert train(config, world, console).status == "stopped"
    del console.set_step
    assert train(config, World(gpu), console).weights == whole


def test_evaluation_and_prediction_give_what_training_reported(
    narrow, console, gpu, digits
):
    """Several passes, crops, and a lone image: on this device, the same bits."""
    config = narrow(
        device=gpu.type, data={"val": str(digits / "val")}, evaluate={"batch": 50}
    )
    reported = train(config, World(gpu), console).eval
    found = evaluate(config.run, console=console)
    counts = (found.result.top1_count, found.result.top5_count, found.result.loss)
    assert counts == (reported.top1_count, reported.top5_count, reported.loss)
    ten = [evaluate(config.run, crops="ten", console=console) for _ in range(2)]
    assert ten[0].to_dict() == ten[1].to_dict()
    # Decoding on a GPU may differ by the image's place in a batch; what follows not.
    predictor = Predictor(config.run)
    rows = [
        [p.probability for p in one.classes]
        for one in predictor.predict(digits / "val")
    ]
    assert np.allclose(rows, found.images.top_probabilities, atol=1e-3)
