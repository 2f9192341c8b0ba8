import shlex
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from distrain.config import (
    Config,
    format_workers_override,
    list_recipes,
    load_config,
    parse_config,
    parse_config_yaml,
    to_yaml,
)
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.fields import Choice
from distrain.losses import L1
from distrain.models.alexnet import AlexNet, AlexNetBN
from distrain.models.model import ImportedModel
from distrain.optim.schedule import CosineSchedule
from distrain.optim.sgd import SGD
from distrain.result_fields import _iterate_fields, get_result_fields

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LEAST = {"data": {"train": "somewhere"}, "schedule": {"name": "constant", "lr": 0.1}}


def sections(model: type[BaseModel]):
    yield model
    for info in model.model_fields.values():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Choice):
            for form in kind.list_classes():
                yield from sections(form)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from sections(kind)


def test_every_field_says_what_it_is():
    found = list(sections(Config))
    assert {SGD, L1, AlexNet, ImportedModel, CosineSchedule, Cluster} <= set(found)
    for section in found:
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name} has no docstring"
            if isinstance(info.json_schema_extra, dict):
                assert info.description.endswith(
                    f"[{info.json_schema_extra['decides']}]"
                ), name
            else:
                assert name in (
                    "data",
                    "augment",
                    "model",
                    "loss",
                    "optimizer",
                    "schedule",
                ) or issubclass(info.annotation, BaseModel), (
                    f"{section.__name__}.{name} is neither result nor operation"
                )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_load_and_come_back(recipe, tmp_path):
    config = load_config(recipe)
    assert config.run == f"runs/{recipe.stem}"
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


def test_recipes_load_by_name(tmp_path, monkeypatch):
    """A folder of that name does not matter; a file takes precedence."""
    monkeypatch.chdir(tmp_path)
    assert list_recipes() == sorted(path.stem for path in RECIPES)
    Path("hinge").mkdir()
    for recipe in RECIPES:
        assert load_config(recipe.stem) == load_config(recipe)
    Path("quickstart").write_text(
        "data: {train: mine}\nschedule: {name: constant, lr: 1}\n"
    )
    config = load_config("quickstart")
    assert (config.data.train, config.run) == ("mine", "runs/quickstart")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("quikstart", "did you mean quickstart?"),
        ("configs/alexnet2012-papers.yaml", "did you mean alexnet2012-paper?"),
        ("nothing", "check the path"),
        ("other/quickstart", "did you mean quickstart?"),
    ],
)
def test_an_unknown_recipe_gets_those_that_ship(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config(name)
    names = ", ".join(sorted(path.stem for path in RECIPES))
    assert str(caught.value) == (
        f"no recipe {name}: neither a file nor one that ships with distrain "
        f"({names}); {hint}"
    )


def test_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: {train: x}\nschedule: {name: constant, lr: 1e-3}\n")
    config = load_config(
        path,
        [
            "seed=5",
            "data.memory=2GiB",
            "schedule={name: step, lr: 1, drop_epochs: [3, 4]}",
            "run=s3://b/r",
        ],
    )
    assert (config.seed, config.data.memory, config.schedule.drop_epochs) == (
        5,
        2 << 30,
        (3, 4),
    )
    assert config.run == "s3://b/r"
    assert load_config(path).schedule.lr == 0.001


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("512", 512),
        ("1e9", 10**9),
        ("1.5k", 1500),
        ("2gb", 2 * 10**9),
        ("' 0.5 GiB '", 1 << 29),
        ("3EiB", 3 << 60),
    ],
)
def test_sizes(size, num_bytes):
    config = parse_config(LEAST, "test", [f"data.memory={size}"])
    assert config.data.memory == num_bytes


@pytest.mark.parametrize(
    "size",
    ["10%", "1,5GiB", "1.5.2GB", "2GiB/rank", "2Gbit", "2gigs", "abc", "64Gi", "0GiB"],
)
def test_a_size_is_read_as_a_whole_or_refused(size):
    text = problems(LEAST, [f"data.cache_bytes={size}"])
    sentence = f"must be a number of bytes or a size such as 64GiB, not '{size}'"
    assert text.endswith(f"override data.cache_bytes={size}: {sentence}")


