"""`distrain eval --workers N`: workers of Ray's, which are killed while they evaluate."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from narrow import narrow_recipe
from waiting import PATIENCE, await_that

import distrain
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train

pytestmark = pytest.mark.cluster

MARK = "DISTRAIN_TEST_EVALUATION"


@pytest.fixture
def run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run of a network whose forward waits PACE seconds."""
    monkeypatch.setenv("PACE", "0")
    config = narrow_recipe(
        digits,
        tmp_path / "run",
        data={"val": str(digits / "val")},
        model={"name": "own_models:Paced"},
        evaluate={"batch": 30},
    )
    train(config, console=SilentConsole())
    return str(tmp_path / "run")


def start(run: str, environment: Mapping[str, str], *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [Path(sys.executable).parent / "distrain", "eval", run, "--json", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return out


def find_tasks(mark: str) -> list[int]:
    """Processes of Ray's that evaluate for a driver whose environment has the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            if not title.startswith(b"ray::_evaluate_on_worker"):
                continue
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_workers_and_their_loss_change_nothing(run, plain, tmp_path):
    environment = {**os.environ, **plain, "PACE": "0.01"}
    alone = finish(start(run, environment))
    assert finish(start(run, environment, "--workers=3")) == alone

    # 12 chunks by 10 forwards over two workers take six seconds.
    environment = {**environment, "PACE": "0.1", MARK: str(tmp_path)}
    ten = finish(start(run, environment, "--crops=ten"))
    assert ten != alone
    process = start(run, environment, "--crops=ten", "--workers=2")
    first: list[int] = []

    def has_begun() -> bool:
        first[:] = find_tasks(str(tmp_path))
        return len(first) == 2

    await_that(has_begun, "two workers that evaluate", PATIENCE, while_alive=process)
    os.kill(first[0], signal.SIGKILL)
    await_that(
        lambda: set(find_tasks(str(tmp_path))) - set(first),
        "another try",
        PATIENCE,
        while_alive=process,
    )
    assert finish(process) == ten


def test_an_exported_model_on_workers(run, plain, tmp_path, monkeypatch):
    """Named by a relative path, which workers have another folder for."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, **plain, "PACE": "0"}
    distrain.export("run", to="it")
    alone = finish(start("it", environment))
    assert finish(start("it", environment, "--workers=3")) == alone
    tree = json.loads(alone)
    assert tree["models"][0]["run"] == "it"
    tree["models"][0]["run"] = "run"
    assert tree == json.loads(finish(start("run", environment)))


def test_what_fails_on_a_worker_is_a_sentence(run, plain, digits, tmp_path):
    """The driver reads the manifest alone, and workers the rows."""
    damaged = shutil.copytree(digits / "val", tmp_path / "damaged")
    (shard,) = damaged.glob("*.parquet")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    environment = {**os.environ, **plain, "PACE": "0"}
    options = [f"--data={damaged}", "--workers=2", "data.patience=0"]
    process = start(run, environment, *options)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: {damaged}/shard-00000.parquet")
    assert "checksum" in err.splitlines()[-1]
