"""Evaluation image by image: against torchvision, against what training reports, and on any number of ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import STATISTICS, picture
from sets import SetWriter
from torchvision.transforms import TenCrop

from distrain.config import override_config
from distrain.data.decoding.image import encode_ppm
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.inference.ensemble import CROPS
from distrain.inference.image_table import COLUMNS, ImageTable
from distrain.inference.scoring import evaluate_part
from distrain.inference.trained_model import (
    ModelOrigin,
    TrainedModel,
    open_trained_model,
)
from distrain.training.run_data import describe_model

CPU = torch.device("cpu")


def equal(a: ImageTable, b: ImageTable) -> bool:
    columns = all((getattr(a, c) == getattr(b, c)).all() for c in COLUMNS)
    return columns and a.bad_samples == b.bad_samples


def evaluate_in_parts(models, data, crops, world_size):
    """As so many workers do it, one after the other; their hardware is the same."""
    worlds = [World(CPU, rank, world_size, num_cores=2) for rank in range(world_size)]
    parts = [evaluate_part(models, data, CROPS[crops], world) for world in worlds]
    assert len({part.hardware_hash for part in parts}) == 1
    return ImageTable.merge([part.table for part in parts])


@pytest.fixture
def model(trained):
    return open_trained_model(str(trained.run))


@pytest.fixture
def val(digits):
    return str(digits / "val")


def test_the_result_is_that_which_training_reported(trained, val):
    for record in trained.records:
        model = open_trained_model(str(trained.run), checkpoint=record.step)
        result = evaluate_in_parts([model], val, "center", 1).summarize()
        reported = (record.top1_count, record.top5_count, record.samples, record.loss)
        assert reported == (
            result.top1_count,
            result.top5_count,
            result.num_samples,
            result.loss,
        )
    assert len(trained.records) == 2
    assert 72 < record.top1_count < 359


@pytest.mark.parametrize("crops", CROPS)
@pytest.mark.parametrize(
    "overrides",
    [["lanes=1"], ["lanes=3", "data.read_ahead=5", "data.decode_threads=3"]],
)
def test_workers_lanes_and_read_ahead_change_nothing(
    trained, model, val, crops, overrides
):
    alone = evaluate_in_parts([model], val, crops, 1)
    assert alone.sample_ids.tolist() == list(range(359))
    other = open_trained_model(str(trained.run), overrides=overrides)
    assert equal(alone, evaluate_in_parts([other], val, crops, 3))


def test_an_ensemble_of_one_network_twice_is_that_network(model, val):
    alone = evaluate_in_parts([model], val, "center", 1)
    twice = evaluate_in_parts([model, model], val, "center", 1)
    assert (alone.top_classes == twice.top_classes).all()
    assert (alone.ranks == twice.ranks).all()
    assert np.allclose(alone.top_probabilities, twice.top_probabilities, atol=1e-14)
    assert np.allclose(alone.losses, twice.losses, atol=1e-5)


def test_an_ensemble_averages_the_probabilities(trained, val):
    models = [
        open_trained_model(str(trained.run), checkpoint=record.step)
        for record in trained.records
    ]
    tables = [evaluate_in_parts([model], val, "center", 1) for model in models]
    both = evaluate_in_parts(models, val, "center", 2)
    backwards = evaluate_in_parts(models[::-1], val, "center", 1)
    assert equal(both, backwards)
    first = both.top_classes[:, :1]
    # Only where both have the class among their five highest.
    found = [(table.top_classes == first) for table in tables]
    rows = found[0].any(1) & found[1].any(1)
    assert rows.sum() > 200
    values = [
        (table.top_probabilities * where).sum(1)[rows]
        for table, where in zip(tables, found, strict=True)
    ]
    average = (values[0] + values[1]) / 2
    assert np.allclose(both.top_probabilities[rows, 0], average, atol=1e-12)


@pytest.fixture
def photographs(tmp_path):
    """Four raw images of 256 x 256, so that every decoder gives the same pixels."""
    writer = SetWriter(
        Store(str(tmp_path / "photos")),
        [f"class {i}" for i in range(10)],
        (256, 256),
        encoding="raw",
        proved=True,
    )
    pictures = [picture(i, 256, 256) for i in range(4)]
    for i, pixels in enumerate(pictures):
        writer.add(bytes(encode_ppm(pixels)), 3 - i, f"{i}.ppm")
    writer.finish(STATISTICS)
    return str(tmp_path / "photos"), pictures


@pytest.fixture
def alexnet(photographs, narrow):
    """The network of torchvision's form at full size, with the weights of a seed."""
    url, _ = photographs
    config = narrow(
        data={"train": url, "val": url, "backend": "torch"},
        augment={"crop": 224},
        model={"name": "alexnet"},
        evaluate={"batch": 2},
    )
    info = describe_model(config, Manifest.load(Store(url)))
    module = config.model.build(10, 3).eval()
    origin = ModelOrigin("runs/x", "step", 0, "", "exact", {})
    return TrainedModel(module, config, config, info, origin, "runs/x", ())


