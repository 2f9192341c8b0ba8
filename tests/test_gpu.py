"""What needs a GPU. `tests/bench/gpu.sh` runs these; none has run yet where distrain was written."""

import numpy as np
import pytest
import torch

from distrain.checkpoint import digest
from distrain.config import Model
from distrain.data.loader import Loader, training_requests
from distrain.data.manifest import Manifest
from distrain.data.shards import Dataset
from distrain.data.store import Store
from distrain.job import order_of
from distrain.losses import cross_entropy
from distrain.model import build, randomness
from distrain.train import train
from distrain.world import World, numerics

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    return torch.device("cuda", 0)


def batches(config, digits, device):
    store = Store(str(digits / "train"))
    dataset = Dataset(store, Manifest.load(store), memory=1 << 26, patience=0)
    requests = training_requests(order_of(config, dataset.manifest.group_rows), range(5), range(4))
    options = {"batch": config.micro_batch, "device": device, "augmented": True}
    with Loader(config, dataset, dataset.manifest.statistics, requests, **options) as loader:
        return [(batch.ids, batch.images.cpu(), batch.labels.cpu()) for batch in loader]


def test_mixed_decode_is_close_to_the_cpus(narrow, digits, gpu):
    config = narrow(device="auto")
    for (ids, images, labels), (ids2, images2, labels2) in zip(
        batches(config, digits, torch.device("cpu")), batches(config, digits, gpu), strict=True
    ):
        assert np.array_equal(ids, ids2)
        assert torch.equal(labels, labels2)
        assert float((images - images2).abs().mean()) < 0.02


def test_mixed_decode_repeats_its_bits(narrow, digits, gpu):
    config = narrow(device="auto")
    one, two = batches(config, digits, gpu), batches(config, digits, gpu)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["alexnet", "alexnet2012"])
def test_a_micro_batch_repeats_its_bits(narrow, gpu, name):
    """Rule 12: 100 repeats after other shapes."""
    config = narrow(device="auto")
    with numerics(config, gpu):
        model = build(Model(name=name), 1000, seed=0).to(gpu)
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.randn(32, 3, 224, 224, generator=generator).to(gpu), torch.arange(32, device=gpu)
        hashes = set()
        for i in range(100):
            with randomness(0, 0, 1):
                model(torch.zeros(1 + i % 7, 3, 224, 224, device=gpu))
            with randomness(0, 0, 0):
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
