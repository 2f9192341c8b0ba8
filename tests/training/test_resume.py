"""kill -9 of real processes: the weights are those of the run that was never killed."""

import json
import re
import resource
import signal
from pathlib import Path

import pytest
import yaml
from forks import Fork
from waiting import await_that

from distrain.config import to_yaml
from distrain.errors import UserError
from distrain.result_fields import check_result_fields, get_result_fields

STEPS_PER_EPOCH = 44


@pytest.fixture
def recipe(narrow, tmp_path, digits):
    """Two epochs of 44 steps, a metrics line a step."""
    config = narrow(
        global_batch=32,
        epochs=2,
        log={"every": 1},
        checkpoint={"every": 10, "keep": 2},
        data={"val": str(digits / "val")},
    )
    tree = {k: v for k, v in yaml.safe_load(to_yaml(config)).items() if k != "run"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def end(process: Fork, code: int = 0) -> str:
    """What a process has printed when it has ended, with this exit code."""
    found = process.wait(120)
    said = process.out + process.err
    assert found == code, said
    return said


def weights_in(said: str) -> str:
    """The weights that a run ended with."""
    return re.search(r"^weights +(\w+)", said, re.MULTILINE)[1]


def weights(process: Fork) -> str:
    return weights_in(end(process))


def step_reached(run: Path, step: int):
    def reached() -> bool:
        lines = [
            text
            for file in run.glob("metrics-*.jsonl")
            for text in file.read_text().splitlines()[-3:]
        ]
        return any(
            json.loads(text)["step"] >= step for text in lines if text.endswith("}")
        )

    return reached


def kill(process):
    process.send_signal(signal.SIGKILL)
    end(process, -signal.SIGKILL)


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def undisturbed(command, recipe, tmp_path, known):
    """The weights of the recipe, for all tests that train it: from a process that nobody has forked."""
    if not known:
        process = command("train", str(recipe), f"run={tmp_path}/undisturbed")
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
        known["weights"] = weights_in(said)
    return known["weights"]


def test_killed_in_mid_epoch_and_twice_in_one_epoch(
    forked, recipe, tmp_path, undisturbed
):
    run = tmp_path / "runs/recipe"
    for step in (STEPS_PER_EPOCH + 12, STEPS_PER_EPOCH + 30):
        process = forked("train", str(recipe))
        await_that(step_reached(run, step), while_alive=process)
        kill(process)
    # Other thread counts and another memory bound: none of them is an input.
    last = forked(
        "train",
        str(recipe),
        "--resume",
        "data.decode_threads=3",
        "data.memory=100kB",
        "lanes=1",
    )
    assert weights(last) == undisturbed
    assert len(list(run.glob("metrics-*.jsonl"))) == 3


def test_killed_and_the_list_of_bad_samples_deleted(
    forked, recipe, tmp_path, damaged_set
):
    damaged_set(tmp_path / "damaged", bad={5, 77, 201, 310}, classes=10, rows=400)
    settings = (f"data.train={tmp_path}/damaged", "data.val=null", "epochs=6")
    wanted = weights(
        forked("train", str(recipe), *settings, f"run={tmp_path}/undisturbed")
    )
    run = tmp_path / "runs/recipe"
    process = forked("train", str(recipe), *settings)
    await_that(step_reached(run, 40), while_alive=process)
    kill(process)
    assert len((run / "bad_samples.jsonl").read_text().splitlines()) == 4
    (run / "bad_samples.jsonl").unlink()
    assert (
        weights(forked("train", str(recipe), *settings, "data.decode_threads=1"))
        == wanted
    )
    assert not (run / "bad_samples.jsonl").exists(), (
        "all of them were in the checkpoint"
    )


def test_killed_at_an_epoch_boundary(forked, recipe, tmp_path, undisturbed):
    run = tmp_path / "runs/recipe"
    once_an_epoch = ("checkpoint.every=44", "evaluate.every=88")
    process = forked("train", str(recipe), *once_an_epoch)
    await_that(
        (run / "checkpoints/step-00000044-attempt-001/manifest.json").exists,
        while_alive=process,
    )
    kill(process)
    newest = sorted(p.parent.name for p in run.glob("checkpoints/*/manifest.json"))[-1]
    assert int(newest.split("-")[1]) % STEPS_PER_EPOCH == 0
    assert weights(forked("train", str(recipe), *once_an_epoch)) == undisturbed


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_says_how_to_go_on(
    forked, recipe, tmp_path, undisturbed, number, code
):
    run = tmp_path / "runs/recipe"
    process = forked("train", str(recipe), "checkpoint.every=1000")
    await_that(step_reached(run, 15), while_alive=process)
    process.send_signal(number)
    out = end(process, code)
    step, total = re.search(
        r"stopping: saving first \(a second signal ends the run at once\)\n(?s:.*)"
        r"stopped and saved after step (\d+) of (\d+); to resume: ",
        out,
    ).groups()
    assert 15 <= int(step) < int(total) == 88
    command_line = re.search(r"to resume: distrain (.*)", out)[1].split()
    assert weights(forked(*command_line)) == undisturbed


def test_a_full_disk_loses_nothing(forked, recipe, tmp_path, undisturbed):
    """The kernel refuses to let files grow past a limit, as a full disk does; later there is room again."""
    run = tmp_path / "runs/recipe"
    process = forked(
        "train",
        str(recipe),
        "checkpoint.every=20",
        "evaluate.every=88",
        "checkpoint.patience=1",
    )
    await_that(
        (run / "checkpoints/step-00000020-attempt-001/manifest.json").exists,
        while_alive=process,
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    out = end(process, 1)
    assert re.search(
        r"warning: checkpoint step-\S+ could not be saved yet \(.*File too large.*retrying",
        out,
    )
    assert re.search(
        r"error: a checkpoint could not be saved in .*File too large.*free space", out
    )
    assert "Traceback" not in out
    whole = sorted(p.parent.name for p in run.glob("checkpoints/*/manifest.json"))
    assert whole
    assert [p.name for p in sorted((run / "checkpoints").glob("step-*"))] == whole, (
        "nothing half written"
    )
    assert not list(run.rglob("*.partial"))
    assert weights(forked("train", str(recipe))) == undisturbed


def test_a_field_that_the_checkpoint_does_not_know_counts_as_its_default(narrow):
    """It is younger than the checkpoint: a run whose config leaves it alone is resumed."""
    config = narrow(optimizer={"name": "sgd", "clip_norm": 1.0})
    saved = get_result_fields(config)
    check_result_fields(config, saved)
    young = {
        key: value
        for key, value in saved.items()
        if key not in ("optimizer.momentum", "data.shuffle_rows")
    }
    check_result_fields(config, young)
    del young["optimizer.clip_norm"]
    with pytest.raises(UserError, match=r"optimizer\.clip_norm: None before, 1\.0 now"):
        check_result_fields(config, young)
    with pytest.raises(
        UserError, match=r"optimizer\.gone: 3 before, no such field now"
    ):
        check_result_fields(config, {**saved, "optimizer.gone": 3})
