"""`model.json` and the weights are enough: the data sets may be gone."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sets import SetWriter
from torch.nn.functional import interpolate

import distrain.training.evaluate
from distrain.data.decoding.image import encode_png
from distrain.data.shards.stats import PixelMoments
from distrain.data.storage.store import Store
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.model import Model
from distrain.rundir.checkpoint_loading import load_newest_checkpoint
from distrain.rundir.model_info import read_model_info
from distrain.trainer import train

CLASSES = ("ant", "bee", "cat", "dog")
SIZES = ((90, 72), (150, 201), (80, 80), (240, 133))


def run(config, console, **options):
    return train(config, World(torch.device("cpu")), console, **options)


def picture(rng, size):
    """Coarse patches with more red than blue, and noise."""
    coarse = rng.integers(0, 160, (5, 6, 3), dtype=np.uint8)
    coarse[..., 0] += 35
    image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image) + rng.integers(0, 60, (*size, 3), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    """Writes the sets `train` and `val` of pictures of one size, or of several; returns the folder of the files."""

    def write(sizes):
        rng = np.random.default_rng(0)
        (tmp_path / "files").mkdir()
        one_size = sizes[0] if len(sizes) == 1 else None
        for split, rows in (("train", 16), ("val", 8)):
            writer = SetWriter(Store(str(tmp_path / split)), CLASSES, one_size)
            moments = PixelMoments()
            for i in range(rows):
                size = sizes[i % len(sizes)]
                pixels = picture(rng, size)
                moments.add_image(pixels)
                data = encode_png(pixels)
                writer.add(data, i % len(CLASSES), f"{i}.png", size)
                if split == "val":
                    (tmp_path / f"files/{i}.png").write_bytes(data)
            writer.finish(moments.to_statistics())
        return tmp_path / "files"

    return write


@pytest.fixture
def make(narrow, tmp_path):
    """Makes configs of runs on the pictures, 2 steps long."""

    def config(**changes):
        return narrow(
            global_batch=8,
            virtual_workers=2,
            data={
                "train": str(tmp_path / "train"),
                "val": str(tmp_path / "val"),
                "backend": changes.pop("backend", "torch"),
            },
            **changes,
        )

    return config


@pytest.fixture
def evaluated(monkeypatch):
    """The logits of each evaluation's chunks, in order."""
    logits = []
    predict = distrain.training.evaluate.predict_logits

    def remember(*arguments):
        found = predict(*arguments)
        logits.append(found)
        return found

    monkeypatch.setattr(distrain.training.evaluate, "predict_logits", remember)
    return logits


