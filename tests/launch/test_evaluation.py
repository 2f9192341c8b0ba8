"""`distrain.evaluate` on this machine; tests/cluster has workers of Ray's."""

import json

import pytest

import distrain
from distrain.data.shards.manifest import Manifest
from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.inference.scoring import evaluate_part
from distrain.inference.trained_model import open_trained_model
from distrain.launch import evaluation
from distrain.launch.eval_request import EvalRequest
from distrain.monitor.sinks import SilentConsole


def test_the_validation_set_of_the_run_is_the_default(trained, digits):
    told = []
    found = distrain.evaluate(trained.run, on_progress=lambda *n: told.append(n))
    record = trained.records[-1]
    assert found.result.top1_count == record.top1_count
    assert found.result.loss == record.loss
    (origin,) = found.origins
    assert (origin.run, origin.step) == (str(trained.run), record.step)
    assert found.data == str(digits / "val")
    manifest = Manifest.load(Store(found.data))
    assert found.data_fingerprint == manifest.fingerprint
    assert found.hardware_differences == {}
    assert (told[0], told[-1]) == ((0, 359), (359, 359))


def test_another_set_and_an_ensemble(trained, digits):
    found = distrain.evaluate(
        [trained.run, trained.run], digits / "train", crops="ten", checkpoint="best"
    )
    assert len(found.origins) == 2
    assert found.result.num_samples == 1438
    assert found.crops == "ten"


def test_images_left_out_are_named(trained, tmp_path, damaged_set):
    damaged_set(tmp_path / "set", {3}, classes=10)
    found = distrain.evaluate(trained.run, tmp_path / "set", console=SilentConsole())
    ((name, reason),) = found.left_out.items()
    assert name == "shard-00000.parquet row group 0 row 3"
    assert "not recognized" in reason
    assert found.to_dict()["left_out"] == {name: reason}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crops": "five"}, "crops 'five' is not one of center, ten"),
        ({"models": []}, "there is no model to evaluate"),
        ({"models": "nothing/here"}, "nothing at nothing/here"),
        ({"data": "nothing/there"}, "no data set at nothing/there"),
        ({"workers": "many"}, "workers=many is not a number of workers"),
        ({"overrides": ["width=1"]}, "unknown key width"),
    ],
)
def test_mistakes_are_sentences(trained, arguments, message):
    with pytest.raises(UserError, match=message):
        distrain.evaluate(**{"models": trained.run, **arguments})


def test_a_run_without_a_validation_set_needs_data(narrow):
    config = narrow(epochs=1, log={"every": 1000})
    distrain.train(config, console=SilentConsole())
    with pytest.raises(UserError, match="had no validation set: name a data set"):
        distrain.evaluate(config.run)


def test_a_request_opens_the_checkpoints_that_it_names(trained):
    """A worker evaluates what its driver has opened, even if the run has gone on."""
    names = sorted(path.name for path in (trained.run / "checkpoints").glob("step-*"))
    url = open_trained_model(f"{trained.run}/checkpoints/{names[0]}").url
    request = EvalRequest((url,), ("lanes=1",), "x", "center")
    (model,) = request.open_models()
    assert model.origin.checkpoint == names[0]
    assert model.config.lanes == 1


def test_workers_that_compute_other_bits_are_refused(trained, monkeypatch):
    """As a part of another kind of hardware would be."""

    def evaluate_two(*arguments, **options):
        part = evaluate_part(*arguments, **options)
        device = {**part.environment, "device": "another CPU"}
        return part, part._replace(hardware_hash="0", environment=device)

    real = evaluation._build_evaluation
    monkeypatch.setattr(evaluation, "evaluate_part", evaluate_two)
    monkeypatch.setattr(
        evaluation,
        "_build_evaluation",
        lambda models, dataset, crops, parts: real(models, dataset, crops, parts[0]),
    )
    with pytest.raises(UserError, match=r"worker 1 of 2 computes other bits.*another"):
        distrain.evaluate(trained.run)


def test_the_result_can_be_written_as_json(trained):
    tree = distrain.evaluate(trained.run).to_dict()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree


def test_the_workers_of_the_training_are_not_those_of_an_evaluation(narrow):
    """Nor are there at most as many as virtual workers."""
    config = narrow(cluster={"workers": [2, 3]}, virtual_workers=4)
    assert evaluation._set_workers(config, None).cluster.workers == "auto"
    assert evaluation._set_workers(config, 9).cluster.workers == (9, 9)
    assert evaluation._set_workers(config, "2-5").cluster.workers == (2, 5)
