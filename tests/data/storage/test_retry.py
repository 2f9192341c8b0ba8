import errno
import time

import pytest

from distrain.data.storage.retry import is_transient, retry


class Failing:
    """Fails with each of these errors, and then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def test_what_may_pass_is_tried_again_and_told_each_time():
    first, second = OSError(errno.ENOSPC, "full"), ConnectionError("away")
    act, told = Failing(first, second), []
    assert retry(act, 60, again=lambda *what: told.append(what)) == 7
    assert told == [(first, 1), (second, 2)]


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), OSError(errno.EROFS, "x")])
def test_what_lasts_is_raised_at_once(error):
    act = Failing(error)
    with pytest.raises(type(error)):
        retry(act, 60)
    assert (act.calls, is_transient(error)) == (1, False)
    act = Failing(error)
    assert retry(act, 60, transient=lambda _: True) == 7


def test_other_errors_are_not_its_business():
    act = Failing(ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        retry(act, 60)
    assert act.calls == 1


def test_the_last_try_comes_when_the_patience_is_over():
    def never():
        tries.append(time.monotonic())
        raise OSError("away")

    tries = []
    began = time.monotonic()
    with pytest.raises(OSError, match="away"):
        retry(never, 0.5)
    assert tries[-1] - began >= 0.5 > tries[-2] - began
    assert tries[1] - began >= 0.05
    assert len(tries) <= 6  # after 0.1, 0.2 and 0.4 s, or half of each, and at the end
    tries = []
    with pytest.raises(OSError, match="away"):
        retry(never, 0)
    assert len(tries) == 1
