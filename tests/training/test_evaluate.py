import pytest
import torch
from narrow import loader_sections
from torch import nn

from distrain.data.batch import iter_evaluation_requests
from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.distributed.lane_pool import LanePool
from distrain.distributed.world import World
from distrain.training.evaluate import evaluate, score_samples, sum_scores

CPU = torch.device("cpu")


class Probe(nn.Module):
    """Logits that depend on the image alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(10, 3 * 64 * 64, generator=torch.Generator().manual_seed(0))
            / 100
        )

    def forward(self, x):
        assert not self.training
        return x.flatten(1) @ self.weight.T


def score(config, digits, lanes):
    store = Store(str(digits / "val"))
    dataset = Dataset(
        store, Manifest.load(store), memory_bytes=1 << 26, retry_seconds=0
    )
    size = config.evaluate.batch
    requests = list(iter_evaluation_requests(dataset.manifest.num_rows, size, 0, 1))
    model = Probe().train()
    with (
        LanePool(lanes, 1, CPU) as pool,
        Loader(
            dataset,
            dataset.manifest.statistics,
            requests,
            **loader_sections(config),
            batch_size=size,
            device=CPU,
            use_augmentation=False,
        ) as batches,
    ):
        found = evaluate(config, World(CPU), model, batches, pool)
    assert model.training
    return found


@pytest.mark.parametrize("batch", [1, 50, 128, 359, 400])
def test_each_image_counts_once(narrow, digits, batch):
    found = score(narrow(evaluate={"batch": batch}), digits, 2)
    assert found.num_samples == 359
    plain = score(narrow(evaluate={"batch": 359}), digits, 1)
    assert (found.top1_count, found.top5_count) == (plain.top1_count, plain.top5_count)
    assert found.loss == pytest.approx(plain.loss, rel=1e-5)
    assert 0 < found.top1_count < found.top5_count < 359


def test_lanes_change_nothing(narrow, digits):
    assert score(narrow(), digits, 1) == score(narrow(), digits, 3)


def test_losses_that_no_integer_holds_are_counted_and_not_summed():
    losses = torch.tensor([1.5, -2.0, float("nan"), float("inf"), 2.0**31, -(2.0**40)])
    scores = score_samples(lambda *_: losses, torch.zeros(6, 3), torch.zeros(6).long())
    assert scores.fixed_losses.tolist() == [3 << 31, -(2 << 32), 0, 0, 0, 0]
    assert scores.is_finite.tolist() == [True, True, False, False, False, False]
    is_valid = torch.tensor([True, True, True, True, False, False])
    assert sum_scores(scores, is_valid).tolist() == [4, 4, 4, -(1 << 31), 2]
