"""What a URL of weights may mean: a run, a checkpoint, a folder, a file."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.rundir.checkpoint import write_best
from distrain.rundir.model_info import ModelInfo
from distrain.rundir.safetensors_file import encode_safetensors
from distrain.rundir.weights_source import read_named_weights

INFO = ModelInfo(
    distrain="0.1.0",
    model={"name": "alexnet"},
    classes=(),
    channels="RGB",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    crop=64,
    short_side=None,
    image_size=None,
    interpolation="bilinear",
    antialias=True,
)


def name_of(step: int) -> str:
    return f"step-{step:08d}-attempt-001"


def write_checkpoint(store: Store, step: int, classes) -> bytes:
    """A checkpoint whose only weight is its step; returns the file of the weights."""
    tensors = {"a": torch.tensor([float(step)])}
    contents = {"model.safetensors": b"".join(encode_safetensors(tensors))}
    if classes is not None:
        info = replace(INFO, classes=classes)
        contents["model.json"] = info.to_json().encode()
    folder = f"checkpoints/{name_of(step)}"
    manifest = {}
    for file, data in contents.items():
        store.write(f"{folder}/{file}", data)
        digest = hashlib.sha256(data).hexdigest()
        manifest[file] = {"bytes": len(data), "sha256": digest}
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())
    return contents["model.safetensors"]


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 1 to 3, of which 2 is the best."""
    store = Store(str(tmp_path / "run"))
    for step in (1, 2, 3):
        write_checkpoint(store, step, ("a", "b", str(step)))
    write_best(store, name_of(2), {"step": 2, "top1": 5, "samples": 9, "val": "x"})
    return store


def check(url: str, step: int, classes: tuple[str, ...] | None) -> None:
    found = read_named_weights(url)
    assert found.file.tensors["a"].item() == step
    assert found.classes == classes


def test_a_run_means_its_best_checkpoint_or_else_its_newest(run):
    check(run.url, 2, ("a", "b", "2"))
    check(f"{run.url}/", 2, ("a", "b", "2"))
    run.remove("checkpoints/best.json")
    check(run.url, 3, ("a", "b", "3"))


def test_a_checkpoint_and_its_file(run):
    url = f"{run.url}/checkpoints/{name_of(1)}"
    check(url, 1, ("a", "b", "1"))
    check(f"{url}/", 1, ("a", "b", "1"))
    check(f"{url}/model.safetensors", 1, ("a", "b", "1"))
    found = read_named_weights(url)
    data = run.read(f"checkpoints/{name_of(1)}/model.safetensors")
    assert found.file.sha256 == hashlib.sha256(data).hexdigest()
    assert found.file.url == f"{url}/model.safetensors"


def test_an_early_checkpoint_has_the_classes_of_its_run(run):
    write_checkpoint(run, 4, None)
    run.write("model.json", replace(INFO, classes=("run", "of")).to_json().encode())
    check(f"{run.url}/checkpoints/{name_of(4)}", 4, ("run", "of"))


def test_a_folder_with_a_model_and_a_file_by_itself(run, tmp_path):
    """`model.json` beside a file has its classes, unless it is of another program."""
    data = run.read(f"checkpoints/{name_of(1)}/model.safetensors")
    folder = Store(str(tmp_path / "exported.pt"))
    folder.write("model.safetensors", data)
    check(folder.url, 1, None)
    folder.write("model.json", b'{"format": "tfjs"}')
    check(folder.url, 1, None)
    folder.write("model.json", replace(INFO, classes=("x", "y")).to_json().encode())
    check(folder.url, 1, ("x", "y"))
    folder.write("weights", data)
    check(f"{folder.url}/weights", 1, ("x", "y"))


def refuse(url: str) -> str:
    with pytest.raises(UserError) as caught:
        read_named_weights(url)
    return str(caught.value)


def test_what_cannot_be_used(run, tmp_path):
    url = f"{run.url}/checkpoints/{name_of(2)}"
    run.write(f"checkpoints/{name_of(2)}/model.safetensors", b"changed")
    for where in (url, run.url):
        assert refuse(where) == (
            f"{url} is damaged (model.safetensors has 7 bytes, not 76): use another one"
        )
    missing = f"{run.url}/checkpoints/{name_of(9)}"
    assert refuse(missing) == f"there is no complete checkpoint at {missing}"
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    assert "has no complete checkpoint yet: train it first" in refuse(
        str(tmp_path / "begun")
    )
    assert refuse(str(tmp_path / "none")) == (
        f"no file at {tmp_path}/none: check the path"
    )
    assert "is a folder: name the file" in refuse(str(tmp_path))
