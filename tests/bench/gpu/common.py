"""Shared by all groups of the sheet: folders, results as JSON lines, a clock. It does not import torch."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEVICE_NAME = os.environ.get("SHEET_DEVICE", "cuda:0")
DRY = DEVICE_NAME == "cpu"
"""A dry run, which tries the sheet itself where there is no GPU: tiny sizes."""
TMP = Path(os.environ.get("SHEET_TMP", "/tmp")) / "sheet"
DATA = TMP / "data"
RESULTS = Path(os.environ.get("OUT", "."))
LEFT_OUT = "left out for lack of time"
"""What a line says of a part that was not run; `part` names it."""
END = "end"
"""What the last line of a group says."""


class Out:
    """The results of a group: `out(what, key=value, ...)` writes one line, at once. An `error` key is a failure."""

    def __init__(self, group: str, seconds: float) -> None:
        """`seconds`: how long the group may take, from now on."""
        self._group = group
        self._began = time.monotonic()
        self._seconds = seconds
        TMP.mkdir(parents=True, exist_ok=True)
        self._file = open(TMP / f"{group}.jsonl", "a", buffering=1)  # noqa: SIM115

    def __call__(self, what: str, **values: Any) -> None:
        line = {
            "group": self._group,
            "what": what,
            "at": round(time.monotonic() - self._began, 1),
            **values,
        }
        self._file.write(json.dumps(line, default=str) + "\n")

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._seconds - (time.monotonic() - self._began)

    def has(self, seconds: float, part: object) -> bool:
        """Return whether so many seconds are left, and if not, write that this part is left out."""
        if self.left() >= seconds:
            return True
        self(LEFT_OUT, part=part)
        return False

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Write an error down instead of raising it, so that the rest of the group runs.

        A process that was killed because the group's time was over is no error, but left out.
        """
        began = time.monotonic()
        try:
            yield
        except subprocess.TimeoutExpired as error:
            values = {"seconds": error.timeout, "end": str(error.output or "")[-600:]}
            if self.left() > 0:
                self(what, error="out of time", **values)
            else:
                self(LEFT_OUT, part=what, **values)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames][-4:]
            text = " ".join(str(error).split())
            self(what, error=f"{type(error).__name__}: {text[:600]}", where=where)
        finally:
            seconds = time.monotonic() - began
            if seconds > 15:
                self(what, note="slow", seconds=round(seconds, 1))


def wait_for(path: Path, seconds: float) -> bool:
    """Wait until a file is there; return False if it is not in time."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def main(groups: Mapping[str, Callable[[Out], None]]) -> None:
    """Run one group of a script: `SCRIPT GROUP SECONDS`."""
    name = sys.argv[1]
    out = Out(name, float(sys.argv[2]))
    with out.guarded("whole group"):
        groups[name](out)
    out(END)
