import json

import pytest
from records import eval_record, train_record

from distrain.monitor.records import record_from_dict, record_to_dict


@pytest.mark.parametrize(
    "record", [train_record(), eval_record(loss=float("inf"))], ids=["train", "eval"]
)
def test_a_record_comes_back_from_json(record):
    tree = json.loads(json.dumps(record_to_dict(record)))
    assert next(iter(tree)) == "kind"
    assert record_from_dict(tree) == record
    assert record_from_dict({**tree, "younger": 1}) == record, (
        "a field that this version does not know"
    )


def test_an_earlier_version_logged_no_phases():
    tree = record_to_dict(train_record(phase_seconds={"forward": 1.0}))
    assert record_from_dict(tree).phase_seconds == {"forward": 1.0}
    del tree["phase_seconds"]
    assert record_from_dict(tree).phase_seconds == {}


def test_null_is_a_number_that_json_lacks():
    tree = {**record_to_dict(eval_record()), "loss": None}
    loss = record_from_dict(tree).loss
    assert loss != loss


def test_a_record_of_no_known_kind_is_refused():
    with pytest.raises(KeyError, match="test"):
        record_from_dict({**record_to_dict(eval_record()), "kind": "test"})
