import json

import pytest
from records import eval_record, train_record

from distrain.monitor.records import from_tree, to_tree


@pytest.mark.parametrize(
    "record", [train_record(), eval_record(loss=float("inf"))], ids=["train", "eval"]
)
def test_a_record_comes_back_from_json(record):
    tree = json.loads(json.dumps(to_tree(record)))
    assert next(iter(tree)) == "kind"
    assert from_tree(tree) == record
    assert from_tree({**tree, "younger": 1}) == record, (
        "a field that this version does not know"
    )


def test_null_is_a_number_that_json_lacks():
    tree = {**to_tree(eval_record()), "loss": None}
    loss = from_tree(tree).loss
    assert loss != loss


def test_a_record_of_no_known_kind_is_refused():
    with pytest.raises(KeyError, match="test"):
        from_tree({**to_tree(eval_record()), "kind": "test"})