@pytest.mark.parametrize("override", ["run=", "run=null", "run=~"])
def test_an_override_with_null_names_the_run_by_its_recipe(tmp_path, override):
    path = tmp_path / "a.yaml"
    path.write_text("run: x\ndata: {train: x}\nschedule: {name: constant, lr: 1}\n")
    assert load_config(path).run == "x"
    assert load_config(path, [override]).run == "runs/a"
    # Training refuses an empty name.
    assert load_config(path, ["run=''"]).run == ""


@pytest.mark.parametrize("run", ["20241127", "a #1", "null", "s3://b/r"])
def test_the_run_of_a_config_text_is_replaced_as_it_is(run):
    text = "run: x\ndata: {train: x}\nschedule: {name: constant, lr: 1}\n"
    assert parse_config_yaml(text, "test", run=run).run == run
    assert parse_config_yaml(text, "test", ["run=null"], run=run).run == run
    assert parse_config_yaml(text, "test").run == "x"


@pytest.mark.parametrize("overrides", ["epochs=1", {"epochs": 1}, [1], None, 3])
def test_overrides_that_are_no_list_of_texts(overrides):
    remedy = "must be a list of texts of the form key.sub=value: use, for example, "
    with pytest.raises(UserError, match=remedy):
        load_config("quickstart", overrides)


def test_wrong_overrides_keep_the_secrets_of_a_url():
    with pytest.raises(UserError, match=r"overrides \.\.\. must be") as caught:
        load_config("quickstart", {"data.train": "s3://key:secret@b/train"})
    assert "secret" not in str(caught.value)


def problems(tree, overrides=()):
    with pytest.raises(UserError) as caught:
        parse_config(tree, "test", overrides)
    return str(caught.value)


def test_all_problems_at_once():
    text = problems(
        {
            "epochz": 3,
            "seed": True,
            "global_batch": 10,
            "virtual_workers": 4,
            "threads": 2,
            "data": {"train": "x", "vall": "y"},
            "augment": {"crop": 20},
            "schedule": {"name": "constant", "lr": -1.0},
        }
    )
    assert "has 7 problems" in text
    assert "unknown key epochz; did you mean epochs?" in text
    assert "unknown key data.vall; did you mean data.val?" in text
    assert "seed: must be an integer, not True" in text
    assert "virtual_workers: 4 does not divide global_batch = 10: use 5" in text
    assert "model: alexnet needs augment.crop of at least 63 pixels, not 20" in text
    assert "reduction: exact mode needs threads = 1" in text
    assert "schedule.lr: must be greater than 0" in text


def test_a_crop_that_is_larger_than_the_resized_image():
    text = problems({**LEAST, "augment": {"crop": 224, "short_side": 200}})
    assert "augment.short_side: 200 is less than augment.crop = 224: raise it" in text


