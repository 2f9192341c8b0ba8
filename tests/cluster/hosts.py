"""Several hosts on one Linux machine, each a network, PID, mount and UTS namespace on one switch, for Ray to run on.

Killing a host is a power cut: its cable is pulled first, so that nobody hears of it, and then all its processes die.
Needs root, iproute2 and nftables. The machine's own network is not touched.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from readme_commands import shown
from waiting import PATIENCE, await_that

PYTHON = sys.executable
# Prints the addresses of the nodes that a Ray head believes to be alive, once for each line that it reads.
NODES = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
for _ in sys.stdin:
    nodes = client.get_all_node_info(timeout=30).values()
    print(json.dumps([node.node_manager_address for node in nodes if node.state == 0]), flush=True)
"""
RAY = str(Path(sys.executable).parent / "ray")
HEAD = "n1"

# Ray looks for new log files ten times a second and at all processes every five: on each host a twentieth of a core.
HOUSEKEEPING = {
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "5",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


def sh(*command: str, check: bool = True) -> str:
    """Run a command on the machine itself; its output."""
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert not check or done.returncode == 0, (
        f"{' '.join(command)}: {done.stdout}{done.stderr}"
    )
    return done.stdout


class Hosts:
    """A switch, hosts n1 (Ray's head), n2, ... and an idle host `client`."""

    namespaces = True

    def __init__(
        self, folder: Path, nodes: int, environment: Mapping[str, str]
    ) -> None:
        self._folder, self._tag = folder, f"dt{os.getpid() % 10000}"
        self._environment = {**environment, **HOUSEKEEPING}
        self.address = {
            "client": "10.78.0.2",
            **{f"n{i}": f"10.78.0.{10 + i}" for i in range(1, nodes + 1)},
        }
        self._inits: dict[str, subprocess.Popen[bytes]] = {}
        self._pids: dict[str, int] = {}
        self._ray: dict[str, subprocess.Popen[str]] = {}
        self._nodes: subprocess.Popen[str] | None = None
        sh("ip", "netns", "add", self._switch)
        sh("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host, address in self.address.items():
            self._connect(host, address)
            self.boot(host)

    @property
    def _switch(self) -> str:
        return f"{self._tag}sw"

    def _connect(self, host: str, address: str) -> None:
        net = self._tag + host
        sh("ip", "netns", "add", net)
        sh(
            "ip",
            "-n",
            self._switch,
            "link",
            "add",
            f"p-{host}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            net,
        )
        sh("ip", "-n", self._switch, "link", "set", f"p-{host}", "master", "br0", "up")
        sh("ip", "-n", net, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            sh("ip", "-n", net, "link", "set", link, "up")
        sysctl = shown("sysctl -w net.ipv4.tcp_retries2=5")
        assert sh("ip", "netns", "exec", net, *sysctl).endswith(" = 5\n")

    def boot(self, host: str) -> None:
        """Start a host: an init that reaps what is orphaned, and nothing else."""
        folder = self._folder / host
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "ray").mkdir(parents=True)
        names = "".join(f"{address} {name}\n" for name, address in self.address.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        script = (
            'hostname "$1"; mkdir -p /tmp/ray; mount --bind "$2/ray" /tmp/ray',
            'mount -t tmpfs -o size=4g tmpfs /dev/shm; mount --bind "$2/hosts" /etc/hosts; touch "$2/up"',
            "while :; do sleep 3600 & wait $!; done",
        )
        namespaces = (
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount",
            "--mount-proc",
            "--uts",
        )
        shell = ("bash", "-c", "; ".join(script), "_", host, str(folder))
        command = [
            "ip",
            "netns",
            "exec",
            self._tag + host,
            "unshare",
            *namespaces,
            *shell,
        ]
        with (folder / "init.log").open("wb") as log:
            self._inits[host] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        await_that(lambda: (folder / "up").exists(), f"{host} to boot")
        children = (
            Path(f"/proc/{self._inits[host].pid}/task/{self._inits[host].pid}/children")
            .read_text()
            .split()
        )
        self._pids[host] = int(children[0])
        sh("ip", "-n", self._switch, "link", "set", f"p-{host}", "up")

    def popen(self, host: str, *command: str, **options) -> subprocess.Popen[str]:
        """Start a command on a host, in the folder that this process is in."""
        enter = [
            "nsenter",
            "-t",
            str(self._pids[host]),
            "-n",
            "-p",
            "-u",
            "-m",
            f"--wd={options.pop('cwd', os.getcwd())}",
        ]
        environment = {**self._environment, **options.pop("environment", {})}
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            [*enter, *command], text=True, env=environment, **options
        )

    def run(self, host: str, *command: str) -> str:
        """Run a command on a host; its output."""
        process = self.popen(
            host, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return process.communicate(timeout=120)[0]

    def start_ray(self, host: str) -> None:
        """`ray start` on a host as cluster/README.md shows it, with one CPU."""
        if host == HEAD:
            _, *words = shown("ray start --head --port 6379")
            words += ["--ray-client-server-port", "10001"]
            address = {"ADDRESS": self.address[host]}
            words += shown("ray start --head --dashboard-host ADDRESS", address)[-2:]
        else:
            head = {"HEAD": self.address[HEAD]}
            _, *words = shown("ray start --address HEAD:6379", head)
        common = (
            "--num-cpus",
            "1",
            "--object-store-memory",
            "150000000",
            "--disable-usage-stats",
            "--block",
        )
        if host in self._ray:
            for pid in self.pids(host, "ray start"):  # a drained node leaves it behind
                os.kill(pid, signal.SIGKILL)
            self._ray[host].wait()
        with (self._folder / host / "ray.log").open("w") as log:
            self._ray[host] = self.popen(
                host,
                RAY,
                *words,
                "--node-ip-address",
                self.address[host],
                *common,
                stdout=log,
                stderr=log,
            )

    def up(self, *hosts: str) -> None:
        """Wait until Ray has exactly these nodes. What ends is started again, as a supervisor would."""
        wanted = {self.address[host] for host in hosts}

        def are_up() -> bool:
            for host in hosts:
                if self._inits[host].poll() is not None:
                    self.boot(host)
                if not self._runs_ray(host):
                    self.start_ray(host)
                    if host == HEAD:
                        await_that(
                            lambda: self._has_started(HEAD), "Ray's head", PATIENCE
                        )
            return self._alive_nodes() == wanted

        await_that(are_up, f"Ray on {hosts}", PATIENCE)

    def _runs_ray(self, host: str) -> bool:
        """Whether Ray runs on a host, or is starting there."""
        if host not in self._ray or self._ray[host].poll() is not None:
            return False
        return not self._has_started(host) or bool(self.pids(host, "raylet/raylet"))

    def _has_started(self, host: str) -> bool:
        """Whether the last `ray start` on a host has said that its Ray runs."""
        return "Ray runtime started" in (self._folder / host / "ray.log").read_text()

    def _alive_nodes(self) -> set[str] | None:
        """Addresses of the nodes that the head believes to be alive; None where it does not answer."""
        if self._nodes is not None and self._nodes.poll() is not None:
            self._forget_nodes()
        if self._nodes is None:
            pipes = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.DEVNULL,
            }
            self._nodes = self.popen(
                HEAD, PYTHON, "-c", NODES, f"{self.address[HEAD]}:6379", **pipes
            )
        assert self._nodes.stdin is not None
        assert self._nodes.stdout is not None
        try:
            self._nodes.stdin.write("\n")
            self._nodes.stdin.flush()
            answer = self._nodes.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._forget_nodes()
            return None
        return set(json.loads(answer))

    def _forget_nodes(self) -> None:
        """End the process that asks the head for its nodes."""
        if self._nodes is not None:
            with suppress(BrokenPipeError):
                self._nodes.communicate()
            self._nodes = None

    def pids(self, host: str, name: str) -> list[int]:
        """Processes of a host whose command line has a text in it, by the machine's numbers."""
        namespace = (
            os.readlink(f"/proc/{self._pids[host]}/ns/pid")
            if self._inits[host].poll() is None
            else None
        )
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.readlink(entry / "ns/pid") == namespace and name in (
                        entry / "cmdline"
                    ).read_text().replace("\0", " "):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def kill(self, host: str, name: str) -> None:
        """kill -9 of the processes of a host whose command line has a text in it."""
        pids = self.pids(host, name)
        assert pids, f"no {name} on {host}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def crash(self, host: str) -> None:
        """Cut a host's power."""
        self.cut(host)
        self._end(host)

    def cut(self, host: str) -> None:
        """Pull a host's cable: no reset, no farewell."""
        sh("ip", "-n", self._switch, "link", "set", f"p-{host}", "down")

    def heal(self, host: str) -> None:
        """Plug it in again."""
        sh("ip", "-n", self._switch, "link", "set", f"p-{host}", "up")

    def rate(self, host: str, rate: str | None) -> None:
        """Shape both directions of a host's link; None: as fast as it goes."""
        for net, link in ((self._tag + host, "eth0"), (self._switch, f"p-{host}")):
            sh(
                "ip",
                "netns",
                "exec",
                net,
                "tc",
                "qdisc",
                "del",
                "dev",
                link,
                "root",
                check=False,
            )
            if rate:
                limit = ("rate", rate, "burst", "256kb", "latency", "100ms")
                sh(
                    "ip",
                    "netns",
                    "exec",
                    net,
                    "tc",
                    "qdisc",
                    "add",
                    "dev",
                    link,
                    "root",
                    "tbf",
                    *limit,
                )

    def lose(self, host: str, percent: int) -> None:
        """Drop a share of the packets that reach a host; 0: none."""
        nft = ("ip", "netns", "exec", self._tag + host, "nft")
        sh(*nft, "delete", "table", "inet", "loss", check=False)
        if percent:
            sh(*nft, "add", "table", "inet", "loss")
            sh(
                *nft,
                "add",
                "chain",
                "inet",
                "loss",
                "in",
                "{ type filter hook input priority 0 ; }",
            )
            rule = f"iifname eth0 numgen random mod 100 < {percent} drop"
            sh(*nft, "add", "rule", "inet", "loss", "in", *rule.split())

    def refuse(self, host: str, port: int | None) -> None:
        """Break a host's connections to a port, and refuse new ones; None: no more of that."""
        nft = ("ip", "netns", "exec", self._tag + host, "nft")
        sh(*nft, "delete", "table", "inet", "refuse", check=False)
        if port is not None:
            sh(*nft, "add", "table", "inet", "refuse")
            sh(
                *nft,
                "add",
                "chain",
                "inet",
                "refuse",
                "out",
                "{ type filter hook output priority 0 ; }",
            )
            rule = f"tcp dport {port} reject with tcp reset"
            sh(*nft, "add", "rule", "inet", "refuse", "out", *rule.split())

    def shared_memory(self, host: str) -> list[str]:
        """Files in a host's /dev/shm."""
        return self.run(host, "ls", "/dev/shm").split()

    def _end(self, host: str) -> None:
        init = self._inits[host]
        init.kill()  # takes the host's init with it, and that all its processes
        init.wait()
        if host in self._ray:
            self._ray[host].wait()

    def down(self) -> None:
        """Cut everybody's power and remove the namespaces."""
        self._forget_nodes()
        for host in self.address:
            self._end(host)
            sh("ip", "netns", "del", self._tag + host, check=False)
        sh("ip", "netns", "del", self._switch, check=False)


def possible() -> bool:
    """Whether this machine lets us make hosts."""
    if os.geteuid() != 0 or not all(
        shutil.which(tool) for tool in ("ip", "tc", "nft", "unshare", "nsenter")
    ):
        return False
    return (
        subprocess.run(
            ["unshare", "--net", "--pid", "--fork", "--mount", "true"], check=False
        ).returncode
        == 0
    )
