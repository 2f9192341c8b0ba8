"""Run the groups of the sheet, each in a process with a limit of its own: `sheet.py SECONDS [GROUP,...]`.

Checks run side by side, measurements one after another. Each result is a line of $OUT/sheet.jsonl as soon as it is
known; a short form of it is printed. The exit code is 1 if a group did not end by itself or reported an error; running
out of time is a failure in a dry run only.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from common import DRY, END, LEFT_OUT, RESULTS, TMP

HERE = Path(__file__).parent
BEGAN = time.monotonic()
CHECKS = {  # group: script, seconds at most
    "smoke": ("smoke.py", 90),
    "race": ("race.py", 70),
    "exact": ("exact.py", 105),
    "repeat": ("repeat.py", 90),
    "rebuilds": ("rebuilds.py", 60),
    "pytest": ("suite.py", 105),
}
MEASUREMENTS = {  # group: script, share of the time that is left
    "compute": ("compute.py", 62),
    "loop": ("loop.py", 92),
    "loader": ("loader.py", 60),
    "peers": ("plain_loop.py", 26),
    "fused": ("fused.py", 30),
    "profile": ("profiling.py", 24),
}
GROUPS = ("env", *CHECKS, *MEASUREMENTS)
NEED_SETS = {"exact", "loop", "loader", "peers"}
"""Groups that read the sets which prep.py makes."""
# Load, clocks and memory of the GPU, once a second; the load of its JPEG engine among them.
MONITOR = ("nvidia-smi", "dmon", "-s", "pucm", "-d", "1", "-o", "T")


class Report:
    """Writes and prints results, and remembers what failed and what was left out."""

    def __init__(self, file: TextIO) -> None:
        """`file`: gets a line of JSON for each result."""
        self._file = file
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def add(self, line: dict[str, Any]) -> None:
        """Take a result."""
        self._file.write(json.dumps(line) + "\n")
        line = dict(line)
        group = line.pop("group")
        what = line.pop("what")
        line.pop("at", None)
        if "error" in line:
            which = f", {line['how']}" if "how" in line else ""
            self.failed.append(f"{group}: {what}{which}: {line['error']}")
        elif what == LEFT_OUT:
            self.left_out.append(f"{group}: {line.get('part', 'all of it')}")
        values = " ".join(
            f"{k}={json.dumps(v) if isinstance(v, list | dict) else v}"
            for k, v in line.items()
        )
        text = f"{time.monotonic() - BEGAN:4.0f} {group}: {what} {values}"
        print(text[: 300 if line.keys() & {"error", "top"} else 230], flush=True)  # noqa: T201

    def say(self, group: str, what: str, **values: Any) -> None:
        """Add a result of the sheet itself."""
        self.add({"group": group, "what": what, **values})

    def close(self) -> int:
        """Print what failed and what was left out, and return the exit code."""
        self.say(
            "sheet",
            "done",
            seconds=round(time.monotonic() - BEGAN),
            failed=self.failed,
            left_out=self.left_out,
        )
        for title, entries in (
            ("failed", self.failed),
            ("left out for lack of time", self.left_out),
        ):
            if entries:
                print("\n   ".join([f"{title}:", *entries]), flush=True)  # noqa: T201
        return int(bool(self.failed or (DRY and self.left_out)))


class Group:
    """A group that runs in a process of its own."""

    def __init__(self, name: str, script: str, seconds: float) -> None:
        """Start it; it is told to be done a little before its time is up."""
        self.name = name
        self._end = time.monotonic() + seconds
        self._lines = TMP / f"{name}.jsonl"
        self._read = 0
        self._has_ended = False
        command = [sys.executable, str(HERE / script), name, str(seconds - 3)]
        with open(TMP / f"{name}.err", "wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
        self._is_running = True

    def poll(self, report: Report) -> bool:
        """Move new results to the report, and return whether the group still runs."""
        if not self._is_running:
            return False
        code = (
            self._process.poll()
        )  # first, so that all lines are there when it has ended
        self._move_lines(report)
        if code is None and time.monotonic() > self._end:
            self._signal(signal.SIGABRT)  # Python says where it is
            time.sleep(1)
            self.kill()
            self._move_lines(report)
            report.say(self.name, LEFT_OUT, part="what came after this, it was stopped")
        elif code is not None:
            self.kill()  # what it started and did not end
            if code != 0:
                report.say(self.name, "ended", error=f"exit code {code}")
            elif not self._has_ended:
                report.say(self.name, "ended", error="without its last line")
        return self._is_running

    def kill(self) -> None:
        """End it, with all that it has started."""
        if not self._is_running:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._is_running = False

    def _move_lines(self, report: Report) -> None:
        if not self._lines.exists():
            return
        data = self._lines.read_bytes()
        end = data.rfind(b"\n") + 1
        for text in data[self._read : end].decode().splitlines():
            line = json.loads(text)
            self._has_ended = self._has_ended or line["what"] == END
            report.add(line)
        self._read = end

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def wait(groups: Sequence[Group], report: Report) -> None:
    """Wait for groups that run side by side."""
    while any([group.poll(report) for group in groups]):  # noqa: C419 -- all of them, each time
        time.sleep(0.2)


class Sheet:
    """Starts the groups that are wanted, within the time that there is."""

    def __init__(self, seconds: float, wanted: Sequence[str], report: Report) -> None:
        self._end = BEGAN + seconds
        self._wanted = wanted
        self._report = report
        self._groups: list[Group] = []

    def run(self) -> None:
        """Run them all."""
        side_by_side = []
        if NEED_SETS.intersection(self._wanted):
            side_by_side.append(self._start("prep", "prep.py", 90))
        if "env" in self._wanted:
            wait([self._start("env", "machine.py", 40)], self._report)
        for name, (script, seconds) in CHECKS.items():
            if name in self._wanted:
                side_by_side.append(self._start(name, script, seconds))
        wait(side_by_side, self._report)
        left = [name for name in MEASUREMENTS if name in self._wanted]
        for i, name in enumerate(left):
            script, share = MEASUREMENTS[name]
            limit = (
                self._left() * share / sum(MEASUREMENTS[other][1] for other in left[i:])
            )
            if (self._left() if DRY else limit) < 8:
                self._report.say(name, LEFT_OUT)
                continue
            wait([self._start(name, script, limit)], self._report)

    def stop(self) -> None:
        """End what still runs."""
        for group in self._groups:
            group.kill()

    def _start(self, name: str, script: str, seconds: float) -> Group:
        """Start a group. A dry run, on a machine that may be slow, has no limits but that of the whole sheet."""
        group = Group(name, script, self._left() if DRY else min(seconds, self._left()))
        self._groups.append(group)
        return group

    def _left(self) -> float:
        return self._end - time.monotonic() - 4


def write_errors() -> None:
    """Join what groups wrote to their standard error, stacks of those that hung among it."""
    with open(RESULTS / "errors.txt", "w") as errors:
        for path in sorted(TMP.glob("*.err")):
            text = path.read_text(errors="replace")
            end = text[-100_000:] if len(text) > 100_000 else ""
            errors.write(f"===== {path.name}\n{text[:100_000]}\n{end}\n")


def main(arguments: Sequence[str]) -> int:
    """Run the sheet and return its exit code."""
    seconds = float(arguments[0])
    wanted = arguments[1].split(",") if len(arguments) > 1 else list(GROUPS)
    unknown = set(wanted).difference(GROUPS)
    if unknown:
        sys.stderr.write(
            f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}\n"
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shutil.rmtree(TMP, ignore_errors=True)  # of an earlier call
    TMP.mkdir(parents=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    monitor = None
    with open(RESULTS / "sheet.jsonl", "a", buffering=1) as file:
        report = Report(file)
        commit = HERE / "commit"
        if commit.exists():  # pack.sh writes it
            report.say("sheet", "commit", commit=commit.read_text().strip())
        sheet = Sheet(seconds, wanted, report)
        try:
            if not DRY and shutil.which(MONITOR[0]):
                with open(RESULTS / "dmon.txt", "wb") as log:
                    monitor = subprocess.Popen(MONITOR, stdout=log, stderr=log)
            sheet.run()
        finally:
            sheet.stop()
            if monitor is not None:
                monitor.kill()
            write_errors()
        return report.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
