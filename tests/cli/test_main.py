"""The command line as typed: what it prints, and what bad input gets."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from PIL import Image

from distrain import __version__
from distrain.config import to_yaml
from distrain.config_schema import schema
from distrain.launch import launcher, ray_driver
from distrain.trainer import Summary


@pytest.fixture
def recipe(narrow, tmp_path, digits):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(narrow(data={"val": str(digits / "val")})))
    return str(path)


def test_version_and_help(distrain):
    assert distrain("--version") == (0, f"distrain {__version__}\n", "")
    code, out, _ = distrain("--help")
    assert code == 0
    assert "train" in out
    assert "pack" in out


@pytest.mark.parametrize(
    "flags",
    [(), ("--workers=auto",), ("--workers=2",), ("--workers=1",), ("--address=auto",)],
)
@pytest.mark.parametrize(
    ("gpus", "device", "most"),
    [(0, "auto", 1), (1, "auto", 1), (3, "auto", 3), (3, "cpu", 1)],
)
def test_train_takes_every_gpu_by_itself(
    distrain, recipe, monkeypatch, gpus, device, most, flags
):
    """One rank trains in this process; more of them, and what is asked for, on Ray."""
    called = []
    summary = Summary("finished", 1, 1, 1.0, None, None, "0" * 16, "exact", "runs/x")
    for name, module, function in (
        ("here", launcher, "train_locally"),
        ("ray", ray_driver, "train_on_ray"),
    ):
        monkeypatch.setattr(
            module,
            function,
            lambda *_, name=name, **__: called.append(name) or (summary, None),
        )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("distrain.launch.local.count_available_cores", lambda: 16)
    code, _, err = distrain("train", recipe, f"device={device}", *flags)
    assert (code, err) == (0, "")
    asked = bool({"--workers=2", "--workers=1", "--address=auto"} & set(flags))
    assert called == ["ray" if asked or most > 1 else "here"]


def test_fewer_gpus_than_workers_is_a_sentence_at_once(distrain, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = distrain("train", recipe, "--workers=4", "device=auto")
    assert code == 2
    assert (
        "4 workers need a GPU each, but this machine shows 1: use --workers auto, or train on CPUs"
        in err
    )


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "cluster.gpus_per_worker=1",
            "cluster.gpus_per_worker is 1, but this machine has no GPU: use "
            "cluster.gpus_per_worker=auto",
        ),
        (
            "device=cuda",
            "device is cuda, but this machine has no GPU: use device=auto or "
            "device=cpu",
        ),
        (
            "cluster.cpus_per_worker=64",
            "cluster.cpus_per_worker is 64, but this machine has 16 CPU cores: use "
            "auto, or at most 16",
        ),
    ],
)
def test_what_the_machine_lacks_is_a_sentence(
    distrain, recipe, monkeypatch, override, sentence, flags
):
    """A dry run promises nothing that the run would not get."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("distrain.launch.local.count_available_cores", lambda: 16)
    code, _, err = distrain("train", recipe, "device=auto", override, *flags)
    assert (code, err) == (2, f"error: {sentence}\n")


def test_a_second_ctrl_c_says_what_the_run_resumes_from(distrain, recipe, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "train_locally", interrupt)
        code, out, err = distrain("train", recipe)
        assert (code, err) == (130, "")
        assert out == (
            "ended at once: no checkpoint is complete, so the same command starts afresh\n"
        )
    distrain("train", recipe)
    monkeypatch.setattr(launcher, "train_locally", interrupt)
    code, out, err = distrain("train", recipe)
    assert (code, err) == (130, "")
    assert out == (
        "ended at once: the newest checkpoint is step-00000022-attempt-001; run the "
        "same command to resume from it\n"
    )


