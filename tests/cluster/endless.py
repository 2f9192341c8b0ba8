"""Commands of distrain's on hosts, a run without an end that tests share, and the reference that it must equal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hosts import HEAD, PYTHON, Hosts
from processes import Processes
from waiting import PATIENCE, await_that

from distrain.config import Config, to_yaml

Digests = dict[str, str]


class Run:
    """A command as a process on a host, its lines read as they come, with their times."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self._began = process, time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))

    def join(self) -> None:
        self._reader.join()

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    @property
    def text(self) -> str:
        return "\n".join(
            f"{at - self._began:6.1f} s  {line}" for at, line in self.lines
        )

    def since(self, at: float) -> str:
        """The lines after a time."""
        return "\n".join(line for when, line in self.lines if when > at)

    def told(self, pattern: str, since: float = 0.0) -> float | None:
        """When a line matched for the first time."""
        return next(
            (at for at, line in self.lines if at > since and re.search(pattern, line)),
            None,
        )

    def wait_for(self, pattern: str, since: float = 0.0) -> float:
        """When a line matched for the first time: wait for one."""
        self.wait_until(lambda: self.told(pattern, since), pattern)
        found = self.told(pattern, since)
        assert found is not None, self.text
        return found

    def wait_for_step(self, step: int) -> None:
        self.wait_until(
            lambda: (
                max(map(int, re.findall(r"step (\d+)/", self.text)), default=0) >= step
            ),
            f"step {step}",
        )
        assert not self.is_over, self.text

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Return when the condition is met, or the command has ended; fail, with all that it told, after a while."""
        try:
            await_that(lambda: condition() or self.is_over, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text}") from None
        if self.is_over:
            self.join()

    def end(self, code: int = 0) -> str:
        self.process.wait(timeout=PATIENCE)
        self.join()
        assert self.process.returncode == code, self.text
        return self.text

    def weights(self) -> str:
        found = re.search(r"weights +(\w+)", self.end())
        assert found, self.text
        return found[1]


class Commands:
    """Starts `distrain ...` on hosts; what is left of it dies at the end."""

    def __init__(self, hosts: Hosts | Processes, folder: Path, recipe: Config) -> None:
        self._hosts, self._folder, self._recipe = hosts, folder, recipe
        self._started: list[Run] = []

    def __call__(
        self,
        *arguments: str,
        config: Config | None = None,
        host: str = HEAD,
        address: str | None = "auto",
    ) -> Run:
        """`distrain train`."""
        where = () if address is None else (f"--address={address}",)
        return self.distrain(
            host, "train", self.written(config or self._recipe), *where, *arguments
        )

    def distrain(self, host: str, *arguments: str, **options: Any) -> Run:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = (PYTHON, "-m", "distrain", *arguments)
        self._started.append(
            Run(
                self._hosts.popen(
                    host, *command, cwd=str(self._folder), **pipes, **options
                )
            )
        )
        return self._started[-1]

    def written(self, config: Config) -> str:
        """The path of a config as a file."""
        path = self._folder / "recipe.yaml"
        path.write_text(to_yaml(config))
        return str(path)

    def signal(self, number: signal.Signals, host: str = HEAD) -> None:
        """Send a signal to the host's `distrain train`."""
        (pid,) = self._hosts.pids(host, "-m distrain train")
        os.kill(pid, number)

    def leftovers(self) -> list[tuple[str, str]]:
        """Processes of a run and its shared memory, of any host: what must be gone after it."""
        found = []
        for host in ("n1", "n2", "n3"):
            kinds = ("ray::RayTrain", "ray::Train", "ray::Mailbox")
            found += [(host, kind) for kind in kinds if self._hosts.pids(host, kind)]
            shared = self._hosts.shared_memory(host)
            found += [
                (host, name) for name in shared if "torch" in name or "distrain" in name
            ]
        return found

    def end(self) -> None:
        for host in self._hosts.address:
            for pid in self._hosts.pids(host, "-m distrain "):
                os.kill(pid, signal.SIGKILL)
        for run in self._started:
            run.process.wait(timeout=10)
            run.join()


