"""Choices: each form complete and known everywhere, and forms of a user's own, each in one file."""

import json
import sys
from pathlib import Path

import pytest
import test_fake_gpu
import yaml
from safetensors.torch import load_file

from distrain.config import Config, parse_config, parse_config_yaml, to_yaml
from distrain.errors import UserError
from distrain.losses import L1, Hinge, Loss
from distrain.models.model import Model
from distrain.optim.schedule import Schedule
from distrain.optim.sgd import SGD
from distrain.optim.update_rule import UpdateRule
from distrain.result_fields import get_result_defaults, get_result_fields

LEAST = {
    "data": {"train": "x", "val": "y"},
    "schedule": {"name": "constant", "lr": 0.1},
}
KINDS = {"model": Model, "loss": Loss, "optimizer": UpdateRule, "schedule": Schedule}
NEEDED = {"step": {"drop_epochs": [1]}}

OWN = {
    "own_losses": '''
from distrain.fields import result_field
from distrain.losses import Loss

class Scaled(Loss):
    """Cross-entropy times a factor."""

    factor: float = result_field(1.0, gt=0)
    """What it is multiplied by. [result]"""

    def __call__(self, logits, labels):
        return -self.factor * logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
''',
    "own_optimizers": '''
from distrain.fields import result_field
from distrain.optim.update_rule import UpdateRule

class HeavyBall(UpdateRule):
    """Momentum as Polyak has it."""

    keep: float = result_field(0.9, ge=0, lt=1)
    """Share of the velocity that each step keeps. [result]"""

    def list_state_tensors(self):
        return ("velocity",)

    def update_group(self, group, lr, lr_ratio):
        for p, gradient, velocity in zip(group.parameters, group.gradients, group.state["velocity"]):
            velocity.mul_(self.keep).add_(gradient)
            p.sub_(lr * (velocity + group.weight_decay * p))
''',
    "own_schedules": '''
from distrain.optim.schedule import Schedule

class Halving(Schedule):
    """Half the rate after each epoch."""

    def compute_lr_factor(self, position):
        return 0.5 ** (position.step // position.steps_per_epoch)
''',
    "own_networks": """
from torch import nn

def tiny(classes, channels):
    layers = [nn.Conv2d(3, channels, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(channels * 64, classes)]
    return nn.Sequential(*layers)
""",
}


