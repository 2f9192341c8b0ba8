import errno
from types import SimpleNamespace

import pytest

from distrain.data.storage import retry as retry_module
from distrain.data.storage.retry import call_with_retries, is_transient


class Failing:
    """Fails with each of these errors, and then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture
def slept(monkeypatch):
    """The pauses, on a clock that stands still but for them."""
    pauses = []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(retry_module, "time", clock)
    return pauses


def test_what_may_pass_is_tried_again_and_told_each_time(slept):
    first, second = OSError(errno.ENOSPC, "full"), ConnectionError("away")
    act, told = Failing(first, second), []
    assert call_with_retries(act, 60, on_retry=lambda *what: told.append(what)) == 7
    assert told == [(first, 1), (second, 2)]
    assert len(slept) == 2


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("x"), OSError(errno.EROFS, "x")]
)
def test_what_lasts_is_raised_at_once(slept, error):
    act = Failing(error)
    with pytest.raises(type(error)):
        call_with_retries(act, 60)
    assert (act.calls, slept, is_transient(error)) == (1, [], False)
    assert call_with_retries(Failing(error), 60, should_retry=lambda _: True) == 7


def test_other_errors_are_not_its_business(slept):
    act = Failing(ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        call_with_retries(act, 60)
    assert act.calls == 1


def test_pauses_double_up_to_five_seconds_and_the_last_try_comes_at_the_end(slept):
    act = Failing(*[OSError("away")] * 100)
    with pytest.raises(OSError, match="away"):
        call_with_retries(act, 60)
    assert sum(slept) == pytest.approx(60)
    assert act.calls == len(slept) + 1
    for i, pause in enumerate(slept[:-1]):
        middle = min(0.1 * 2**i, 5.0)
        assert 0.5 * middle <= pause <= 1.5 * middle
    assert len(set(slept)) == len(slept), "two ranks would ask at the same time"


def test_without_patience_there_is_one_try(slept):
    act = Failing(OSError("away"))
    with pytest.raises(OSError, match="away"):
        call_with_retries(act, 0)
    assert (act.calls, slept) == (1, [])