class Process(Protocol):
    """A run somewhere."""

    @property
    def text(self) -> str:
        """All that it has told."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""


class Reference:
    """A recipe without an end, in one process that nothing disturbs; it trains while somebody asks for a step."""

    def __init__(
        self, config: Config, folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._run = folder / "reference"
        keep = {"checkpoint": config.checkpoint.model_copy(update={"keep": 100_000})}
        cluster = {
            "cluster": config.cluster.model_copy(update={"stall": 1e6})
        }  # it may wait long to be asked
        path = folder / "reference.yaml"
        path.write_text(
            to_yaml(
                config.model_copy(update={"run": str(self._run), **keep, **cluster})
            )
        )
        command = [
            sys.executable,
            str(Path(__file__).with_name("reference.py")),
            str(path),
        ]
        unpaced = {key: value for key, value in environment.items() if key != "PACE"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, env=unpaced
        )

    def check(self, run: Process, config: Config) -> None:
        """Compare a run's next checkpoint with that of the same step here: weights and optimizer, bit by bit."""
        folder = Path(str(config.run))
        before = saved(folder)

        def news() -> list[Path]:
            # Where it was stopped it has saved at any step; the reference saves every so many.
            return [
                path
                for path in saved(folder)
                if path not in before and step_of(path) % config.checkpoint.every == 0
            ]

        await_that(lambda: news() or run.is_over, "a checkpoint", PATIENCE)
        assert news(), run.text
        found = news()[0]
        assert digests(found) == self._digests(step_of(found)), (
            f"{found.name}\n{run.text}"
        )

    def _digests(self, step: int) -> Digests:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{step}\n")
        self._process.stdin.flush()
        await_that(
            lambda: saved(self._run, step),
            f"step {step} of the reference",
            PATIENCE,
            while_alive=self._process,
        )
        return digests(saved(self._run, step)[-1])

    def end(self) -> None:
        self._process.communicate()


class Endless:
    """One run without an end on all hosts: started when it is needed, resumed when something has ended it."""

    def __init__(
        self, commands: Commands, config: Config, reference: Reference
    ) -> None:
        self.commands, self.config, self._reference = commands, config, reference
        self.run: Run | None = None
        self._overrides: tuple[str, ...] = ()

    def train(self, *overrides: str) -> Run:
        """The run, on three workers and training, with a checkpoint, and these settings in place of its own."""
        folder = Path(str(self.config.run))
        if self.run and not self.run.is_over and overrides != self._overrides:
            self.stop()
        if self.run is None or self.run.is_over:
            self._overrides = overrides
            resume = ("--resume",) if saved(folder) else ()
            self.run = self.commands(
                "--workers=1-3", *resume, *overrides, config=self.config
            )
        run = self.run
        run.wait_until(
            lambda: trains_on(run.text, 3) and saved(folder),
            "three workers that train, and a checkpoint",
        )
        assert not run.is_over, run.text
        return run

    def check(self) -> None:
        """Compare the next checkpoint with the reference's."""
        assert self.run is not None
        self._reference.check(self.run, self.config)

    def stop(self) -> None:
        """End it as Ctrl-C does: it saves, and leaves nothing behind."""
        if self.run is not None and not self.run.is_over:
            self.commands.signal(signal.SIGINT)
            assert "stopped and saved after step" in self.run.end(130)
            await_that(
                lambda: self.commands.leftovers() == [], "all ranks to end", PATIENCE
            )

    def forget(self) -> None:
        """After a test that failed: the next one starts it anew."""
        self.commands.end()
        shutil.rmtree(str(self.config.run), ignore_errors=True)


def trains_on(text: str, workers: int) -> bool:
    """Whether the last worker group that a run tells of has so many workers, and has told a step."""
    formed = text.rpartition("worker group formed: ")[2]
    return (
        formed.startswith(f"{workers} worker")
        and re.search(r"epoch \d+  step \d+/", formed) is not None
    )


def saved(run: Path, step: int | None = None) -> list[Path]:
    """The whole checkpoints in a run directory, in the order of their steps; those after a step, if one is given."""
    name = "*" if step is None else f"step-{step:08d}-*"
    return sorted(path.parent for path in run.glob(f"checkpoints/{name}/manifest.json"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def digests(checkpoint: Path) -> Digests:
    """SHA-256 of the files with weights and optimizer."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    return {
        name: manifest[name]["sha256"]
        for name in ("model.safetensors", "optimizer.safetensors")
    }
