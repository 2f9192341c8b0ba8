"""Retries of transient failures: a store that does not answer, a disk that is full."""

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class RefusedError(PermissionError):
    """A store refuses a request, and will refuse it again: what to set is the message.

    Forbidden, in another region, with a token that has expired, to no bucket.
    """


PERMANENT_ERRORS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
"""Errors that no waiting resolves."""

# The pause before a retry starts at the first, and doubles up to the maximum.
_FIRST_PAUSE_SECONDS = 0.1
_MAX_PAUSE_SECONDS = 5.0
# The system's generator: forked processes would inherit the state of any other one and
# pause alike, and drawing from the global one could change what a training step draws.
_SYSTEM_RANDOM = random.SystemRandom()


def is_transient(error: OSError) -> bool:
    """Return whether an error is transient.

    A full disk or a store that does not answer is; a missing, forbidden or read-only
    file is not.
    """
    return not isinstance(error, PERMANENT_ERRORS) and error.errno != errno.EROFS


def call_with_retries(
    call: Callable[[], T],
    retry_seconds: float,
    *,
    should_retry: Callable[[OSError], bool] = is_transient,
    on_retry: Callable[[OSError, int], None] = lambda error, failures: None,
) -> T:
    """Call a function, retry it while it fails, and return its result.

    The pauses grow from 0.1 to 5 s. Each is drawn between half and one and a half of
    that, so that the ranks do not all request at once from a store in trouble.

    Args:
        call: the function; what it raises besides OSError is raised at once.
        retry_seconds: seconds after which a failure is no longer retried.
        should_retry: whether an error is retried; any other is raised at once.
        on_retry: called before each pause, with the error and the number of failures
            so far.

    Raises:
        OSError: the last attempt failed.
    """
    end = time.monotonic() + retry_seconds
    pause = _FIRST_PAUSE_SECONDS
    failures = 0
    while True:
        try:
            return call()
        except OSError as error:
            seconds_left = end - time.monotonic()
            if seconds_left <= 0 or not should_retry(error):
                raise
            failures += 1
            on_retry(error, failures)
        # Cut to the time left, so that the last try comes at its end.
        time.sleep(min(seconds_left, pause * _SYSTEM_RANDOM.uniform(0.5, 1.5)))
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)
