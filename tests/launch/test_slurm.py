"""The script for Slurm: what is filled in, what is refused, and that a shell reads it. tests/slurm runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.config import parse_config_yaml
from distrain.distributed.config import Cluster
from distrain.errors import UserError
from distrain.launch.slurm import render_script, submit_script

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "cluster/slurm/train.sbatch"


@pytest.fixture
def config(narrow):
    found = narrow(run="/shared/runs/mine")
    cluster = found.cluster.model_copy(
        update={"workers": (3, 20), "cpus_per_worker": 4, "gpus_per_worker": 1}
    )
    return found.model_copy(
        update={"cluster": cluster, "virtual_workers": 32, "device": "auto"}
    )


@pytest.fixture
def template(tmp_path):
    def make(old="", new="", gpus="--gpus-per-node=a100:4"):
        text = TEMPLATE.read_text().replace("--gpus-per-node=1", gpus)
        assert old in text
        path = tmp_path / "site.sbatch"
        path.write_text(text.replace(old, new))
        return path

    return make


def between(text, begin, end):
    return text.partition(begin)[2].partition(end)[0]


def test_a_run_is_filled_in(config, template, tmp_path):
    (tmp_path / "nets").mkdir()
    options = ["--resume", "--accept-other-hardware"]
    text = render_script(config, template(), [tmp_path / "nets"], train_options=options)
    assert "#SBATCH --nodes=1-5\n" in text, "four GPUs a node"
    assert "#SBATCH --job-name=mine-" in text
    assert "#SBATCH --gpus-per-node=a100:4\n" in text, "the site's lines stay"
    assert "options=(--resume --accept-other-hardware)" in text
    assert f"export PYTHONPATH={tmp_path}\n" in text
    assert f"export PATH={Path(sys.executable).parent}:$PATH" in text
    assert "usage: sbatch" not in text
    assert (
        parse_config_yaml(between(text, "<<'END_OF_CONFIG'\n", "END_OF_CONFIG"), "it")
        == config
    )
    assert (
        subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode
        == 0
    )
    assert (
        render_script(config, template(), [tmp_path / "nets"], train_options=options)
        == text
    ), "the same run, the same script"


def test_what_is_submitted_can_be_a_template_again(config, template, tmp_path):
    text = render_script(config, template(), job_name="mine")
    (tmp_path / "again.sbatch").write_text(text)
    assert render_script(config, tmp_path / "again.sbatch", job_name="mine") == text


def test_a_fixed_number_of_nodes(config, template):
    cluster = config.cluster.model_copy(update={"workers": (8, 8)})
    text = render_script(
        config.model_copy(update={"cluster": cluster}), template("#SBATCH --nodes=1\n")
    )
    assert text.splitlines()[1] == "#SBATCH --nodes=2", (
        "also where the template has no such line"
    )


@pytest.mark.parametrize(
    ("nodes", "name"),
    [("-N 4", "-J x"), ("-N4", "-Jx"), (" --nodes 4", "--job-name x")],
)
def test_what_sbatch_would_take_in_place_of_our_lines_is_replaced(
    config, template, nodes, name
):
    """Of two lines it takes the last, and short forms as well as long ones."""
    lines = f"#SBATCH --nodes=2\n#SBATCH {nodes}\n#SBATCH {name}\n"
    text = render_script(config, template("#SBATCH --nodes=1\n", lines), job_name="it")
    assert text.count(" --nodes=1-5\n") == 2
    assert text.count(" --job-name=it\n") == 2
    assert f"#SBATCH {nodes}\n" not in text
    assert f"#SBATCH {name}\n" not in text


def test_a_script_with_short_forms_alone_gets_no_second_line(config, template):
    text = render_script(config, template("#SBATCH --nodes=1\n", "#SBATCH -N 4\n"))
    assert text.count("#SBATCH --nodes=1-5\n") == 1
    assert "-N 4" not in text


@pytest.mark.parametrize("gpus", ["--gpus-per-node=4", "--mem=0"])
def test_with_auto_the_scripts_number_of_nodes_stays(config, template, gpus):
    """The run counts what GPUs Ray shows on them."""
    auto = Cluster()
    text = render_script(
        config.model_copy(update={"cluster": auto}),
        template("--nodes=1\n", "--nodes=2-6\n", gpus=gpus),
    )
    assert "#SBATCH --nodes=2-6\n" in text
    assert "workers: auto\n" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"old": "# distrain: end", "new": ""},
            "must have one line '# distrain: begin' and one",
        ),
        (
            {"gpus": "--mem=0"},
            "a worker needs 4 CPUs and 1 GPU, but .* requests 16 CPUs and 0 GPUs per node",
        ),
        (
            {"old": "--cpus-per-task=16", "new": "--cpus-per-task=2"},
            "requests 2 CPUs and 4 GPUs per node: raise",
        ),
    ],
)
def test_a_template_that_is_none_is_a_sentence(config, template, change, sentence):
    with pytest.raises(UserError, match=sentence):
        render_script(config, template(**change))


def test_other_mistakes_are_sentences(config, template, tmp_path):
    with pytest.raises(UserError, match="cannot read the template"):
        render_script(config, tmp_path / "none")
    with pytest.raises(
        UserError,
        match=r"relative paths mean nothing on other machines \(run = runs/mine\)",
    ):
        render_script(config.model_copy(update={"run": "runs/mine"}), template())
    with pytest.raises(UserError, match="is not a Python file"):
        render_script(config, template(), [tmp_path / "weights.bin"])


def test_no_slurm_and_one_that_refuses(config, template, tmp_path, monkeypatch):
    text = render_script(config, template())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"Slurm is not available here \(squeue is not in PATH\): submit from a login",
    ):
        submit_script(text)
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2\nexit 1\n"
    )
    (tmp_path / "squeue").chmod(0o755)
    with pytest.raises(
        UserError, match="Slurm refused: slurm_load_jobs error: no controller"
    ):
        submit_script(text)


def test_the_name_of_a_job_is_the_scripts_whatever_the_environment_says(
    config, template, tmp_path, monkeypatch
):
    """SBATCH_JOB_NAME counts before the script: squeue would not find the job, which would start twice."""
    for command in ("squeue", "sbatch"):
        path = tmp_path / command
        path.write_text(f'#!/bin/sh\necho "$@" > {path}.words; cat > /dev/null\n')
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SBATCH_JOB_NAME", "other")
    submit_script(render_script(config, template(), job_name="mine"))
    assert "--name=mine" in (tmp_path / "squeue.words").read_text().split()
    assert "--job-name=mine" in (tmp_path / "sbatch.words").read_text().split()


def test_gpus_for_all_nodes_together_become_gpus_of_each(config, template):
    """Of 3 to 20 workers with a GPU each, on nodes that have four."""
    found = template(
        "--nodes=1\n", "--nodes=2 -G a100:8 --mem=0 # all\n", gpus="--time=9"
    )
    text = render_script(config, found)
    assert "#SBATCH --nodes=1-5 --gpus-per-node=a100:4 --mem=0 # all\n" in text


def test_the_head_notices_lost_nodes_fast():
    from distrain.launch.ray_cluster import RAY_HEAD_ENV

    words = TEMPLATE.read_text().split()
    assert {f"{key}={value}" for key, value in RAY_HEAD_ENV.items()} <= set(words)
    assert "RAY_AUTH_MODE=token" in words


@pytest.mark.parametrize(
    "path",
    [
        "cluster/slurm/train.sbatch",
        "tests/bench/gpu/pack.sh",
        "tests/bench/gpu/sheet.sh",
        ".ci/run",
    ],
)
def test_shell_scripts_are_sound(path):
    found = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", "--severity=warning", ROOT / path],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "line",
    [
        "--gpus-per-node=4 # all",
        "--gres=gpu:4",
        "--gres=gpu:h100:4",
        "--gpus-per-node 4",
    ],
)
def test_gpus_are_understood_in_the_usual_forms(config, template, line):
    assert "#SBATCH --nodes=1-5\n" in render_script(config, template(gpus=line))


@pytest.mark.parametrize("job", ["two words", "a\\1b", "x/y", "%j", "a,b"])
def test_a_name_that_is_none_is_a_sentence(config, template, job):
    with pytest.raises(
        UserError, match="is not a valid Slurm job name: use only letters"
    ):
        render_script(config, template(), job_name=job)
    run = config.model_copy(update={"run": f"/shared/{job}"})
    assert (
        subprocess.run(
            ["bash", "-n"], input=render_script(run, template()), text=True, check=False
        ).returncode
        == 0
    )
