"""Freezing, rates by layer and weights of classes in a run: against plain torch, and what they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from narrow import loader_sections
from torch import nn

from distrain.data.batch import iter_training_requests
from distrain.data.loader import Loader
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.launch.dry_run import dry_run
from distrain.models.layers import micro_batch_context
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import train
from distrain.training.run_data import build_order

CPU = torch.device("cpu")
FROZEN = ("conv1", "norm1", "conv2", "norm2")
SCALES = {"fc8": 10, "fc8.bias": 3, "conv5": 0.5}
# Of three classes with 14, 13 and 13 samples; their mean over the samples is 1.
WEIGHTS = [1.0, 2.0, 4.0]
MEAN_WEIGHT = (14 * 1 + 13 * 2 + 13 * 4) / 40


@pytest.fixture
def config(narrow, tmp_path, damaged_set):
    """A run on noise, 5 steps an epoch of two virtual workers."""
    damaged_set(tmp_path / "train", bad=set())
    return narrow(
        global_batch=8,
        virtual_workers=2,
        data={"train": str(tmp_path / "train")},
        model={
            "name": "alexnet_bn",
            "width": 0.04,
            "dropout": 0.0,
            "freeze": list(FROZEN),
        },
        optimizer={"name": "sgd", "lr_scale": SCALES, "bias_lr": 2.0},
        loss={"name": "cross_entropy", "class_weights": WEIGHTS},
        schedule={"name": "constant", "lr": 0.01},
    )


def train_with_torch(config) -> nn.Module:
    """One step of plain autograd and torch's own SGD and weighted loss, on the same micro-batches."""
    model = config.model.build(3, config.seed)
    for name in FROZEN:
        layer = model.get_submodule(name).requires_grad_(False)
        if name.startswith("norm"):
            layer.train = lambda mode=True: None
            layer.training = False
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = 0.01 * (2.0 if name.endswith("bias") else 1.0)
        rate *= {"fc8.weight": 10, "fc8.bias": 3}.get(name, 1)
        rate *= 0.5 if name.startswith("conv5") else 1
        groups.append({"params": [parameter], "lr": rate})
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4)
    weights = torch.tensor(WEIGHTS) / MEAN_WEIGHT

    dataset = Dataset.open(config.data.train)
    order = build_order(config, dataset.manifest.rows_per_group)
    options = {"batch_size": 4, "device": CPU, "use_augmentation": True}
    requests = iter_training_requests(order, range(1), range(2))
    statistics = dataset.manifest.statistics
    sections = loader_sections(config)
    with Loader(dataset, statistics, requests, **sections, **options) as loader:
        for batch in loader:
            with micro_batch_context(0, 0, 0):
                logits = model(batch.images)
            loss = F.cross_entropy(logits, batch.labels, weights, reduction="sum")
            # By the number of samples, not by the sum of their weights.
            (loss / 8).backward()
    optimizer.step()
    return model


def test_a_step_equals_torchs(config, console):
    world = World(CPU)
    console.set_step = lambda step: world.stop_requested.set()
    config = config.model_copy(update={"epochs": 1})
    first = config.model.build(3, config.seed).state_dict()
    world.stop_requested.set()
    assert train(config, world, console).step == 1
    loaded = load_newest_checkpoint(Store(config.run))[0]
    found = loaded.model_state_dict
    for name, parameter in train_with_torch(config).named_parameters():
        if name.startswith(FROZEN):
            assert torch.equal(found[name], first[name]), name
        else:
            moved = (parameter - first[name]).norm()
            # Before normalization, a bias has a gradient of 0 but for rounding.
            assert moved > 1e-5 or name.startswith("conv"), name
            assert (found[name] - parameter).norm() < 1e-4 * moved + 1e-7, name


def test_what_is_frozen_stays_and_costs_nothing(config, console):
    """Bit for bit, running statistics too; it has no state, and less is reduced and saved."""
    assert train(config, World(CPU), console).step == 5
    loaded = load_newest_checkpoint(Store(config.run))[0]
    first = config.model.build(3, config.seed).state_dict()
    for name, tensor in first.items():
        is_equal = torch.equal(loaded.model_state_dict[name], tensor)
        assert is_equal == name.startswith(FROZEN), name
    stateful = {name.partition(":")[0] for name in loaded.optimizer_state_dict}
    parameters = dict(config.model.build(3, 0).named_parameters())
    assert stateful == {n for n in parameters if not n.startswith(FROZEN)}

    numbers = dry_run(config)
    total = sum(p.numel() for p in parameters.values())
    num_trained = sum(parameters[name].numel() for name in stateful)
    assert numbers["parameters"] == f"{total:,}, of which {num_trained:,} are trained"
    assert numbers["all-reduce per step"] == (
        f"{num_trained * 8 / 1000:.1f} kB per worker (exact)"
    )


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "optimizer",
            {"lr_scale": {"fc9": 2.0}},
            "optimizer.lr_scale has fc9, which no parameter's name begins with: use one "
            "of conv1, norm1, conv2, norm2, ",
        ),
        (
            "optimizer",
            {"lr_scale": {"conv1": 2.0}},
            "optimizer.lr_scale has conv1, all of which is frozen: remove it, or take it "
            "out of model.freeze",
        ),
        ("model", {"freeze": ("conv",)}, "model.freeze has conv, which no parameter's"),
        (
            "loss",
            {"class_weights": (1.0, 2.0)},
            "loss.class_weights has 2 weights, and the data set has 3 classes: give one "
            "per class, in the order that distrain inspect lists them in, or balanced",
        ),
        (
            "loss",
            {"class_weights": (0.0, 0.0, 0.0)},
            "loss.class_weights gives weight 0 to all samples: give",
        ),
    ],
)
def test_what_does_not_fit(config, console, section, changes, message):
    changed = getattr(config, section).model_copy(update=changes)
    with pytest.raises(UserError) as caught:
        train(config.model_copy(update={section: changed}), World(CPU), console)
    assert str(caught.value).startswith(message)
