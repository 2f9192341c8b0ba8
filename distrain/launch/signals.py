"""Ctrl-C and SIGTERM, for every launcher: the first stops, the second kills."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING_LINE = "stopping: saving first (a second signal ends the run at once)"
"""Line for the console at the first signal."""


@contextmanager
def stop_on_signals(on_stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call `on_stop` at the first Ctrl-C or SIGTERM; a second one ends the process.

    Args:
        on_stop: runs inside the signal handler, which may interrupt any call, even a
            print: it must do no more than set something.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def handle_signal(number: int, _: FrameType | None) -> None:
        # First, so that a second signal ends the process even if this one hangs.
        restore_handlers()
        received.append(number)
        on_stop()

    # Only the main thread may set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    for number in previous_handlers:
        signal.signal(number, handle_signal)
    try:
        yield received
    finally:
        restore_handlers()
