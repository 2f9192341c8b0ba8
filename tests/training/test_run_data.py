"""Memory of the row groups that a run keeps, against what its machines have."""

import pytest
import torch

from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.trainer import train
from distrain.training import run_data
from distrain.training.run_data import explain_memory_excess

MIB = 1 << 20
CPU = torch.device("cpu")


class Ranks(World):
    """A rank that is told what others have gathered."""

    def all_gather_object(self, value):
        return self.ranks


@pytest.fixture
def world():
    def make(*ranks):
        world = Ranks(CPU)
        object.__setattr__(world, "ranks", [list(rank) for rank in ranks])
        return world

    return make


@pytest.fixture
def manifest(digits, monkeypatch):
    """Of a set of ten times 100 MiB."""
    monkeypatch.setattr(run_data, "_list_row_group_bytes", lambda _: [100 * MIB] * 10)
    return Manifest.load(Store(str(digits / "train")))


@pytest.mark.parametrize(
    ("memory", "ranks", "expected"),
    [
        ("256MiB", [("a", 600)], None),
        ("256MiB", [("a", 512)] * 2, None),
        ("256MiB", [("a", 511)] * 2, ("a", 2, 511)),
        # The limit of each machine counts, and of its ranks the smallest.
        ("256MiB", [("a", 600), ("b", 200), ("a", 600)], ("b", 1, 200)),
        ("256MiB", [("a", 600), ("a", 400), ("b", 600)], ("a", 2, 400)),
        # A rank keeps no more than the whole set.
        ("2GiB", [("a", 1000)], None),
        ("2GiB", [("a", 999)], ("a", 1, 999)),
    ],
)
def test_memory_of_all_ranks_of_a_machine_is_compared_with_its_limit(
    narrow, manifest, world, memory, ranks, expected
):
    config = narrow(data={"memory": memory})
    found = explain_memory_excess(
        config, manifest, world(*((name, mib * MIB) for name, mib in ranks))
    )
    if expected is None:
        assert found is None
        return
    name, num_ranks, mib = expected
    assert (
        f"more than {name} has ({mib * MIB:,} for all of its ranks, {num_ranks})"
        in found
    )
    assert f"lower it well below {mib * MIB // num_ranks:,}" in found


def test_a_warning_changes_no_bit(narrow, console, tmp_path, monkeypatch):
    first = narrow(run=str(tmp_path / "a"), global_batch=480)
    weights = train(first, World(CPU), console).weights
    assert not any("may be killed" in event for event in console.events)
    monkeypatch.setattr(run_data, "count_available_memory", lambda: 1000)
    second = narrow(run=str(tmp_path / "b"), global_batch=480)
    assert train(second, World(CPU), console).weights == weights
    assert sum("may be killed" in event for event in console.events) == 1
