"""The shipped script on a real Slurm: submitted, requeued, preempted, ended, and with either node lost."""

import re
from pathlib import Path

import pytest
import torch
from hosts import PYTHON
from waiting import await_that

from distrain.config import to_yaml
from distrain.monitor.sinks import Silent
from distrain.train import train
from distrain.world import World

pytestmark = pytest.mark.slurm
TEMPLATE = Path(__file__).parents[2] / "cluster/slurm/train.sbatch"


class Job:
    """A job of Slurm's, and its log."""

    def __init__(self, slurm, number: str, log: Path) -> None:
        self.slurm, self.number, self.log = slurm, number, log

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def state(self) -> str:
        return self.slurm.state(self.number)

    def wait_for(self, pattern: str, seconds: float = 120.0) -> None:
        def told() -> bool:
            assert self.state not in ("FAILED", "TIMEOUT", "NODE_FAIL"), self.text
            return re.search(pattern, self.text) is not None

        try:
            await_that(told, pattern, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def wait_for_step(self, step: int) -> None:
        self.wait_for(rf"step {step}/")

    def end(self, state: str) -> str:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        await_that(lambda: self.state in over, "the job to end", 180)
        assert self.state == state, self.text
        return self.text

    def weights(self) -> str:
        return re.findall(r"weights +(\w+)", self.end("COMPLETED"))[-1]


@pytest.fixture
def site(tmp_path):
    """The script as a site would change it: small nodes without GPUs."""
    text = TEMPLATE.read_text().replace("--cpus-per-task=16", "--cpus-per-task=1")
    text = text.replace("#SBATCH --gpus-per-node=1\n", "")
    # The nodes of this Slurm have one /tmp; what they have for themselves is /tmp/ray.
    text = text.replace("/tmp/ray-$SLURM_JOB_ID", "/tmp/ray/$SLURM_JOB_ID")
    path = tmp_path / "site.sbatch"
    path.write_text(text)
    return path


@pytest.fixture
def submit(slurm, site, recipe, tmp_path):
    """Submits a run from a host that is no node; jobs that are left are ended."""

    def command(*overrides: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(recipe))
        options = ("--to=slurm", f"--template={site}", "--id=mine", *overrides)
        process = slurm.hosts.popen(
            "client", PYTHON, "-m", "distrain", "submit", str(path), *options, cwd=tmp_path, stdout=-1, stderr=-2
        )
        return process.communicate(timeout=60)[0]

    def job(*overrides: str) -> Job:
        said = command(*overrides)
        found = re.search(r"Slurm job (\d+) submitted", said)
        assert found, said
        return Job(slurm, found[1], tmp_path / f"mine-{found[1]}.log")

    job.command = command
    yield job
    slurm.run("scancel", "--name=mine")
    slurm.wait_until_idle()


@pytest.fixture
def wanted(recipe, tmp_path, known) -> str:
    """The weights of the undisturbed run in one process, as they are printed."""
    if not known:
        alone = recipe.model_copy(update={"run": str(tmp_path / "alone")})
        known["weights"] = train(alone, World(torch.device("cpu")), Silent()).weights[:16]
    return known["weights"]


def test_a_run_on_two_nodes_is_submitted_once(submit, wanted, slurm):
    job = submit()
    job.wait_for("worker group formed: 2 workers")
    assert f"Slurm job {job.number} is at work already" in submit.command()
    assert job.weights() == wanted
    assert "srun: error" not in job.text
    assert {"1 on 10.78.0.11", "1 on 10.78.0.12"} <= set(re.findall(r"1 on [\d.]+", job.text))
    for node in ("n1", "n2"):
        assert slurm.hosts.run(node, "ls", "/tmp/ray") == "", "nothing is left on the nodes"
        assert not slurm.hosts.pids(node, "raylet")


def test_a_requeued_run_comes_back_by_itself(submit, wanted, slurm):
    job = submit()
    job.wait_for_step(60)
    slurm.run("scontrol", "requeue", job.number)
    job.wait_for("resumed from step")
    assert job.weights() == wanted


def test_a_preempted_run_saves_and_comes_back_without_losing_a_step(submit, wanted, slurm):
    """Slurm sends the same signal as before the time limit."""
    job = submit()
    job.wait_for_step(60)
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    job.wait_for("stopped and saved after step")
    saved = int(re.findall(r"stopped and saved after step (\d+)", job.text)[0])
    job.wait_for(f"resumed from step {saved}")
    assert job.weights() == wanted


def test_a_run_that_is_ended_saves_first(submit, slurm):
    job = submit()
    job.wait_for_step(60)
    slurm.run("scancel", "--batch", "--signal=TERM", job.number)
    text = job.end("FAILED")
    assert "stopped and saved after step" in text
    assert "to go on: distrain train" not in text, "its config is gone"


def test_a_node_that_is_lost_does_not_end_the_job(submit, wanted, slurm):
    job = submit("cluster.workers=[1, 2]", "epochs=20")
    job.wait_for("worker group formed: 2 workers")
    job.wait_for_step(60)
    slurm.hosts.crash("n2")
    try:
        job.wait_for("worker group formed: 1 worker ")
        text = job.end("COMPLETED")
        assert "weights" in text
    finally:
        slurm.hosts.boot("n2")
        slurm.start_node("n2")
        slurm.wait_until_idle()


def test_the_first_node_is_lost(submit, wanted, slurm):
    """The job's script is gone with it: the other node has the job requeued, when Slurm has given the first one up."""
    job = submit()
    job.wait_for_step(60)
    slurm.hosts.crash("n1")
    try:
        await_that(lambda: job.state == "PENDING", "the job to be requeued", 180)
    finally:
        slurm.hosts.boot("n1")
        slurm.start_node("n1")
    job.wait_for("resumed from step", 180)
    assert job.weights() == wanted
