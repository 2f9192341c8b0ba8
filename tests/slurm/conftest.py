"""A real Slurm over three hosts, each a set of namespaces, as in tests/cluster."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from hosts import Hosts
from waiting import PATIENCE, await_that

CONTROLLER, NODES = "client", ("n1", "n2")


class Slurm:
    """slurmctld on a host of its own, a slurmd on each of two nodes, munge for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
        }
        self.hosts = Hosts(
            folder,
            len(NODES),
            {**environment, "SLURM_CONF": str(folder / "slurm.conf")},
        )
        self._configure()
        self._log = (folder / "daemons.log").open("w")
        self._daemons: list[subprocess.Popen[str]] = []
        files = {
            name: folder / f"munge.{name}"
            for name in ("socket", "key", "pid", "log", "seed")
        }
        files["key"].write_bytes(os.urandom(128))
        files["key"].chmod(0o400)
        options = [
            f"--{name}{'' if name == 'socket' else '-file'}={path}"
            for name, path in files.items()
        ]
        self._munge = subprocess.Popen(
            ["munged", "--foreground", "--force", *options], stderr=self._log
        )
        await_that(files["socket"].exists, "munge")
        self._start(CONTROLLER, "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        """Wait for both nodes to be there and free."""
        await_that(lambda: self._nodes() == ["2", "idle"], "idle nodes", PATIENCE)

    def _nodes(self) -> list[str]:
        return self.run("sinfo", "-h", "-p", "all", "-o", "%D %t").split()

    def _configure(self) -> None:
        folder, address = self.folder, self.hosts.address
        (folder / "state").mkdir()
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{CONTROLLER}({address[CONTROLLER]})",
            "AuthType": "auth/munge",
            # A requeued job waits until its first credential, which its nodes have revoked, is out of date. Started
            # before that (`scontrol update StartTime=now`), it fails where a node takes its new one for the old one.
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "SchedulerParameters": "sched_interval=2,bf_interval=2",
            "SlurmUser": "root",
            "MpiDefault": "none",
            # No control groups in a namespace of ours.
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "SlurmdParameters": "config_overrides",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool-%n",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd-%n.pid",
            "ReturnToService": 2,
            "SlurmdTimeout": 10,
            "KillWait": 10,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmctldParameters": "preempt_send_user_signal",
        }
        nodes = [
            f"NodeName={node} NodeAddr={address[node]} CPUs=1 RealMemory=4000"
            for node in NODES
        ]
        lines = [f"{key}={value}" for key, value in settings.items()]
        partitions = [
            "PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=60",
            "PartitionName=urgent Nodes=ALL PriorityTier=2",
        ]
        (folder / "slurm.conf").write_text("\n".join([*lines, *nodes, *partitions, ""]))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start(self, host: str, *command: str) -> None:
        self._daemons.append(
            self.hosts.popen(host, *command, stdout=self._log, stderr=self._log)
        )

    def start_node(self, node: str) -> None:
        """slurmd on a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def run(self, *command: str) -> str:
        """A command of Slurm's where its controller is; its output."""
        return self.hosts.run(CONTROLLER, *command)

    def state(self, job: str) -> str:
        """Of a job: PENDING, RUNNING, COMPLETED, ..."""
        words = dict(
            word.partition("=")[::2]
            for word in self.run("scontrol", "show", "job", job).split()
        )
        return words["JobState"]

    def down(self) -> None:
        """Stop everything."""
        self.hosts.down()
        self._munge.terminate()
        for daemon in (self._munge, *self._daemons):
            daemon.wait()
        self._log.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    yield found
    found.down()
