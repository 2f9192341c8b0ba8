"""Ctrl-C and SIGTERM, the same for every launcher: the first one asks, a second one insists."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signals(on_stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call `stop` at the first Ctrl-C or SIGTERM; a second one ends the process at once.

    Yields:
        the signals that came.
    """
    received: list[int] = []

    def handle_signal(number: int, _: FrameType | None) -> None:
        for s, handler in before.items():
            signal.signal(s, handler)
        received.append(number)
        on_stop()  # this may run inside any call, a print included: it must do no more than set something

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, handle_signal)
    try:
        yield received
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
