import json
from dataclasses import asdict

import pytest

from distrain.optim.early_stopping import StopState
from distrain.optim.schedule import PlateauState
from distrain.training.checkpoint_state import BestEval, CheckpointState

STATE = CheckpointState(
    cursor={"epoch": 2, "step": 3},
    config={"epochs": 5},
    result={"epochs": 5},
    environment={"torch": "2.14"},
    hardware="ab",
    bad_samples={10: "cut off", 9: "no image"},
    best=BestEval(step=40, top1=7, samples=9, val="cd"),
    scheduled_best=BestEval(step=20, top1=6, samples=9, val="cd"),
    plateau=PlateauState(7, 1, (20, 40)),
    stop=StopState(7, 2),
    val="cd",
    reduction="exact",
)


@pytest.mark.parametrize("best", [STATE.best, None])
def test_a_state_comes_back_from_json(best):
    state = CheckpointState(**{**vars(STATE), "scheduled_best": best})
    assert from_json(state) == state
    state = CheckpointState(**{**vars(STATE), "best": best})
    assert from_json(state) == state


def from_json(state):
    header = {"format": 3, "step": 43, "attempt": 1}  # a checkpoint's own
    return CheckpointState.from_dict(
        json.loads(json.dumps({**header, **state.to_dict()}))
    )


def test_one_that_knows_only_the_best_of_all_evaluations():
    tree = json.loads(json.dumps(STATE.to_dict()))
    del tree["scheduled_best"]
    del tree["stop"]
    state = CheckpointState.from_dict(tree)
    assert (state.scheduled_best, state.stop) == (STATE.best, StopState())


def test_what_earlier_versions_wrote_is_written_still():
    """Names and forms of state.json: bad samples in order, by text; no best yet is an empty object."""
    tree = STATE.to_dict()
    assert list(tree["bad_samples"].items()) == [("9", "no image"), ("10", "cut off")]
    assert tree["best"] == {"step": 40, "top1": 7, "samples": 9, "val": "cd"}
    assert CheckpointState(**{**vars(STATE), "best": None}).to_dict()["best"] == {}
    assert (
        tree["plateau"]
        == asdict(STATE.plateau)
        == {"best": 7, "epochs": 1, "drops": (20, 40)}
    )
    assert list(tree) == [
        "cursor",
        "config",
        "result",
        "environment",
        "hardware",
        "bad_samples",
        "best",
        "scheduled_best",
        "plateau",
        "stop",
        "val",
        "reduction",
    ]
