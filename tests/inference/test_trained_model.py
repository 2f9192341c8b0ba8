import json
import shutil

import pytest
import torch

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.inference.trained_model import open_trained_model
from distrain.rundir.checkpoint import hash_tensors, write_best


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, to damage."""
    return shutil.copytree(trained.run, tmp_path / "copy")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_newest_best_and_a_step(trained, run):
    first, last = names(run)
    newest = open_trained_model(str(run))
    assert newest.origin.checkpoint == last
    assert newest.origin.step == trained.records[-1].step
    assert newest.origin.weights == hash_tensors(newest.module.state_dict())
    assert not newest.module.training
    assert newest.info.classes == tuple("0123456789")
    write_best(Store(str(run)), first, {})
    assert open_trained_model(str(run), checkpoint="best").origin.checkpoint == first
    step = trained.records[0].step
    assert open_trained_model(str(run), checkpoint=step).origin.checkpoint == first
    one = open_trained_model(f"{run}/checkpoints/{first}/")
    assert one.origin.checkpoint == first
    assert one.origin.weights != newest.origin.weights


def test_a_damaged_checkpoint_is_passed_over_and_named(run):
    first, last = names(run)
    path = run / "checkpoints" / last / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model = open_trained_model(str(run))
    assert model.origin.checkpoint == first
    (note,) = model.notes
    assert note.startswith(f"checkpoint {last} is damaged: the bytes of model")
    with pytest.raises(UserError, match=r"is damaged \(the bytes of model.*another"):
        open_trained_model(f"{run}/checkpoints/{last}")


def test_the_optimizer_is_not_read(run):
    for name in names(run):
        (run / "checkpoints" / name / "optimizer.safetensors").unlink()
    open_trained_model(str(run))


def test_an_early_checkpoint_takes_the_description_of_its_run(run):
    for name in names(run):
        folder = run / "checkpoints" / name
        (folder / "model.json").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["model.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert open_trained_model(str(run)).info.crop == 64


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("5", "has no complete checkpoint of step 5: use newest, best"),
        ("last", "checkpoint 'last' is not one: use newest, best, or the number"),
    ],
)
def test_a_checkpoint_that_is_not_there(run, checkpoint, message):
    with pytest.raises(UserError, match=message):
        open_trained_model(str(run), checkpoint=checkpoint)


def test_no_best_checkpoint_yet(run):
    (run / "checkpoints/best.json").unlink()
    with pytest.raises(UserError, match="no best checkpoint.*use the newest"):
        open_trained_model(str(run), checkpoint="best")


def test_no_run(run, tmp_path, digits):
    with pytest.raises(UserError, match="nothing at .*pass a run directory"):
        open_trained_model(str(tmp_path / "nothing"))
    (tmp_path / "x.pth").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"x\.pth is a file, which does not say what"):
        open_trained_model(str(tmp_path / "x.pth"))
    with pytest.raises(UserError, match="is not a run directory"):
        open_trained_model(str(digits / "val"))
    for name in names(run):
        shutil.rmtree(run / "checkpoints" / name)
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        open_trained_model(str(run))
    with pytest.raises(UserError, match="there is no complete checkpoint at"):
        open_trained_model(f"{run}/checkpoints/{name}")


def test_overrides_may_change_how_it_is_computed_alone(run):
    overrides = ["lanes=1", "evaluate.batch=7", "data.backend=torch"]
    config = open_trained_model(str(run), overrides=overrides).config
    assert config.evaluate.batch == 7
    for override in (
        "model.width=1",
        "augment.crop=65",
        "seed=1",
        "loss.label_smoothing=0.1",
    ):
        with pytest.raises(UserError, match=r"decides its weights: remove .*may diff"):
            open_trained_model(str(run), overrides=[override])
    with pytest.raises(UserError, match="unknown key lane; did you mean lanes"):
        open_trained_model(str(run), overrides=["lane=1"])


def rewrite(run, change):
    """Change the model's tensors of the newest checkpoint, and its manifest with them."""
    import hashlib

    import safetensors.torch

    folder = run / "checkpoints" / names(run)[-1]
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    manifest = json.loads((folder / "manifest.json").read_text())
    data = path.read_bytes()
    manifest[path.name] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("features.0.bias"), "lacks features.0.bias"),
        (
            lambda t: t.update(extra=torch.zeros(1)),
            "has extra, which the network lacks",
        ),
        (
            lambda t: t.update({"classifier.6.bias": torch.zeros(9)}),
            r"has classifier.6.bias of shape \(9,\), not \(10,\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_another_network_names_the_first_tensor(run, change, message):
    rewrite(run, change)
    with pytest.raises(UserError, match=f"{message}: it is of another network"):
        open_trained_model(str(run))