def test_two_documents_in_one_recipe(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("epochs: 1\n---\nepochs: 2\n")
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert str(raised.value) == (
        f"{path} is not valid YAML: line 2, column 1: expected a single document in "
        "the stream, but found another document"
    )


def test_a_key_of_a_recipe_with_a_dot_in_its_name():
    text = problems({**LEAST, "optimizer.momentum": 0.9})
    assert text.endswith(
        "optimizer.momentum is a key with a dot in its name, as overrides have: write "
        "momentum below optimizer"
    )
    text = problems({**LEAST, "optimizer": {"name": "sgd"}, "optimizer.momentum": 0.9})
    assert "write momentum below optimizer" in text
    text = problems({**LEAST, "data.nix": 0.9})
    assert "unknown key data.nix" in text


def test_keys_of_the_other_kind_and_unknown_names():
    text = problems(
        {
            **LEAST,
            "optimizer": {"name": "adam", "momentum": 0.9},
            "loss": {"name": "cross"},
        }
    )
    assert "optimizer.momentum is not a setting of optimizer adam" in text
    known = "cross_entropy, hinge, huber, l1, l2, smooth_l1, package.module:Class"
    assert f"loss.name: must be one of {known}, not 'cross'" in text
    text = problems(
        {**LEAST, "schedule": {"name": "cosin"}, "model": {"name": "alexnet3"}}
    )
    known = (
        "constant, cosine, geometric, plateau, polynomial, step, package.module:Class"
    )
    assert f"schedule.name: must be one of {known}, not 'cosin'" in text
    known = (
        "alexnet, alexnet2012, alexnet_bn, torchvision:NAME, package.module:callable"
    )
    assert f"model.name: must be one of {known}, not 'alexnet3'" in text
    text = problems(
        {
            **LEAST,
            "optimizer": {"name": "adam", "trust": 0.001},
            "model": {"lrn": "paper"},
        }
    )
    assert "optimizer.trust is not a setting of optimizer adam: remove it" in text
    assert "model.lrn is not a setting of model alexnet: remove it" in text
    text = problems(
        {**LEAST, "model": {"name": "torchvision:resnet50", "width": 0.5, "lrm": 1}}
    )
    assert (
        "model.width is not a setting of model torchvision:resnet50: remove it" in text
    )
    # lrn is a key of alexnet2012 alone.
    assert "unknown key model.lrm: remove it (distrain schema lists all keys)" in text
    text = problems({**LEAST, "loss": {"name": "hinge", "label_smoothing": 0.1}})
    assert "loss.label_smoothing is not a setting of loss hinge: remove it" in text
    text = problems(
        {**LEAST, "optimizer": {"name": "sgd", "nesterov": True, "momentum": 0.0}}
    )
    assert "nesterov needs momentum" in text
    text = problems(
        {**LEAST, "optimizer": {"name": "sgd", "nesterov": True, "form": "paper"}}
    )
    assert "the paper's form has no nesterov" in text
    text = problems({**LEAST, "loss": {"name": "hinge", "one_vs_rest": True}})
    assert "one_vs_rest belongs to form = binary" in text


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["optimizer.lr=0.1"],
            "override optimizer.lr=0.1: unknown key optimizer.lr; did you mean schedule.lr?",
        ),
        (
            ["trainer.x=1"],
            "override trainer.x=1: unknown key trainer: remove it (distrain schema lists all keys)",
        ),
        (
            ["schedule.lr=1", "schedule={name: constant}"],
            "override schedule={name: constant}: schedule.lr is missing: "
            "set it in the recipe, or as schedule.lr=...",
        ),
        (
            ["seed=1", "seed=x"],
            "override seed=x: must be an integer, not 'x'",
        ),
        (
            ["loss={name: cross}"],
            "override loss={name: cross}: loss.name: must be one of cross_entropy, hinge, "
            "huber, l1, l2, smooth_l1, package.module:Class, not 'cross'",
        ),
        # A check of a field that the override did not set.
        (
            ["epochs=2", "global_batch=100"],
            "override global_batch=100: virtual_workers: 8 does not divide "
            "global_batch = 100: use 10, or another global_batch",
        ),
        (
            ["reduction.fraction_bits=40", "threads=2", "lanes=3"],
            "override threads=2: reduction: exact mode needs threads = 1, not 2, since "
            "gradients differ between thread counts: raise lanes (micro-batches "
            "computed side by side) to use more cores",
        ),
        (
            ["optimizer.momentum=0", "optimizer.nesterov=true"],
            "override optimizer.nesterov=true: nesterov needs momentum: raise it, or "
            "remove nesterov",
        ),
    ],
)
def test_an_override_is_named_by_the_problem_that_it_causes(overrides, problem):
    text = problems(LEAST, overrides)
    assert text == f"test with its overrides has 1 problem:\n  - {problem}"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        # The message names the cause in its remedy.
        (
            ["data.val=null", "schedule.lr=1"],
            "override data.val=null: schedule: plateau follows the validation error: "
            "set data.val",
        ),
        (
            ["data.val=x", "augment={crop: 20}", "epochs=2"],
            "override augment={crop: 20}: model: alexnet needs augment.crop of at "
            "least 63 pixels, not 20",
        ),
        # Only the remedy names lanes, on which the check does not depend.
        (
            ["lanes=2", "data.val=x", "threads=2", "lanes=3"],
            "override threads=2: reduction: exact mode needs threads = 1, not 2, since "
            "gradients differ between thread counts: raise lanes (micro-batches "
            "computed side by side) to use more cores",
        ),
        (
            ["data={train: x, val: y}", "loss={name: hinge, form: binary}",
             "loss.one_vs_rest=true", "loss.form=crammer_singer"],
            "override loss.form=crammer_singer: loss.one_vs_rest: one_vs_rest belongs "
            "to form = binary: remove it, or set that form",
        ),
    ],
)  # fmt: skip
def test_a_check_across_fields_names_the_last_override_of_its_fields(
    overrides, problem
):
    tree = {**LEAST, "schedule": {"name": "plateau", "lr": 0.1}}
    text = problems(tree, overrides)
    assert text == f"test with its overrides has 1 problem:\n  - {problem}"


