"""What the driver does with what ranks and Ray report. Ray is a stand-in."""

import threading
from types import SimpleNamespace

import pytest

from distrain.config import parse_config
from distrain.errors import RunError
from distrain.launch import ray_driver
from distrain.launch.allocation import Allocation
from distrain.launch.ray_driver import _RayDriver

RECIPE = {
    "data": {"train": "x"},
    "schedule": {"name": "constant", "lr": 1.0},
    "cluster": {"max_failures": 2},
}


@pytest.fixture
def driver(monkeypatch, console):
    remote = SimpleNamespace(remote=lambda *_: None)
    mailbox = SimpleNamespace(get_env=remote, send_message=remote, request_stop=remote)
    monkeypatch.setattr(ray_driver, "create_mailbox", lambda: mailbox)
    monkeypatch.setattr(ray_driver.ray, "get", lambda _: "set")
    config = parse_config(RECIPE, "test")
    return _RayDriver(config, console, None, {}, threading.Event())


def test_groups_that_never_form_end_the_run(driver, monkeypatch):
    """Each loss before a group has formed counts; one after that does not."""
    driver._formed_since_failure = True
    told = iter([{0: "killed"}, {0: "no GPU"}, {1: "no GPU"}])
    stopped = threading.Event()
    monkeypatch.setattr(
        ray_driver, "build_trainer", lambda *_: SimpleNamespace(fit=stopped.wait)
    )
    driver._handle_messages = lambda wait: driver._on_rank_errors(next(told))
    sentence = (
        "2 worker groups in a row were lost before their workers were connected; "
        "the first failure was: lost rank 0"
    )
    with pytest.raises(RunError, match=sentence):
        driver._run_one_fit(1, Allocation(1, 1, 1, 1))
    stopped.set()


def test_an_interruption_and_its_cost_are_one_line(driver, console):
    driver._on_group_formed([("a", "10.0.0.1"), ("b", "10.0.0.2")], None)
    driver._on_training_started(step=0, steps=90, steps_per_epoch=30)
    driver._last_step = 25
    driver._on_rank_errors({1: "killed"})
    driver._on_training_started(step=20, steps=90, steps_per_epoch=30)
    formed, lost, resumed = (
        event for event in console.events if not event.startswith(("start ", "stop"))
    )
    assert formed == "worker group formed: 2 workers (1 on 10.0.0.1, 1 on 10.0.0.2)"
    assert lost == "lost rank 1 on 10.0.0.2: killed"
    assert resumed.startswith("training resumed after 0.0 s, from step 20: ")
    assert resumed.endswith("about 5 steps recomputed")