def preprocess(info, path):
    """The input of the network, by torch alone and what the file says."""
    assert info["channels"] == "RGB"
    pixels = np.array(Image.open(path).convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    if info["short_side"] is not None:
        ratio = min(image.shape[2:]) / info["short_side"]
        size = [int(side / ratio + 0.5) for side in image.shape[2:]]
        image = interpolate(
            image, size, mode=info["interpolation"], antialias=info["antialias"]
        ).round()
    else:
        assert list(image.shape[2:]) == info["image_size"]
    crop = info["crop"]
    top, left = ((side - crop) // 2 for side in image.shape[2:])
    image = image[:, :, top : top + crop, left : left + crop]
    mean, std = (torch.tensor(info[key])[:, None, None] for key in ("mean", "std"))
    return (image - mean) / std


@pytest.mark.parametrize(
    ("sizes", "augment", "backend"),
    [
        (SIZES[:1], {"crop": 64}, "torch"),
        (SIZES[:1], {"crop": 64, "scale": 1.1}, "torch"),
        (SIZES, {"crop": 64, "short_side": 70}, "torch"),
        (SIZES, {"crop": 64, "short_side": 66}, "dali"),
        (SIZES, {"crop": 65, "short_side": 110}, "dali"),
    ],
)
def test_the_file_and_the_weights_give_the_logits_of_the_evaluation(
    make, console, tmp_path, pictures, evaluated, sizes, augment, backend
):
    photos = pictures(sizes)
    config = make(augment=augment, backend=backend, evaluate={"batch": 8})
    summary = run(config, console)
    assert summary.eval.samples == 8
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split)

    # In a checkpoint's folder is all that it takes.
    (folder,) = (tmp_path / "run/checkpoints").glob("step-00000002-*")
    info = json.loads((folder / "model.json").read_text())
    assert info["classes"][3] == "dog"
    assert info["model"]["name"] == "alexnet"
    model = Model.parse_choice(info["model"]).build(len(info["classes"]), 0).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    inputs = torch.cat([preprocess(info, photos / f"{i}.png") for i in range(8)])
    with torch.inference_mode():
        found = model(inputs)
    (wanted,) = evaluated
    # Where a resize is rounded to whole values, some pixels are one more or less; PIL
    # rounds twice, after each of the two axes.
    spread = wanted.std(0).max()
    limit = {"dali": 0.01, "torch": 0.1}[backend] if len(sizes) > 1 else 1e-3
    assert (found - wanted).abs().max() < limit * spread

    # Each part of the file counts.
    wrong = [{**info, "mean": info["mean"][::-1]}, {**info, "std": [59.0, 57.0, 57.0]}]
    if len(sizes) > 1:
        wrong += [{**info, "antialias": False}, {**info, "short_side": 120}]
    for other in wrong:
        inputs = torch.cat([preprocess(other, photos / f"{i}.png") for i in range(8)])
        with torch.inference_mode():
            found = model(inputs)
        assert (found - wanted).abs().max() > 2 * limit * spread, other


def test_the_run_directory_and_each_checkpoint_have_it(make, console, pictures):
    pictures(SIZES[:1])
    config = make(epochs=2)
    run(config, console)
    store = Store(config.run)
    info = read_model_info(store)
    assert (info.classes, info.image_size) == (CLASSES, SIZES[0])
    manifest = json.loads(Store(config.data.train).read("manifest.json"))
    assert np.float32(manifest["mean"]).tolist() == list(info.mean)
    assert np.float32(manifest["std"]).tolist() == list(info.std)
    names = [n for n in store.list_names("checkpoints") if n.startswith("step")]
    assert len(names) == 2
    assert [read_model_info(store, name) for name in names] == [info] * 2


def test_a_changed_one_is_noticed(make, console, pictures):
    pictures(SIZES[:1])
    config = make()
    run(config, console)
    store = Store(config.run)
    (name,) = [n for n in store.list_names("checkpoints") if n.startswith("step")]
    place = f"checkpoints/{name}/model.json"
    store.write(place, store.read(place).replace(b"bee", b"wasp"))
    with pytest.raises(UserError, match=r"model.json cannot be used \(model.json has"):
        read_model_info(store, name)
    store.remove(place)
    with pytest.raises(UserError, match="cannot be used .model.json is missing"):
        read_model_info(store, name)


def test_a_run_that_has_none_gets_it_from_config_and_data(make, console, pictures):
    """As of a version that wrote none: its checkpoints are resumed, and the bits are the same."""
    pictures(SIZES[:1])
    whole = run(make(run=make().run + "-whole", epochs=2), console)
    config = make(epochs=1)
    run(config, console)
    store = Store(config.run)
    info = read_model_info(store)

    # Take it away.
    (name,) = [n for n in store.list_names("checkpoints") if n.startswith("step")]
    store.remove("model.json")
    store.remove(f"checkpoints/{name}/model.json")
    manifest = json.loads(store.read(f"checkpoints/{name}/manifest.json"))
    del manifest["model.json"]
    store.write(f"checkpoints/{name}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match=r"manifest.json does not name model.json"):
        read_model_info(store, name)

    # The same command, on a run that is finished already, writes it.
    assert run(config, console).status == "already finished"
    assert read_model_info(store) == info

    # And a resume goes on from the old checkpoint.
    store.remove("model.json")
    assert run(make(epochs=2), console).weights == whole.weights
    assert read_model_info(store) == info
    newest = load_newest_checkpoint(store)[0].name
    assert read_model_info(store, newest) == info
