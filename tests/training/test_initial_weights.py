"""Runs that start from weights of others: what they take, and how they resume without the file."""

import hashlib

import pytest
import torch
import torchvision

from distrain.config import load_config, override_config
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.alexnet import AlexNet
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.trainer import train
from distrain.training.initial_weights import read_initial_weights


def run(config, console):
    return train(config, World(torch.device("cpu")), console)


@pytest.fixture
def short(narrow, tmp_path, damaged_set):
    """Makes configs of runs on noise, 5 steps an epoch, with three classes."""
    damaged_set(tmp_path / "train", bad=set())

    def config(name, **changes):
        return narrow(
            run=str(tmp_path / name),
            global_batch=8,
            virtual_workers=2,
            data={"train": str(tmp_path / "train")},
            **changes,
        )

    return config


def stop_after(console, step):
    world = World(torch.device("cpu"))
    console.set_step = lambda done: (
        world.stop_requested.set() if done == step - 1 else None
    )
    return world


def write_weights(path, num_classes, seed=7, width=0.04):
    """Weights of a narrow alexnet, other than those of a run."""
    model = AlexNet(width=width).build(num_classes, seed)
    torch.save(model.state_dict(), path)
    return model.state_dict()


def first_weights(config, console):
    """Weights after a step that changes nothing."""
    tiny = override_config(config, ["schedule.lr=1e-30", "optimizer.weight_decay=0"])
    train(tiny, stop_after(console, 1), console)
    return load_newest_checkpoint(Store(tiny.run))[0].model_state_dict


def test_a_run_starts_from_the_file_with_a_new_head(short, console, tmp_path):
    given = write_weights(tmp_path / "given.pth", 1000)
    model = {"name": "alexnet", "width": 0.04, "init_from": str(tmp_path / "given.pth")}
    config = short("tuned", model=model, seed=3)
    found = first_weights(config, console)
    drawn = config.model.build(3, 3).state_dict()
    new = ("classifier.6.weight", "classifier.6.bias")
    for name in given:
        assert torch.equal(found[name], drawn[name] if name in new else given[name]), (
            name
        )
    assert (
        f"init: 14 tensors from {tmp_path}/given.pth; classifier.6.weight, "
        "classifier.6.bias are new: 3 classes, not 1000"
    ) in console.events


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_torchvisions_own_state_dicts(name, short, tmp_path):
    """Without its count of batches and its auxiliary classifiers."""
    options = {"init_weights": False} if name == "googlenet" else {}
    given = torchvision.models.get_model(name, num_classes=1000, **options).state_dict()
    torch.save(given, tmp_path / "given.pth")
    config = short(
        "tuned",
        model={
            "name": f"torchvision:{name}",
            "init_from": str(tmp_path / "given.pth"),
            "options": options,
        },
    )
    model = config.model.build(3, 0)
    found = read_initial_weights(config, model, ("a", "b", "c"))
    new = {"fc.weight", "fc.bias"}
    assert found.tensors.keys() == model.state_dict().keys() - new
    assert all(torch.equal(found.tensors[key], given[key]) for key in found.tensors)
    assert found.lines[-1].endswith("; fc.weight, fc.bias are new: 3 classes, not 1000")


def test_a_resume_does_not_need_the_file(short, console, tmp_path):
    """Stopped in the middle, it becomes what it would have become; the config has the hash."""
    path = tmp_path / "given.pth"
    write_weights(path, 5)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model = {"name": "alexnet", "width": 0.04, "init_from": str(path)}
    wanted = run(short("whole", model=model, epochs=2), console).weights
    drawn = run(short("drawn", epochs=2), console).weights
    assert wanted != drawn

    config = short("parts", model=model, epochs=2)
    assert train(config, stop_after(console, 3), console).status == "stopped"
    path.unlink()
    saved = load_config(tmp_path / "parts" / "config.yaml")
    assert (saved.model.init_from, saved.model.init_sha256) == (str(path), sha256)
    console.events.clear()
    for changed in (config, saved, override_config(config, ["model.init_from=null"])):
        assert run(changed, console).weights == wanted
    assert not any(event.startswith("init: ") for event in console.events)

    # A new run needs it.
    with pytest.raises(UserError, match=rf"no file at {path}: check the path"):
        run(short("again", model=model), console)


def test_the_best_checkpoint_of_a_run_gives_its_classes(short, console, tmp_path):
    """The same data: nothing is new. Its weights are those that the run ended with."""
    first = short("first")
    run(first, console)
    config = short(
        "second",
        model={"name": "alexnet", "width": 0.04, "init_from": first.run},
        seed=9,
    )
    found = first_weights(config, console)
    given = load_newest_checkpoint(Store(first.run))[0].model_state_dict
    assert all(torch.equal(found[name], given[name]) for name in given)
    (line,) = [event for event in console.events if event.startswith("init: ")]
    assert line == (
        f"init: 16 tensors from {first.run}/checkpoints/step-00000005-attempt-001/"
        "model.safetensors"
    )


def test_what_does_not_fit(short, console, tmp_path):
    path = tmp_path / "given.pth"
    write_weights(path, 3, width=0.1)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    model = {"name": "alexnet", "width": 0.04, "init_from": str(path)}

    def refuse(name="refused", **changes):
        with pytest.raises(UserError) as caught:
            run(short(name, **changes), console)
        return str(caught.value)

    # Another architecture.
    assert refuse(model=model).startswith(
        f"{path} has features.3.weight of shape (16, 8, 5, 5), not (8, 8, 5, 5): it is "
        "of another network"
    )
    # Another file than the config was made for.
    other = "0" * 64
    assert refuse(model={**model, "init_sha256": other}) == (
        f"model.init_sha256 is {other}, but {path} has {sha256}: use the file that the "
        "config was made for, or remove model.init_sha256"
    )
    hash_alone = {"name": "alexnet", "width": 0.04, "init_sha256": sha256}
    assert "model.init_sha256 is set, but model.init_from is not" in refuse(
        model=hash_alone
    )

    # A run that has started otherwise.
    run(short("drawn"), console)
    write_weights(path, 3)
    assert "started from drawn weights, and model.init_from is for the start" in refuse(
        "drawn", model=model
    )
    run(short("tuned", model=model), console)
    text = refuse("tuned", model={**model, "init_sha256": other})
    assert (
        f"model.init_sha256: '{hashlib.sha256(path.read_bytes()).hexdigest()}' " in text
    )


def test_another_url_is_not_read_by_a_resume_which_says_so(short, console, tmp_path):
    path = tmp_path / "given.pth"
    write_weights(path, 3)
    model = {"name": "alexnet", "width": 0.04, "init_from": str(path)}
    train(short("tuned", model=model), stop_after(console, 2), console)
    train(
        short("tuned", model={**model, "init_from": None}),
        stop_after(console, 4),
        console,
    )
    run(short("tuned", model={**model, "init_from": "elsewhere.pth"}), console)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [event for event in console.events if "is not read" in event]
    assert lines == [
        "model.init_from is not read, since the run has started from other weights (SHA-256 "
        f"{sha256})"
    ]


def test_a_new_head_must_be_trained(short, console, tmp_path):
    path = tmp_path / "given.pth"
    write_weights(path, 5)
    model = {"name": "alexnet", "width": 0.04, "init_from": str(path)}
    frozen = {**model, "freeze": ["features", "classifier.6.bias"]}
    with pytest.raises(UserError) as caught:
        run(short("tuned", model=frozen), console)
    assert str(caught.value) == (
        f"model.freeze includes classifier.6.bias, which {path} does not have for these "
        "classes, so that it would stay as it is drawn: leave it out of model.freeze"
    )
