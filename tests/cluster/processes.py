"""Ray's own test cluster in the place of `hosts`, where network namespaces are not allowed: several raylets, one host.

Workers, raylets and controllers die for real here too; cables, links and a head of its own there are not.
"""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hosts import HEAD
from ray.cluster_utils import Cluster
from waiting import await_that


class Processes:
    """The part of Hosts' interface that one machine can serve."""

    namespaces = False

    def __init__(self, nodes: int, environment: Mapping[str, str]) -> None:
        # Ray starts the raylets from this process, which has loaded it without a token.
        self._environment = {
            key: value
            for key, value in environment.items()
            if not key.startswith("RAY_AUTH_")
        }
        os.environ.update(self._environment)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": 150_000_000},
        )
        address = self._cluster.head_node.node_ip_address
        self.address = {f"n{i}": address for i in range(1, nodes + 1)}
        self._nodes = {HEAD: self._cluster.head_node}
        self._drivers: list[subprocess.Popen[str]] = []

    def popen(self, host: str, *command: str, **options) -> subprocess.Popen[str]:
        """Start a command that finds the cluster by itself."""
        environment = {**self._environment, "RAY_ADDRESS": self._cluster.address}
        process = subprocess.Popen(
            command, text=True, env=environment, stdin=subprocess.DEVNULL, **options
        )
        self._drivers.append(process)
        return process

    def boot(self, host: str) -> None:
        """Nothing: there is one machine."""

    def start_ray(self, host: str) -> None:
        """Start a raylet with one CPU."""
        self._nodes[host] = self._cluster.add_node(
            num_cpus=1, object_store_memory=150_000_000
        )

    def up(self, *hosts: str) -> None:
        """Start what does not run of these."""
        for host in hosts:
            if not self.pids(host, "raylet/raylet"):
                self.start_ray(host)
        self._cluster.wait_for_nodes()

    def pids(self, host: str, name: str) -> list[int]:
        """Processes below a host's raylet, and commands started on the head, with a text in their command line."""
        roots = {
            process.pid
            for process in self._drivers
            if host == HEAD and process.poll() is None
        }
        if host in self._nodes:
            roots |= {
                p.process.pid for p in self._nodes[host].all_processes.get("raylet", [])
            }
        return [
            pid
            for pid, parents, command in _processes()
            if roots & {pid, *parents} and name in command
        ]

    def kill(self, host: str, name: str) -> None:
        """kill -9 of the processes of a host whose command line has a text in it."""
        pids = self.pids(host, name)
        assert pids, f"no {name} on {host}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def crash(self, host: str) -> None:
        """Kill all processes of a node."""
        if host in self._nodes:
            self._cluster.remove_node(self._nodes.pop(host), allow_graceful=False)

    def shared_memory(self, host: str) -> list[str]:
        """Files in /dev/shm that are distrain's."""
        return [path.name for path in Path("/dev/shm").iterdir()]

    def down(self) -> None:
        """End the cluster."""
        self._cluster.shutdown()
        await_that(
            lambda: not any(self.pids(host, "ray") for host in self._nodes),
            "the cluster to end",
        )


def _processes() -> list[tuple[int, set[int], str]]:
    """Number, numbers of all ancestors, and command line of every process."""
    parent, command = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
                command[int(entry.name)] = (
                    (entry / "cmdline").read_text().replace("\0", " ")
                )
            except OSError:
                continue
    found = []
    for pid, line in command.items():
        above, ancestors = parent.get(pid, 0), set()
        while above and above not in ancestors:
            ancestors.add(above)
            above = parent.get(above, 0)
        found.append((pid, ancestors, line))
    return found