def test_a_problem_of_the_file_is_not_an_overrides():
    text = problems({**LEAST, "epochz": 3, "seed": -1}, ["epochs=0", "lanes=1"])
    assert text.splitlines()[1:] == [
        "  - seed: must be greater than or equal to 0, not -1",
        "  - override epochs=0: must be greater than or equal to 1, not 0",
        "  - unknown key epochz; did you mean epochs?",
    ]
    tree = {**LEAST, "threads": 2}
    assert "  - reduction: exact" in problems(tree, ["reduction.fraction_bits=40"])
    tree = {**LEAST, "optimizer": {"momentum": 0.0, "nesterov": True}}
    assert "  - optimizer.nesterov: " in problems(tree, ["optimizer.form=torch"])
    assert "override optimizer.momentum=0: optimizer.nesterov: nesterov needs" in (
        problems(tree, ["optimizer.momentum=0"])
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data=a/b", "must be a section of keys, such as data.train, not 'a/b'"),
        ("log=true", "must be a section of keys, such as log.every, not True"),
        ("schedule.drop_epochs=16", "must be a list, such as [16], not 16"),
        ("schedule.drop_epochs=1,2", "must be a list, such as [1,2], not '1,2'"),
        ("checkpoint.every=10s", "must be an integer, not '10s'"),
        ("cluster.wait=30min", "must be a number, not '30min'"),
        ("augment.mirror=1", "must be true or false, not 1"),
        ("run=3", "must be a text, not 3"),
        ("precision=fp8", "must be 'fp32', 'tf32' or 'bf16', not 'fp8'"),
    ],
)
def test_values_of_a_wrong_type(override, problem):
    schedule = {"name": "step", "lr": 0.1, "drop_epochs": [1]}
    text = problems({**LEAST, "schedule": schedule}, [override])
    assert text.endswith(f"\n  - override {override}: {problem}")


def test_a_missing_section_gets_an_example_that_works():
    lines = problems({"epochs": 1}).splitlines()[1:]
    examples = []
    for line, key in zip(lines, ("data", "schedule"), strict=True):
        problem, example = line.split(", or as ")
        assert problem == f"  - {key} is missing: set it in the recipe"
        examples += shlex.split(example)
    assert parse_config({"epochs": 1}, "test", examples).schedule.name == "constant"


def test_an_override_that_the_shell_split_is_one_problem():
    override = "schedule={name: plateau, lr: 0.1}"
    for split, whole in ((override, override), ("run=x a.b=[1, 2] c=3", "a.b=[1, 2]")):
        with pytest.raises(UserError) as refused:
            parse_config(LEAST, "test", split.split())
        assert str(refused.value) == (
            f"the shell splits an override at its spaces: put it in quotes, '{whole}'"
        )
    # These are two overrides, each wrong.
    text = problems(LEAST, ["schedule={name: step", "log={every: 1}", "x}"])
    assert "2 problems" in text
    assert "is not valid YAML" in text


