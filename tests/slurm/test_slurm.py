"""The shipped script on a real Slurm: submitted, requeued, preempted, ended, and with either node lost.

One job without an end goes through the faults; each test compares its next checkpoint with an undisturbed run's.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from endless import Reference, saved, trains_on
from hosts import PYTHON
from narrow import lasting_recipe, narrow_recipe, with_own_models
from photos import write_photos
from readme_commands import SMALL, shown, write_recipe
from waiting import PATIENCE, await_that

import distrain
from distrain.config import Config, to_yaml
from distrain.distributed.world import World
from distrain.monitor.sinks import SilentConsole
from distrain.trainer import train

pytestmark = pytest.mark.slurm
TEMPLATE = Path(__file__).parents[2] / "cluster/slurm/train.sbatch"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
CLUSTER = {"workers": 2, "stall": 60.0}


class Job:
    """A job of Slurm's, and its log."""

    def __init__(self, slurm, number: str, log: Path) -> None:
        self.slurm, self.number, self._log = slurm, number, log
        self._read = 0

    @property
    def text(self) -> str:
        """What it has told since the last `mark`."""
        return self._log.read_text()[self._read :] if self._log.exists() else ""

    def mark(self) -> None:
        """Something is about to happen: what was told before does not count."""
        self._read += len(self.text)

    @property
    def state(self) -> str:
        return self.slurm.state(self.number)

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    def wait_for(self, pattern: str) -> None:
        self.wait_until(lambda: re.search(pattern, self.text), pattern)

    def wait_until(self, condition, what: str) -> None:
        def met() -> bool:
            assert self.state not in ("FAILED", "TIMEOUT", "NODE_FAIL"), self.text
            return bool(condition())

        try:
            await_that(met, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None

    def end(self, state: str) -> str:
        await_that(lambda: self.is_over, "the job to end", PATIENCE)
        assert self.state == state, self.text
        return self.text

    def tell_to_end(self) -> None:
        """As Slurm does at the end of its time: save, and end."""
        self.slurm.run(
            *shown("scancel --batch --signal=TERM JOB", {"JOB": self.number})
        )


class Sites:
    """Submits runs from a host that is no node with the script as a site would change it: small, no GPUs."""

    def __init__(self, slurm, folder: Path) -> None:
        self.slurm, self._folder = slurm, folder
        text = TEMPLATE.read_text().replace("--cpus-per-task=16", "--cpus-per-task=1")
        text = text.replace("/shared/distrain/bin", str(Path(PYTHON).parent))
        text = text.replace("#SBATCH --gpus-per-node=1\n", "")
        # The nodes of this Slurm have one /tmp; what they have for themselves is /tmp/ray.
        text = text.replace("/tmp/ray-$SLURM_JOB_ID", "/tmp/ray/$SLURM_JOB_ID")
        python = with_own_models(os.environ)["PYTHONPATH"]
        text = text.replace(
            "\nexport PATH=", f"\nexport PYTHONPATH={python} PACE=0.04\nexport PATH=", 1
        )
        self.template = folder / "site.sbatch"
        self.template.write_text(text)

    def command(self, recipe: Config, *overrides: str) -> str:
        """What `distrain submit` says."""
        path = self._folder / "recipe.yaml"
        path.write_text(to_yaml(recipe))
        options = (
            "--to=slurm",
            f"--template={self.template}",
            "--id=mine",
            *overrides,
        )
        return self.run(PYTHON, "-m", "distrain", "submit", str(path), *options)

    def run(self, *command: str) -> str:
        """Run a command on the client, in a folder that the nodes share; return its output."""
        process = self.slurm.hosts.popen(
            "client", *command, cwd=self._folder, stdout=-1, stderr=-2
        )
        return process.communicate(timeout=PATIENCE)[0]

    def submit(self, recipe: Config, *overrides: str) -> Job:
        return self.job(self.command(recipe, *overrides))

    def job(self, said: str, name: str = "mine") -> Job:
        """The job of a name, from what submitting it has printed."""
        found = re.search(r"Slurm job (\d+) submitted|Submitted batch job (\d+)", said)
        assert found, said
        number = found[1] or found[2]
        return Job(self.slurm, number, self._folder / f"{name}-{number}.log")

    def clear(self) -> None:
        """End what is left of the jobs."""
        for name in ("mine", "distrain"):
            self.slurm.run("scancel", f"--name={name}")
        self.slurm.wait_until_idle()


class Endless:
    """One job without an end on both nodes: submitted when it is needed, and again when something has ended it."""

    def __init__(self, sites: Sites, config: Config, reference: Reference) -> None:
        self._sites, self.config, self._reference = sites, config, reference
        self._job: Job | None = None

    def train(self, *overrides: str) -> Job:
        """The job, with both its nodes training and a checkpoint to resume from."""
        if overrides:
            self.cancel()
        if self._job is None or self._job.is_over:
            self._sites.slurm.wait_until_idle()
            self._job = self._sites.submit(self.config, *overrides)
        job = self._job
        run = Path(str(self.config.run))
        job.wait_until(
            lambda: trains_on(job.text, 2) and saved(run),
            "two workers that train, and a checkpoint",
        )
        return job

    def check(self) -> None:
        """Compare the next checkpoint with the reference's."""
        assert self._job is not None
        self._reference.check(self._job, self.config)

    def cancel(self) -> None:
        self._sites.clear()
        self._job = None


@pytest.fixture(scope="session")
def sites(slurm, tmp_path_factory) -> Iterator[Sites]:
    found = Sites(slurm, tmp_path_factory.mktemp("sites"))
    yield found
    found.clear()


@pytest.fixture(scope="session")
def shared(sites, digits, tmp_path_factory) -> Iterator[Endless]:
    folder = tmp_path_factory.mktemp("endless")
    config = lasting_recipe(digits, folder / "run", cluster=CLUSTER)
    reference = Reference(config, folder, with_own_models(os.environ))
    yield Endless(sites, config, reference)
    reference.end()


@pytest.fixture
def endless(shared: Endless, request: pytest.FixtureRequest) -> Iterator[Endless]:
    """The job that the tests of faults share; one that a test has failed on is not gone on with."""
    failed = request.session.testsfailed
    yield shared
    if request.session.testsfailed > failed:
        shared.cancel()
        shutil.rmtree(str(shared.config.run), ignore_errors=True)


def test_a_run_on_two_nodes_is_submitted_once(sites, shared, slurm, digits, tmp_path):
    shared.cancel()
    short = {
        "epochs": 2,
        "global_batch": 30,
        "virtual_workers": 6,
        "log": {"every": 20},
    }
    recipe = narrow_recipe(digits, tmp_path / "run", cluster=CLUSTER, **short)
    job = sites.submit(recipe)
    job.wait_for("worker group formed: 2 workers")
    submitted_again = sites.command(recipe)
    assert f"Slurm job {job.number} is already queued or running" in submitted_again
    text = job.end("COMPLETED")
    alone = recipe.model_copy(update={"run": str(tmp_path / "alone")})
    assert (
        f"weights   {train(alone, World(torch.device('cpu')), SilentConsole()).weights[:16]}"
        in text
    )
    assert "srun: error" not in text
    assert {"1 on 10.78.0.11", "1 on 10.78.0.12"} <= set(
        re.findall(r"1 on [\d.]+", text)
    )
    for node in ("n1", "n2"):
        assert slurm.hosts.run(node, "ls", "/tmp/ray") == "", (
            "nothing is left on the nodes"
        )
        assert not slurm.hosts.pids(node, "raylet")


def test_the_commands_shown(sites, shared, slurm, tmp_path):
    """As in cluster/README.md: submitted, requeued by a signal, started by sbatch, and ended."""
    # The README's recipe, lasting; sbatch takes no overrides.
    shared.cancel()
    write_photos(tmp_path)
    for split in ("train", "val"):
        distrain.pack(f"{tmp_path}/photos/{split}", f"{tmp_path}/shards/{split}")
    recipe = write_recipe(tmp_path)
    data = [f"data.{split}={tmp_path}/shards/{split}" for split in ("train", "val")]
    lasting = ["epochs=1000000", "log.every=10", "evaluate.every=1000000"]
    settings = [*SMALL, *data, *lasting, f"run={tmp_path}/run"]
    config = distrain.load_config(recipe, settings)
    recipe.write_text(to_yaml(config))
    places = {"my.yaml": str(recipe), "site.sbatch": str(sites.template)}

    # Submit it; a signal has it saved and requeued.
    words = shown(
        "distrain submit my.yaml --to slurm --template site.sbatch --workers 1-8",
        places,
    )
    said = sites.run(PYTHON, "-m", *words, "--id=mine")
    job = sites.job(said)
    job.wait_for(r"step \d+/")
    slurm.run(*shown("scancel --batch --signal=USR1 JOB", {"JOB": job.number}))
    job.wait_for("stopped and saved after step")
    await_that(lambda: job.state == "PENDING", "the job to be requeued", PATIENCE)
    sites.clear()

    # Start it on two nodes without distrain on this host, and end it.
    places = {**places, "--nodes 4": "--nodes 2"}
    said = sites.run(*shown("sbatch --nodes 4 site.sbatch my.yaml", places))
    job = sites.job(said, "distrain")
    job.wait_for("resumed from step")
    job.tell_to_end()
    assert "stopped and saved after step" in job.end("FAILED")


def test_a_requeued_run_comes_back_by_itself(endless, slurm):
    job = endless.train()
    job.mark()
    slurm.run("scontrol", "requeue", job.number)
    job.wait_for("resumed from step")
    endless.check()


def test_a_preempted_run_saves_and_comes_back_without_losing_a_step(endless, slurm):
    """Slurm sends the same signal as before the time limit."""
    job = endless.train()
    job.mark()
    slurm.run(
        "sbatch", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true"
    )
    job.wait_for("stopped and saved after step")
    last = int(re.findall(r"stopped and saved after step (\d+)", job.text)[0])
    job.wait_for(f"resumed from step {last}")
    endless.check()


def test_the_first_node_is_lost(endless, slurm):
    """The job's script is gone with it: the other node has the job requeued, when Slurm has given the first one up."""
    job = endless.train()
    job.mark()
    slurm.hosts.crash("n1")
    try:
        await_that(lambda: job.state == "PENDING", "the job to be requeued", PATIENCE)
    finally:
        slurm.hosts.boot("n1")
        slurm.start_node("n1")
    job.wait_for("resumed from step")
    endless.check()


def test_a_lost_node_does_not_end_the_job_and_who_ends_it_finds_it_saved(
    endless, slurm
):
    job = endless.train("cluster.workers=[1, 2]")
    job.mark()
    slurm.hosts.crash("n2")
    try:
        job.wait_for("worker group formed: 1 worker ")
        endless.check()
        job.mark()
        job.tell_to_end()
        text = job.end("FAILED")
    finally:
        slurm.hosts.boot("n2")
        slurm.start_node("n2")
        slurm.wait_until_idle()
    assert "stopped and saved after step" in text
    assert "to resume: distrain train" not in text, "its config is gone"
