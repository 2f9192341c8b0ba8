"""Wait for what happens on another thread, in another process, or on another host."""

import subprocess
import time
from collections.abc import Callable

from forks import Fork

# Seconds for what takes some, on a machine that is busy with more: reached only where something is broken.
PATIENCE = 240.0


def await_that(
    condition: Callable[[], object],
    what: str = "it",
    seconds: float = 60.0,
    *,
    while_alive: subprocess.Popen[str] | Fork | None = None,
) -> None:
    """Return as soon as the condition is met; fail when time is up, or when a process has ended before.

    A condition that takes long is asked less often: it takes at most a fifth of a core from what is waited for.
    """
    end = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        if while_alive is not None:
            assert while_alive.poll() is None, (
                f"ended before {what}: {_output_of(while_alive)}"
            )
        now = time.monotonic()
        assert now < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(min(1.0, max(0.01, 4 * (now - asked))))


def _output_of(process: subprocess.Popen[str] | Fork) -> str:
    if isinstance(process, Fork):
        return process.out + process.err
    return process.stdout.read() if process.stdout else ""