def test_ctrl_c_while_python_shuts_down_prints_nothing():
    code = """if True:
        import atexit, os, signal
        from distrain.cli.main import main

        # Called after what the command itself has registered.
        atexit.register(os.kill, os.getpid(), signal.SIGINT)
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"distrain {__version__}\n", "")


def test_idle_gpus_are_one_line(distrain, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, out, _ = distrain("train", recipe)
    assert code == 0
    assert (
        out.splitlines()[0]
        == "training on CPUs, and 2 of 2 GPUs stay idle: device is cpu"
    )
    assert out.count("stay idle") == 1


def test_a_dry_run_shows_what_would_be_used(distrain, recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr("distrain.launch.local.count_available_cores", lambda: 16)
    out = distrain("train", recipe, "--dry-run", "device=auto", "virtual_workers=4")[1]
    assert re.search(r"virtual workers: +4, 1 per worker\n", out)
    assert re.search(r"workers: +4, each with a GPU and 2 CPU cores\n", out)
    assert re.search(r"available: +8 GPUs and 16 CPU cores on 1 node", out)
    assert re.search(
        r"idle: +4 of 8 GPUs stay idle: a run has at most virtual_workers = 4", out
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "x.tar"),
            "x.tar: No such file or directory: check the path, its permissions and the",
        ),
        (OSError("no credentials for s3://b"), "no credentials for s3://b\n"),
    ],
)
def test_only_an_error_of_the_system_gets_its_remedy(
    distrain, monkeypatch, recipe, error, text
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(launcher, "train_locally", fail)
    code, _, err = distrain("train", recipe)
    assert code == 1
    assert err.startswith(f"error: {text}")


def test_a_dry_run_without_the_data_shows_the_config(distrain, recipe):
    code, out, err = distrain("train", recipe, "--dry-run", "data.train=/nowhere")
    assert code == 2
    assert "\n  train: /nowhere\n" in out
    assert err.startswith("error: no data set at /nowhere (it does not exist)")


def test_train_prints_plain_lines_in_a_pipe(distrain, recipe, tmp_path):
    code, out, err = distrain("train", recipe)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert re.fullmatch(
        r"epoch 0  step 10/22  loss \d\.\d{4}  top-1 [\d.]+%  \d+ images/s  waits \d+%",
        lines[0],
    )
    assert any(
        text.startswith("epoch 0  step 22/22  validation loss") for text in lines
    )
    assert re.fullmatch(r"finished 22 steps; this attempt took 0 min \d\d s", lines[-4])
    assert re.fullmatch(
        r"validation: top-1 [\d.]+%, top-5 [\d.]+% of 359 images", lines[-3]
    )
    assert re.fullmatch(r"weights   [0-9a-f]{16}  \(exact reduction\)", lines[-2])
    assert lines[-1] == f"run       {tmp_path}/run"
    assert "\x1b" not in out
    code, again, _ = distrain("train", recipe)
    assert code == 0
    assert (
        "is already finished: all 22 steps were done before. To start afresh, name another run directory: run=..."
        in again
    )
    assert lines[-2] in again


def test_dry_run_prints_every_derived_number(distrain, recipe, tmp_path):
    code, out, _ = distrain(
        "train", recipe, "--dry-run", "global_batch=96", "virtual_workers=6"
    )
    assert code == 0
    assert "global_batch: 96" in out
    for text in (
        "96 = 6 virtual workers x 16",
        "virtual workers:           6, 6 per worker",
        "1,438 images of 72 x 72, 10 classes",
        "14 = 1 x 14 per epoch",
        "94 images, different ones each time",
        "all-reduce per step:",
        "data in memory:",
        "checkpoint:",
    ):
        assert text in out, text
    assert not (tmp_path / "run").exists()
    code, out, _ = distrain("train", recipe, "--dry-run", "data.memory=1kB")
    assert "rows are read repeatedly" in out


def test_digits_are_not_packed_beside_photos(distrain, tmp_path):
    """A mistyped data.train would train on digits."""
    (tmp_path / "photos/cat").mkdir(parents=True)
    own = (f"data.train={tmp_path}/photos", f"data.val={tmp_path}/val")
    code, _, err = distrain("train", "quickstart", f"run={tmp_path}/run", *own)
    assert code == 2
    assert "photos has content, but is no data set: pack it with distrain pack" in err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat"]


def test_dry_run_before_the_data_is_packed(distrain, recipe, tmp_path):
    packed = distrain("train", recipe, "--dry-run", "virtual_workers=2")[1]
    unpacked = ("data.pack=digits", f"data.train={tmp_path}/new")
    code, out, _ = distrain(
        "train", recipe, "--dry-run", "virtual_workers=2", *unpacked
    )
    assert code == 0
    assert "not packed yet" in out
    for name in (
        "steps:",
        "left out per epoch:",
        "parameters:",
        "checkpoint:",
        "all-reduce per step:",
    ):
        told = [
            [text for text in printed.splitlines() if text.startswith(name)]
            for printed in (packed, out)
        ]
        assert told[0] == told[1] != []
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["optimizer.momentun=0.9"],
            "unknown key optimizer.momentun; did you mean optimizer.momentum?",
        ),
        (
            ["epochs=ten"],
            "override epochs=ten: must be an integer, not 'ten'",
        ),
        (["--workers=9-2"], "--workers 9-2 has a minimum above its maximum"),
        (["--workers=9"], "--workers 9: workers = 9 is more than virtual_workers"),
        (["virtual_workers=5"], "5 does not divide global_batch = 64: use 4"),
        (["data.train=/nowhere"], "no data set at /nowhere (it does not exist)"),
        (["data.train=nope://x"], "cannot open nope://x"),
        (["global_batch=4096"], "fewer than one global batch of 4096"),
        (["run=/proc/none"], "the run directory /proc/none cannot be written to"),
        (["--resume"], "there is no checkpoint to resume from"),
    ],
)
def test_the_users_mistakes_are_one_sentence_and_exit_2(
    distrain, recipe, arguments, message
):
    code, _, err = distrain("train", recipe, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_divergence_exits_1(distrain, recipe):
    code, _, err = distrain("train", recipe, "schedule.lr=1e12")
    assert code == 1
    assert err.startswith("error: training diverged at step ")


def test_pack(distrain, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(
            tmp_path / "src" / name / "1.png"
        )
    source, target = str(tmp_path / "src"), str(tmp_path / "dst")
    code, out, err = distrain("pack", source, target, "--geometry", "square:8")
    assert (code, err) == (0, "")
    first, progress, last = out.splitlines()
    assert first == f"image folder: 2 images of 2 classes in {source}"
    assert re.fullmatch(r"2 of 2 images  [0-9,]+/s  0\.0 MB  0:00:00 left", progress)
    assert last == "2 images of 2 classes in 1 shard"
    code, _, err = distrain("pack", source, target)
    assert (code, "holds a data set already" in err) == (2, True)
    code, out, err = distrain("pack", source, target, "--geometry", "square:8")
    assert (code, err) == (0, "")
    assert out.endswith("2 images of 2 classes in 1 shard, complete already\n")
    (tmp_path / "src/a/2.png").write_bytes(b"x")
    code, out, err = distrain(
        "pack", source, str(tmp_path / "second"), "--geometry", "square:8"
    )
    assert code == 1
    assert "rejected     1 x the image format is not recognized: a/2.png" in out
    assert "1 rejected in total" in err
    assert "the same command with --max-rejects 1 accepts that" in err
    # Which it does, and without it the exit code stays.
    again = ("pack", source, str(tmp_path / "second"), "--geometry", "square:8")
    code, out, err = distrain(*again, "--max-rejects", "1")
    assert (code, err) == (0, "")
    assert "complete already" in out
    assert "1 rejected in total" in out
    assert distrain(*again)[0] == 1
    code, out, err = distrain(
        "pack",
        source,
        str(tmp_path / "third"),
        "--geometry",
        "square:8",
        "--max-rejects",
        "1",
    )
    assert (code, err) == (0, "")
    assert "1 rejected in total" in out


def on_a_terminal(command, *arguments, interrupt=None):
    """What a command shows on a terminal, and its exit code; Ctrl-C is typed when `interrupt` is shown."""
    primary, secondary = pty.openpty()
    child = command(
        *arguments,
        stdout=secondary,
        stderr=secondary,
        stdin=secondary,
        start_new_session=True,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            part = os.read(primary, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
        if interrupt is not None and interrupt.encode() in shown:
            os.killpg(
                child.pid, signal.SIGINT
            )  # a terminal sends it to all of its processes
            interrupt = None
    os.close(primary)
    return child.wait(timeout=60), shown.decode()


@pytest.fixture
def narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def test_a_terminal_shows_a_bar(recipe, command, narrow_terminal):
    code, text = on_a_terminal(command, "train", recipe, "log.every=5")
    assert code == 0
    assert "images/s" in text
    assert "validation loss" in text
    assert "finished 22 steps" in text


def test_a_pack_shows_a_bar_and_goes_on_after_ctrl_c(
    distrain, command, narrow_terminal, tmp_path
):
    rng = np.random.default_rng(0)
    for i in range(300):
        place = tmp_path / "src" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(
            place / f"{i}.jpg"
        )
    arguments = (
        "pack",
        str(tmp_path / "src"),
        str(tmp_path / "dst"),
        "--processes",
        "2",
    )
    code, text = on_a_terminal(command, *arguments, interrupt="0/300 images")
    assert code == 130
    assert "stopped with 0 finished shards: run the same command to resume" in text
    assert "Traceback" not in text
    code, text = on_a_terminal(command, *arguments)
    assert code == 0
    assert "/300 images" in text
    assert "MB" in text
    assert "300 images of 2 classes in 1 shard" in text


def test_an_index_that_is_interrupted_writes_nothing(
    command, narrow_terminal, tmp_path
):
    url = shapes.hub(tmp_path, shapes.images(100))
    arguments = ("index", url, "--to", str(tmp_path / "index"), "--processes", "2")
    # At the line that comes before the first process is started.
    code, text = on_a_terminal(command, *arguments, interrupt="300 images of 3")
    assert code == 130
    assert "stopped; nothing was written" in text
    assert "Traceback" not in text
    assert list((tmp_path / "index").glob("*")) == []


def test_index_and_stats(distrain, tmp_path):
    found = shapes.images(10)
    url = shapes.hub(tmp_path, found)
    code, out, err = distrain("index", url, "--to", str(tmp_path / "index"))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"Parquet: 30 images of 3 classes in {url}"
    assert out.splitlines()[-2:] == [
        "30 images of 3 classes in 3 files",
        f"train with data.train={tmp_path / 'index'}",
    ]
    code, stored, err = distrain("stats", str(tmp_path / "index"))
    assert (code, err) == (0, "")
    code, out, err = distrain("stats", url)
    assert (code, err) == (0, "")
    assert out.splitlines()[-8:] == stored.splitlines()
    assert "eigenvalue" in stored
    code, out, err = distrain("inspect", str(tmp_path / "index"))
    assert (code, err) == (0, "")
    assert f"shards       {url}" in out
    code, out, err = distrain("verify", str(tmp_path / "index"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "30 images in 3 shards: 0 problems"


def test_stats_of_a_set_that_is_named_like_an_archive(distrain, digits, tmp_path):
    (tmp_path / "set.tar").symlink_to(digits / "val")
    for url in (f"{tmp_path}/set.tar", f"{tmp_path}/set.tar/"):
        code, out, err = distrain("stats", url)
        assert (code, err) == (0, "")
        assert "eigenvalue" in out


def test_verify_and_inspect(distrain, digits, tmp_path):
    code, out, err = distrain("verify", str(digits / "val"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "359 images in 1 shard: 0 problems"
    sheet = tmp_path / "sheet.png"
    code, out, err = distrain("inspect", str(digits / "val"), "--sheet", str(sheet))
    assert (code, err) == (0, "")
    assert "359 images of 10 classes in 1 shard" in out
    assert "height       72 to 72, median 72" in out
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[-1] == f"wrote {sheet}"
    code, _, err = distrain("inspect", str(digits / "val"), "--sheet", str(tmp_path))
    assert (code, "is a folder: name a PNG file in it" in err) == (2, True)
    copy = tmp_path / "copy"
    shutil.copytree(digits / "val", copy)
    (copy / "shard-00000.parquet").write_bytes(b"x")
    code, out, err = distrain("verify", str(copy))
    assert code == 1
    assert "shard-00000.parquet: has 1 bytes, not" in out
    assert out.splitlines()[-1] == "0 of 359 images in 0 of 1 shard: 1 problem"
    assert "does not match its manifest" in err
    (copy / "shard-00000.parquet").unlink()
    (copy / "shard-00000.parquet").symlink_to("shard-00000.parquet")
    code, out, err = distrain("verify", str(copy))
    assert code == 1
    assert "parquet: cannot be read: Too many levels of symbolic links\n" in out
    assert "was not verified: 1 file could not be read, see above" in err


def test_lr_draws_the_schedule(distrain, recipe):
    code, out, err = distrain(
        "lr",
        recipe,
        "schedule.name=polynomial",
        "schedule.warmup_epochs=0.5",
        "epochs=2",
    )
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split() == ["step", "epoch", "rate"]
    assert len(lines) == 24
    assert max(map(len, out.splitlines())) <= 79
    steps, bars = (
        [int(line.split()[0]) for line in lines],
        [line.count("#") for line in lines],
    )
    assert (steps[0], steps[-1]) == (0, 43)
    top = bars.index(48)
    assert 0 < top < 10
    assert bars[: top + 1] == sorted(bars[: top + 1])
    assert bars[top:] == sorted(bars[top:], reverse=True)
    assert bars[-1] <= 2


def test_lr_without_the_data_and_into_a_file(distrain, recipe, tmp_path):
    """Of a recipe with ImageNet's 1,281,167 images."""
    configs = Path(__file__).parents[2] / "configs"
    code, out, err = distrain(
        "lr", str(configs / "alexnet-lars-8k.yaml"), "--images", "1281167"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].split()[0] == "15,599", "100 epochs of 156 steps"
    for image in (tmp_path / "rate.png", tmp_path / "rate"):
        code, out, _ = distrain(
            "lr",
            str(configs / "alexnet-lars-8k.yaml"),
            "--images",
            "1281167",
            "--png",
            str(image),
        )
        assert (code, out) == (0, f"wrote {image}\n")
        assert image.read_bytes().startswith(b"\x89PNG")
    code, _, err = distrain("lr", recipe, "--png", str(tmp_path))
    assert (code, "is a folder: name an image file in it" in err) == (2, True)
    code, _, err = distrain("lr", recipe, "data.train=nowhere")
    assert (code, "or pass the number of images alone: --images N" in err) == (2, True)
    code, _, err = distrain("lr", recipe, "--images", "3")
    assert (code, "images = 3 is less than one global batch" in err) == (2, True)
    code, _, err = distrain("lr", recipe, "--png", str(tmp_path / "rate.txt"))
    assert (code, "cannot plot into" in err) == (2, True)
    assert (
        "drops depend on validation"
        in distrain(
            "lr", str(configs / "alexnet2012-paper.yaml"), "--images", "1281167"
        )[1]
    )


