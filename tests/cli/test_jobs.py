"""`distrain submit` as typed: where a job can go, and what bad input gets. Real clusters are elsewhere."""

import io
import re
import subprocess
import sys
from pathlib import Path

import kube
import pytest
import yaml

from distrain.config import to_yaml
from distrain.launch.ray_jobs import JobInfo
from distrain.monitor.consoles import JsonConsole

CLUSTER = Path(__file__).parents[2] / "cluster"
TEMPLATES = {
    "kuberay": CLUSTER / "kuberay/rayjob.yaml",
    "slurm": CLUSTER / "slurm/train.sbatch",
}


@pytest.fixture
def recipe(narrow, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        to_yaml(narrow(run="s3://bucket/runs/mine", cluster={"cpus_per_worker": 4}))
    )
    return str(path)


def test_the_manifests_are_shown(distrain, recipe):
    options = (
        "--to=kuberay",
        f"--template={TEMPLATES['kuberay']}",
        "--dry-run",
        "--workers=1-3",
        "--id=mine",
    )
    code, out, err = distrain("submit", recipe, *options)
    assert (code, err) == (0, "")
    job, files = yaml.safe_load_all(out)
    assert kube.problems(job) + kube.problems(files) == []
    assert job["metadata"]["name"] == "mine"


def test_the_script_is_shown(distrain, recipe, monkeypatch):
    monkeypatch.setenv("DISTRAIN_TEMPLATE", str(TEMPLATES["slurm"]))
    code, out, err = distrain(
        "submit",
        recipe,
        "--to=slurm",
        "--dry-run",
        "--workers=1-4",
        "cluster.cpus_per_worker=8",
    )
    assert (code, err) == (0, "")
    assert out.startswith("#!/bin/bash\n")
    assert "#SBATCH --nodes=1-2\n" in out


@pytest.mark.parametrize(
    ("to", "option", "message"),
    [
        ("slurm", "--address=http://head:8265", "a job on slurm does not go through"),
        ("kuberay", "--address=http://head:8265", "a job on kuberay does not go"),
        ("ray", "--template=mine.yaml", "a job on a Ray cluster has no template"),
    ],
)
def test_an_option_of_another_platform_is_refused(
    distrain, recipe, monkeypatch, to, option, message
):
    """What the environment gives is for the platforms that use it."""
    for platform in ("ray", "kuberay", "slurm"):
        template = str(TEMPLATES.get(platform, TEMPLATES["slurm"]))
        monkeypatch.setenv("DISTRAIN_TEMPLATE", template)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
        options = (f"--to={platform}", "--dry-run", "--workers=1")
        code, _, err = distrain("submit", recipe, *options)
        assert (code, err) == (0, "")
    code, out, err = distrain("submit", recipe, f"--to={to}", option, "--dry-run")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["submit", "resume"])