@pytest.mark.parametrize(
    ("section", "override", "remedy", "name"),
    [
        (
            {"optimizer": {"momentum": 0.9}},
            "optimizer.name=adam",
            "optimizer={name: adam}",
            "adam",
        ),
        (
            {"schedule": {"name": "step", "lr": 1e-3, "drop_epochs": [1], "factor": 0.5}},
            "schedule.name=cosine",
            "schedule={name: cosine, lr: 0.001}",
            "cosine",
        ),
        (
            {"model": {"name": "alexnet2012", "lrn": "paper", "layers": "paper"}},
            "model.name=torchvision:resnet18",
            'model={name: "torchvision:resnet18"}',
            "torchvision:resnet18",
        ),
    ],
)  # fmt: skip
def test_keys_of_the_recipe_that_an_overrides_choice_lacks(
    section, override, remedy, name
):
    """They cannot be removed by an override: the message has one that works."""
    tree = {**LEAST, **section}
    text = problems(tree, [override])
    assert text.endswith(f"replace the section, with '{remedy}' instead of {override}")
    (key,) = section
    # One remedy, however many keys are left over.
    assert "1 problem:" in text
    assert all(f"{key}.{k}" in text for k in set(section[key]) - {"name", "lr"})
    assert getattr(parse_config(tree, "test", [remedy]), key).name == name


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        ("x", "--workers x is not a number of workers: use auto, N (at least 1) or "),
        ("0", "--workers 0 is not a number of workers: use auto"),
        ("1-2-3", "--workers 1-2-3 is not a number of workers: use auto"),
        ("4-2", "--workers 4-2 has a minimum above its maximum: use --workers 2-4"),
        ("9", "\n  - --workers 9: workers = 9 is more than virtual_workers = 8, so "),
        ("1-9", "\n  - --workers 1-9: workers = 9 is more than virtual_workers = 8"),
    ],
)
def test_the_option_workers_is_named_as_typed(workers, problem):
    with pytest.raises(UserError) as caught:
        parse_config(LEAST, "test", format_workers_override(workers))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("workers", "parsed"),
    [(None, "auto"), ("auto", "auto"), ("3", (3, 3)), ("2-4", (2, 4)), ("02", (2, 2))],
)
def test_the_option_workers(workers, parsed):
    overrides = format_workers_override(workers)
    assert parse_config(LEAST, "test", overrides).cluster.workers == parsed


def test_what_is_not_a_config(tmp_path):
    with pytest.raises(UserError, match="none.yaml: neither a file nor .* check the"):
        load_config(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(bad)
    bad.write_bytes(b"\x80\xff")
    with pytest.raises(UserError, match="bad.yaml is not a recipe, since .* in UTF-8"):
        load_config(bad)
    bad.write_text("- 1\n")
    with pytest.raises(UserError, match="must hold lines of the form"):
        load_config(bad)
    bad.write_text("data: {train: x}\nschedule: {name: constant, lr: 1}\n")
    with pytest.raises(UserError, match="not of the form"):
        load_config(bad, ["seed"])
    with pytest.raises(UserError, match="train is a value, not a section"):
        load_config(bad, ["data.train.x=1"])


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("epochs: 90\nepochs: 2\n", "line 2, column 1: epochs is set twice (first in line 1)"),
        ("log:\n  every: 1\n\n  every: 1\n", "line 4, column 3: every is set twice (first in line 2)"),
        ("log: {every: 1, every: 2}\n", "line 1, column 17: every is set twice (first in line 1)"),
    ],
)  # fmt: skip
def test_a_key_that_is_set_twice_is_refused(text, place):
    with pytest.raises(UserError) as refused:
        parse_config_yaml(text, "dup.yaml")
    assert str(refused.value) == f"dup.yaml is not valid YAML: {place}"


def test_a_key_that_a_merge_brings_may_be_set_again():
    text = "schedule: &s {name: constant, lr: 1}\ndata: {<<: {train: x}, train: y}\n"
    assert parse_config_yaml(text, "test").data.train == "y"


def test_result_fields_are_the_ones_that_decide():
    fields = get_result_fields(parse_config(LEAST, "test"))
    for key in ("seed", "virtual_workers", "global_batch", "data.fingerprint", "model.width", "optimizer.momentum",
                "schedule.lr", "precision", "reduction.mode", "threads", "loss.name", "augment.crop"):  # fmt: skip
        assert key in fields, key
    for key in (
        "run",
        "data.train",
        "data.decode_threads",
        "data.memory",
        "lanes",
        "device",
        "log.every",
        "checkpoint.keep",
    ):
        assert key not in fields, key
    assert set(fields) < {
        key for key, _ in _iterate_fields(parse_config(LEAST, "test"))
    }


def test_frozen():
    config = parse_config(LEAST, "test")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