def forms():
    return [
        (section, name) for section, kind in KINDS.items() for name in kind.registry
    ]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with a file for each own form, where Python finds them."""
    for module, text in OWN.items():
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def problems(tree) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(tree, "test")
    return str(caught.value)


@pytest.mark.parametrize(("section", "name"), forms())
def test_every_form_comes_from_a_recipe_and_goes_back(section, name):
    """A form that lacks a method cannot be made at all."""
    tree = {
        **LEAST,
        section: {"name": name, "lr": 0.1} if section == "schedule" else {"name": name},
    }
    tree[section].update(NEEDED.get(name, {}))
    config = parse_config(tree, "test")
    form = getattr(config, section)
    assert type(form) is KINDS[section].registry[name]
    assert form.name == name
    assert parse_config_yaml(to_yaml(config), "test") == config


def test_every_form_is_tried_on_fake_gpus():
    for section, cases in (
        ("model", test_fake_gpu.MODELS),
        ("loss", test_fake_gpu.LOSSES),
        ("optimizer", test_fake_gpu.OPTIMIZERS),
    ):
        assert {case["name"] for case in cases} == set(KINDS[section].registry), section


@pytest.mark.parametrize(
    ("override", "section", "form"),
    [
        ("optimizer.momentum=0.95", "optimizer", "sgd"),
        ("loss.label_smoothing=0.1", "loss", "cross_entropy"),
        ("model.width=0.5", "model", "alexnet"),
    ],
)
def test_without_a_name_it_is_the_defaults_section(override, section, form):
    assert getattr(parse_config(LEAST, "test", [override]), section).name == form


def test_a_schedule_has_no_default():
    assert "schedule.name is missing: use one of constant, " in problems(
        {"data": {"train": "x"}, "schedule": {"lr": 0.1}}
    )


def test_what_is_no_section_is_a_sentence():
    assert problems({**LEAST, "loss": "hinge"}).endswith(
        "loss: must be a section, such as {name: hinge}, not 'hinge'"
    )
    assert "package.module:Class, not ['hinge']" in problems(
        {**LEAST, "loss": {"name": ["hinge"]}}
    )


def test_forms_of_ones_own_train_as_distrains_do(own, command, forked, few_digits):
    """One file each, named in a recipe: the weights are those of what they amount to, and a resume takes them over."""
    tree = {
        "epochs": 2,
        "global_batch": 64,
        "virtual_workers": 4,
        "data": {name: str(few_digits / name) for name in ("train", "val")},
        "augment": {"crop": 64},
        "model": {"name": "own_networks:tiny", "options": {"channels": 4}},
        "device": "cpu",
        "metrics": {"port": None},
    }
    mine = {
        "loss": {"name": "own_losses:Scaled", "factor": 1.0},
        "optimizer": {"name": "own_optimizers:HeavyBall", "weight_decay": 0.0},
        "schedule": {"name": "own_schedules:Halving", "lr": 0.01},
    }
    distrains = {
        "optimizer": {"name": "sgd", "weight_decay": 0.0},
        "schedule": {"name": "step", "lr": 0.01, "drop_epochs": [1], "factor": 0.5},
    }
    for name, sections in (("mine", mine), ("distrains", distrains)):
        (own / f"{name}.yaml").write_text(yaml.safe_dump({**tree, **sections}))
    run = command("train", "mine.yaml")
    other = forked("train", "distrains.yaml")
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert other.wait(300) == 0, other.err
    folders = [
        max((own / "runs" / name / "checkpoints").glob("step-*"))
        for name in ("mine", "distrains")
    ]
    found, wanted = (load_file(folder / "model.safetensors") for folder in folders)
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() < 1e-4 * tensor.abs().max(), name
    assert "0.weight:velocity" in load_file(folders[0] / "optimizer.safetensors")
    state = json.loads((folders[0] / "state.json").read_text())
    assert state["result"]["optimizer.keep"] == 0.9

    again = forked("train", "mine.yaml", "optimizer.keep=0.5")
    assert again.wait(300) == 2
    assert "optimizer.keep: 0.9 before, 0.5 now" in again.err


@pytest.mark.parametrize(
    ("section", "name", "text", "sentence"),
    [
        (
            "loss",
            "own:Half",
            "class Half(Loss): pass",
            "loss.name: own:Half does not implement __call__: Loss requires it",
        ),
        (
            "loss",
            "own:Other",
            "class Other: pass",
            "own:Other is not a subclass of distrain.losses.Loss: make it one",
        ),
        (
            "loss",
            "own:Half",
            "",
            "own:Half cannot be imported, since module own has no Half: check the name",
        ),
        (
            "loss",
            "own.py:Half",
            "",
            "own.py:Half cannot be imported: name the module, not its file, as "
            "own:Half, and start distrain in its folder",
        ),
        (
            "loss",
            "own:Half",
            "Loss.none",
            "own:Half cannot be imported: AttributeError: none",
        ),
        (
            "loss",
            "nowhere:Loss",
            "",
            "nowhere:Loss cannot be imported (ModuleNotFoundError: ",
        ),
        (
            "loss",
            "own:Half",
            "raise ZeroDivisionError(3)",
            "own:Half cannot be imported: ZeroDivisionError: 3",
        ),
        (
            "optimizer",
            "own:Loss",
            "",
            "own:Loss is not a subclass of distrain.optim.update_rule.UpdateRule: make it one",
        ),
    ],
)
def test_a_form_of_ones_own_that_is_none_is_a_sentence(
    tmp_path, monkeypatch, section, name, text, sentence
):
    (tmp_path / "own.py").write_text(f"from distrain.losses import Loss\n{text}\n")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert sentence in problems({**LEAST, section: {"name": name}})


def test_fields_of_a_form_of_ones_own_are_checked(own):
    text = problems(
        {**LEAST, "loss": {"name": "own_losses:Scaled", "factor": -1.0, "factr": 2.0}}
    )
    assert "loss.factor: must be greater than 0, not -1.0" in text
    assert "unknown key loss.factr; did you mean loss.factor?" in text


def test_two_forms_of_one_name_are_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="two classes are registered as l1"):

        class Again(L1, name="l1"):
            """Once more."""


def test_a_form_may_be_made_of_another(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from distrain.optim.sgd import SGD\n\n\nclass Calm(SGD):\n    momentum: float = 0.5\n"
    )
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    config = parse_config(
        {**LEAST, "optimizer": {"name": "own:Calm", "weight_decay": 0.1}}, "test"
    )
    assert (
        config.optimizer.name,
        config.optimizer.momentum,
        config.optimizer.weight_decay,
    ) == ("own:Calm", 0.5, 0.1)
    assert parse_config_yaml(to_yaml(config), "test") == config
    assert get_result_fields(config)["optimizer.momentum"] == 0.5, (
        "a field without a mark decides the weights"
    )
    assert UpdateRule.registry["sgd"] is SGD
    assert type(config.optimizer)().name == "own:Calm"


def test_fields_of_a_form_of_ones_own_may_be_marked_in_any_way(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "from pydantic import Field\nfrom distrain.losses import CrossEntropy\n\n\nclass Odd(CrossEntropy):\n"
        "    plain: list = Field(default_factory=list)\n    other: float = Field(2.0, json_schema_extra={'x': 1})\n"
    )
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    config = parse_config({**LEAST, "loss": {"name": "own:Odd", "plain": [1]}}, "test")
    assert {"loss.plain": [1], "loss.other": 2.0}.items() <= get_result_fields(
        config
    ).items()
    assert {"loss.plain": [], "loss.other": 2.0}.items() <= get_result_defaults(
        config
    ).items()


def test_distrains_own_by_its_place_has_its_own_name():
    assert (
        parse_config({**LEAST, "loss": {"name": "distrain.losses:Hinge"}}, "test").loss
        == Hinge()
    )


def test_a_form_that_no_other_process_can_import_is_refused():
    class Local(L1):
        """Inside of a function."""

    with pytest.raises(ValueError, match="cannot be imported by other processes"):
        Local()


def test_a_form_is_not_called_by_anothers_name():
    with pytest.raises(ValueError, match="name must be hinge, not 'l1': remove it"):
        Hinge(name="l1")


def test_forms_are_made_in_python_too():
    assert Hinge(margin=2.0).name == "hinge"
    config = Config.model_validate({**LEAST, "optimizer": SGD(momentum=0.5)})
    assert config.optimizer == SGD(momentum=0.5)