def test_ten_crops_equal_torchvision(alexnet, photographs):
    url, pictures = photographs
    table = evaluate_in_parts([alexnet], url, "ten", 2)
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    mean = torch.tensor(alexnet.info.mean)[:, None, None]
    std = torch.tensor(alexnet.info.std)[:, None, None]
    crops = torch.stack(TenCrop(224)((pixels - mean) / std))
    with torch.inference_mode():
        logits = torch.stack([alexnet.module(crop) for crop in crops])
    wanted = logits.softmax(2).mean(0)
    assert wanted.std() > 1e-4
    found = torch.from_numpy(table.top_probabilities)
    chosen = wanted.gather(1, torch.from_numpy(table.top_classes))
    assert (found - chosen).abs().max() < 1e-5
    labels = torch.from_numpy(table.labels)
    assert labels.tolist() == [3, 2, 1, 0]
    loss = -wanted.log().gather(1, labels[:, None])[:, 0]
    assert np.allclose(table.losses, loss, atol=1e-4)


def test_images_that_do_not_decode_are_left_out(model, tmp_path, damaged_set):
    damaged_set(tmp_path / "set", {3, 39}, classes=10)
    url = str(tmp_path / "set")
    table = evaluate_in_parts([model], url, "ten", 1)
    assert len(table.labels) == 40
    assert np.flatnonzero(~table.is_valid).tolist() == [3, 39]
    assert sorted(table.bad_samples) == [3, 39]
    assert table.summarize().num_samples == 38
    assert sorted(table.summarize().bad_samples) == [3, 39]


def test_classes_are_matched_by_name(model, tmp_path, digits):
    """A set of the last three classes, in another order."""
    names = ["9", "7", "8"]
    writer = SetWriter(Store(str(tmp_path / "few")), names, (72, 72))
    for i in range(3):
        writer.add(bytes(encode_ppm(picture(i, 72, 72))), i, f"{i}.ppm")
    writer.finish(STATISTICS)
    table = evaluate_in_parts([model], str(tmp_path / "few"), "center", 1)
    assert table.labels.tolist() == [9, 7, 8]


def test_other_classes_are_a_sentence(model, tmp_path, damaged_set):
    damaged_set(tmp_path / "set", set(), classes=12)
    with pytest.raises(UserError, match=r"class 10 of .*'10', is not one of the 10"):
        evaluate_in_parts([model], str(tmp_path / "set"), "center", 1)


def test_members_of_an_ensemble_with_classes_in_another_order(model, val):
    """Their outputs are matched by name."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    module = model.config.model.build(10, 0).eval()
    tensors = dict(model.module.state_dict())
    for name in ("classifier.6.weight", "classifier.6.bias"):
        tensors[name] = tensors[name][order]
    module.load_state_dict(tensors)
    info = replace(model.info, classes=tuple(str(i) for i in order))
    other = replace(model, module=module, info=info)
    alone = evaluate_in_parts([model], val, "center", 1)
    both = evaluate_in_parts([model, other], val, "center", 1)
    assert (alone.top_classes == both.top_classes).all()
    renamed = replace(other, info=replace(info, classes=tuple("abcdefghij")))
    with pytest.raises(UserError, match="class 0 of .*'a', is not one of"):
        evaluate_in_parts([model, renamed], val, "center", 1)


def test_members_of_another_precision_are_a_sentence(model, val):
    other = replace(model, config=override_config(model.config, ["precision=bf16"]))
    with pytest.raises(UserError, match="bf16.*fp32: set precision= for all"):
        evaluate_in_parts([model, other], val, "center", 1)


def test_progress_is_told_by_chunk(model, val):
    told = []
    world = World(CPU, 1, 2, num_cores=2)
    part = evaluate_part(
        [model], val, CROPS["ten"], world, lambda *counts: told.append(counts)
    )
    # Chunks of 50: this rank has the second, fourth, sixth and eighth.
    # In any order: the last one, of 9, may be done before another.
    counts = [done for done, _ in told]
    assert (counts[-1], len(counts)) == (159, 4)
    assert counts == sorted(counts)
    assert {total for _, total in told} == {159}
    assert len(part.table.labels) == 159
