"""Retries of what may fail for a while: a store that does not answer, a disk that is full."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
"""Errors that stay however long one waits."""

# Seconds between two tries: the first pause, doubled after each, up to the longest.
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.1, 5.0
# Of the system: forked processes would share the numbers of another one, and a step may draw from the global one.
_SYSTEM_RANDOM = random.SystemRandom()


def is_transient(error: OSError) -> bool:
    """Return whether a failure may pass: a full disk or a store that does not answer, not what is forbidden."""
    return not isinstance(error, PERMANENT_ERRORS) and error.errno != errno.EROFS


def call_with_retries(
    call: Callable[[], T],
    retry_seconds: float,
    *,
    should_retry: Callable[[OSError], bool] = is_transient,
    on_retry: Callable[[OSError, int], None] = lambda error, failures: None,
) -> T:
    """Call a function, and again if it fails, for a while; return what it returns.

    Pauses grow from 0.1 to 5 s. Each is drawn between half and one and a half of that, so that the ranks do not all
    ask a store that is in trouble at once.

    Args:
        act: the function; what it raises besides OSError is raised at once.
        patience: seconds until the last try.
        transient: whether an error may pass; one that may not is raised at once.
        again: is called before each pause, with the error and the number of failures so far.

    Raises:
        OSError: of the last try.
    """
    end = time.monotonic() + retry_seconds
    pause = _FIRST_PAUSE_SECONDS
    failures = 0
    while True:
        try:
            return call()
        except OSError as error:
            left = end - time.monotonic()
            if left <= 0 or not should_retry(error):
                raise
            failures += 1
            on_retry(error, failures)
        time.sleep(min(left, pause * _SYSTEM_RANDOM.uniform(0.5, 1.5)))
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)