@pytest.mark.parametrize("key", ["data.train", "data.val", "run", "log.mlflow"])
@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hunter2@host/data",
        "https://host/data?X-Amz-Signature=hunter2",
        "http://h?password=hunter2",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_shown(key, url):
    for overrides in ([f"{key}={url}"], [f"{key}={url}", "data.x=1"]):
        with pytest.raises(UserError, match="the URL holds a secret") as refused:
            parse_config({**LEAST}, "test", overrides)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.val=[s3://u:hunter2@b]", "override data.val=...: must be a text, not ..."),
        ("data.train.x=s3://u:hunter2@b", "override ...: train is a value, not a section"),
        ("s3://u:hunter2@b", "override ... is not of the form key.sub=value"),
        ("s3://u:hunter2@b=1", "override ...=1: unknown key ...: remove it (distrain schema lists all keys)"),
        ("data.val=[s3://u:hunter2@b", "override ... is not valid YAML: line 1, column 18: "
         "expected ',' or ']', but got '<stream end>'"),
        ("data.val=!s3://u:hunter2@b x", "override ... is not valid YAML: ..."),
        ("schedule=s3://u:hunter2@b", "override schedule=...: must be a section, not ..."),
        ("cluster.workers=s3://u:hunter2@b", "override cluster.workers=...: must be auto, "
         "a number of at least 1, or [minimum, maximum], not ..."),
        ("loss.name=s3://u:hunter2@b", "override loss.name=...: must be one of cross_entropy, hinge, huber, "
         "l1, l2, smooth_l1, package.module:Class, not ..."),
    ],
)  # fmt: skip
def test_no_message_shows_a_url_which_may_hold_a_secret(override, problem):
    text = problems(LEAST, [override])
    assert text == f"test with its overrides has 1 problem:\n  - {problem}"


def test_an_excerpt_of_yaml_with_a_secret_is_not_shown(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"data: [s3://u:{'x' * 80}hunter2@b }}\n")
    with pytest.raises(UserError, match="is not valid YAML") as bad:
        load_config(path)
    assert "hunter2" not in str(bad.value)


def test_event_files_are_on_a_disk():
    with pytest.raises(UserError, match="tensorboard needs a run directory on a disk"):
        parse_config({**LEAST}, "test", ["run=s3://bucket/run", "log.tensorboard=true"])
    parse_config({**LEAST}, "test", ["run=file:///run", "log.tensorboard=true"])


def test_a_model_without_a_name_is_alexnet():
    assert parse_config({**LEAST, "model": {"width": 0.5}}, "test").model == AlexNet(
        width=0.5
    )
    assert (
        parse_config({**LEAST, "model": {"name": "alexnet_bn"}}, "test").model
        == AlexNetBN()
    )
    tree = {**LEAST, "model": {"name": "torchvision:googlenet"}}
    overrides = ["model.options.aux_logits=false", "model.options.dropout=0.1"]
    assert parse_config(tree, "test", overrides).model.options == {
        "aux_logits": False,
        "dropout": 0.1,
    }


def test_weights_are_not_an_option_of_torchvisions_networks():
    tree = {**LEAST, "model": {"name": "torchvision:resnet18"}}
    for override in (
        "model.options={weights: DEFAULT}",
        "model.options.weights=DEFAULT",
    ):
        assert problems(tree, [override]).endswith(
            f"override {override}: torchvision's weights are not downloaded by a run: "
            "remove weights, save them by torch.save(model.state_dict(), FILE) and set "
            "model.init_from to that file"
        )
    own = {"name": "own_models:Small", "options": {"weights": "x"}}
    assert parse_config({**LEAST, "model": own}, "test").model.options == own["options"]


def test_overrides_leave_the_tree_alone():
    tree = {"data": {"train": "a"}, "schedule": {"name": "constant", "lr": 0.1}}
    assert parse_config(tree, "test", ["data.train=b"]).data.train == "b"
    assert tree["data"]["train"] == "a"


def test_plateau_wants_a_validation_set():
    schedule = {"name": "plateau", "lr": 0.1}
    assert "plateau follows the validation error: set data.val" in problems(
        {**LEAST, "schedule": schedule}
    )
    parse_config({"data": {"train": "a", "val": "b"}, "schedule": schedule}, "test")


@pytest.mark.parametrize("name", ["alexnet", "alexnet2012", "alexnet_bn"])
def test_the_least_crop_of_each_network_is_the_least_that_it_can_take(name):
    """Found by doing: the config refuses exactly what the network cannot compute."""
    network = parse_config(
        {**LEAST, "model": {"name": name, "width": 0.05}}, "test"
    ).model
    model = network.build(10, 0).eval()
    for crop in range(30, 70):
        tree = {
            **LEAST,
            "model": {"name": name, "width": 0.05},
            "augment": {"crop": crop},
        }
        try:
            model(torch.zeros(1, 3, crop, crop))
        except RuntimeError:
            assert f"{name} needs augment.crop of at least" in problems(tree)
        else:
            parse_config(tree, "test")
