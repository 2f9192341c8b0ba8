"""Wait for what happens on another thread, in another process, or on another host."""

import subprocess
import time
from collections.abc import Callable

# Seconds for what takes some, on a machine that is busy with more: reached only where something is broken.
PATIENCE = 240.0


def await_that(
    condition: Callable[[], object],
    what: str = "it",
    seconds: float = 60.0,
    *,
    every: float = 0.01,
    while_alive: subprocess.Popen[str] | None = None,
) -> None:
    """Return as soon as the condition is met; fail when time is up, or when a process has ended before."""
    end = time.monotonic() + seconds
    while not condition():
        if while_alive is not None:
            assert while_alive.poll() is None, (
                f"ended before {what}: {while_alive.stdout and while_alive.stdout.read()}"
            )
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(every)