@pytest.mark.parametrize("to", ["ray", "kuberay", "slurm"])
def test_other_hardware_can_be_accepted(distrain, recipe, tmp_path, to, command):
    """The message of the refusal names the option."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(Path(recipe).read_text())
    options = ["--accept-other-hardware", f"--to={to}", "--dry-run", "--workers=1"]
    if to != "ray":
        options.append(f"--template={TEMPLATES[to]}")
    code, out, err = distrain(
        command, recipe if command == "submit" else str(run), *options
    )
    assert (code, err) == (0, "")
    wanted = "--resume " * (command == "resume") + "--accept-other-hardware"
    # YAML breaks long lines.
    text = " ".join(out.split())
    place = (
        r"options=\((.*?)\)" if to == "slurm" else r"--address auto((?: --[a-z-]+)*)"
    )
    assert re.search(place, text)[1].strip() == wanted


def test_resume_takes_the_name_of_a_run_as_it_is(
    distrain, recipe, tmp_path, monkeypatch
):
    """It is not YAML: neither a number nor cut at a comment."""
    monkeypatch.chdir(tmp_path)
    for name in ("20241127", "a #1"):
        Path(name).mkdir()
        Path(name, "config.yaml").write_text(Path(recipe).read_text())
    code, _, err = distrain("resume", "20241127", "--dry-run")
    assert (code, "(run = 20241127" in err) == (2, True)
    file = tmp_path / "a #1" / "config.yaml"
    code, _, err = distrain("resume", str(file), "--dry-run")
    assert code == 2
    assert f"is a file: name the run directory, {file.parent}" in err
    code, out, err = distrain("resume", str(tmp_path / "a #1"), "--dry-run")
    assert (code, err) == (0, "")
    assert f"{tmp_path}/a #1" in out


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        ("SUCCEEDED", "mine succeeded\n"),
        (
            "STOPPED",
            "mine stopped; to resume: distrain resume /run --address http://h\n",
        ),
        ("FAILED", "mine failed; to resume: distrain resume /run --address http://h\n"),
    ],
)
def test_a_job_that_has_succeeded_is_not_resumed(distrain, monkeypatch, status, wanted):
    ended = JobInfo("mine", status, "/run", 0.0, "", None)
    monkeypatch.setattr("distrain.launch.jobs.stop", lambda *_, **__: ended)
    assert distrain("stop", "mine", "--address=http://h") == (0, wanted, "")


@pytest.mark.parametrize("to", ["kuberay", "slurm"])
def test_a_dry_run_needs_nothing_that_is_not_installed_everywhere(recipe, to):
    hidden = (
        "for name in ('ray', 'torch', 'nvidia', 'requests'): sys.modules[name] = None"
    )
    code = f"import sys\n{hidden}\nfrom distrain.cli.main import main\nmain()"
    options = (f"--to={to}", f"--template={TEMPLATES[to]}", "--dry-run")
    done = subprocess.run(
        [sys.executable, "-c", code, "submit", recipe, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "s3://bucket/runs/mine" in done.stdout


@pytest.mark.parametrize("to", ["kuberay", "slurm"])
def test_what_cannot_be_done_is_a_sentence(distrain, recipe, to, monkeypatch):
    code, _, err = distrain("submit", recipe, f"--to={to}", "--dry-run")
    assert code == 2
    assert (
        f"error: --to {to} needs --template: a copy of {TEMPLATES[to].relative_to(CLUSTER.parent)} from"
        in err
    )
    code, _, err = distrain(
        "submit", recipe, f"--to={to}", f"--template={TEMPLATES[to]}", "-f"
    )
    assert code == 2
    assert (
        "does not support --follow: submit without it, then watch with distrain top s3://bucket/runs/mine"
        in err
    )


def test_no_kubectl_is_a_sentence(distrain, recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = distrain(
        "submit", recipe, "--to=kuberay", f"--template={TEMPLATES['kuberay']}"
    )
    assert code == 2
    assert "kubectl is not in PATH" in err


def test_logs_of_another_system_are_shown_as_lines(distrain, monkeypatch):
    told = io.StringIO()
    JsonConsole(told).log("hello")
    told.write("what something else says\n")
    told.seek(0)
    monkeypatch.setattr(sys, "stdin", told)
    code, out, _ = distrain("logs", "-")
    assert (code, out) == (0, "hello\nwhat something else says\n")


def test_an_image_of_another_version_is_a_sentence(distrain, recipe, monkeypatch):
    monkeypatch.setenv("DISTRAIN_VERSION", "0.0.9")
    code, _, err = distrain("train", recipe)
    assert code == 2
    assert (
        "error: the job was submitted by distrain 0.0.9, but its image has 0.1.0: use an image with 0.0.9"
        in err
    )


def test_a_loss_that_is_sent_along_is_found_here_too(
    distrain, recipe, tmp_path, monkeypatch
):
    """Where it is checked; its folder need not be the one in which the command is typed."""
    (tmp_path / "elsewhere").mkdir()
    own = tmp_path / "elsewhere/sent_losses.py"
    own.write_text(
        "from distrain.losses import CrossEntropy\n\n\nclass Mine(CrossEntropy):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = (
        recipe,
        "loss.name=sent_losses:Mine",
        "--dry-run",
        "--to=kuberay",
        f"--template={TEMPLATES['kuberay']}",
    )
    code, _, err = distrain("submit", *settings)
    assert code == 2
    assert "sent_losses:Mine cannot be imported" in err
    code, out, err = distrain("submit", *settings, f"--with={own}")
    assert (code, err) == (0, "")
    assert "class Mine(CrossEntropy)" in out