def test_a_dry_run_tries_an_imported_network_out(distrain, recipe):
    code, out, _ = distrain(
        "train", recipe, "model={name: 'own_models:Small'}", "--dry-run"
    )
    assert code == 0
    assert "parameters:                2,490" in out
    code, _, err = distrain(
        "train", recipe, "model={name: 'own_models:Noisy'}", "--dry-run"
    )
    assert (code, "draws from a global random generator" in err) == (2, True)


def test_model_prints_the_layers(distrain):
    code, out, err = distrain(
        "model", "alexnet2012", "augment.crop=227", "model.width=0.5", "--classes", "10"
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == [
        "layer",
        "kind",
        "output",
        "parameters",
        "%",
        "10^6",
        "MACs",
        "%",
    ]
    assert out.splitlines()[-2].split()[:4] == ["fc8", "Linear", "10", "20,490"]
    code, _, err = distrain("model", "alexnet3")
    assert (code, "alexnet_bn, torchvision:NAME" in err) == (2, True)
    code, _, err = distrain("model", "alexnet", "augment.crop=62", "seed=1")
    assert (
        code,
        "alexnet needs augment.crop of at least 63 pixels" in err,
        "distrain model does not use seed, only augment, model: remove it" in err,
    ) == (
        2,
        True,
        True,
    )


def test_schema_prints_json(distrain):
    code, out, err = distrain("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == schema()


def test_bench_data(distrain, digits):
    code, out, err = distrain(
        "bench", "data", str(digits / "val"), "augment.crop=64", "--images", "128"
    )
    assert (code, err) == (0, "")
    assert "libjpeg-turbo alone" in out
    assert all(len(line) <= 80 for line in out.splitlines())
