"""`distrain.export`: what is in the folder, that it is right, and that it says so where it is not."""

import hashlib
import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from narrow import narrow_recipe
from photos import STATISTICS
from PIL import Image
from safetensors.torch import load_file, save_file
from sets import SetWriter

import distrain
from distrain.data.shards.dataset import Dataset
from distrain.data.storage.store import Store
from distrain.errors import RunError, UserError
from distrain.exporting import formats
from distrain.exporting.proof import Agreement, ImageComparison, Proof
from distrain.inference.predictor import Predictor
from distrain.monitor.sinks import SilentConsole


def list_files(folder):
    return sorted(path.name for path in folder.iterdir())


def run_card(folder, image, monkeypatch):
    """The class that the code of a model card prints for an image."""
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    Image.fromarray(image).save(folder / "photo.png")
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(code.replace("photo.jpg", "photo.png"), {})
    (folder / "photo.png").unlink()
    return printed.getvalue().strip()


@pytest.fixture
def photo(digits):
    """A digit at another size than the stored one."""
    image = Image.open(io.BytesIO(bytes(Dataset.open(digits / "val")[0].data)))
    return np.asarray(image.resize((150, 111)))


@pytest.mark.parametrize(
    ("name", "file"), [("onnx", "model.onnx"), ("torch-export", "model.pt2")]
)
def test_a_graph_is_proved_and_its_card_works(
    trained, photo, tmp_path, monkeypatch, name, file
):
    told = []
    result = distrain.export(
        trained.run,
        name,
        to=tmp_path / "it",
        on_progress=lambda *numbers: told.append(numbers),
    )
    assert list_files(tmp_path / "it") == sorted(
        [file, "README.md", "config.yaml", "export.json", "model.json"]
    )
    assert result.file == f"{tmp_path}/it/{file}"
    assert (told[0], told[-1]) == (("evaluate", 0, 359), ("compare", 359, 359))

    # It agrees on every image.
    stored = result.proof.stored
    assert (stored.images, stored.agreeing, stored.disagreeing) == (359, 359, ())
    assert stored.max_probability_difference < 1e-5
    assert stored.max_pixel_difference == 0
    assert result.proof.resized.images == 0

    # The card has the numbers of the evaluation, and code that runs as it stands.
    evaluation = distrain.evaluate(trained.run, overrides=["device=cpu"])
    card = (tmp_path / "it/README.md").read_text()
    assert f"| top-1 | {evaluation.result.top1:.2%}  (95% interval " in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    (model,) = metadata["model-index"]
    values = [metric["value"] for metric in model["results"][0]["metrics"]]
    assert values == [evaluation.result.top1, evaluation.result.top5]
    (wanted,) = Predictor(trained.run).predict_images([photo])
    assert run_card(tmp_path / "it", photo, monkeypatch) == wanted.classes[0].name

    # export.json verifies the files, and has what eval prints.
    manifest = json.loads((tmp_path / "it/export.json").read_text())
    for listed, entry in manifest["files"].items():
        data = (tmp_path / "it" / listed).read_bytes()
        assert entry == {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert manifest["evaluation"] == evaluation.to_dict()
    assert manifest["model"]["weights"] == evaluation.origins[0].weights
    with pytest.raises(UserError, match="which other programs run: name its run"):
        distrain.evaluate(tmp_path / "it" / file)


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "it"
    distrain.export(trained.run, to=folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "it")


def test_an_exported_folder_is_evaluated_as_its_run_is(trained, exported):
    wanted = distrain.evaluate(trained.run).to_dict()
    for model in (exported, exported / "model.safetensors", f"{exported}/"):
        found = distrain.evaluate(model).to_dict()
        (origin,) = found["models"]
        assert origin.pop("run") == str(exported)
        assert {**origin, "run": str(trained.run)} == wanted["models"][0]
        assert {**found, "models": None} == {**wanted, "models": None}


def test_it_predicts_and_its_card_works(trained, exported, photo, monkeypatch):
    (wanted,) = Predictor(trained.run).predict_images([photo])
    assert Predictor(exported).predict_images([photo]) == [wanted]
    assert run_card(exported, photo, monkeypatch) == wanted.classes[0].name


def test_it_is_what_another_run_starts_from(exported, narrow):
    config = narrow(
        model={
            "name": "alexnet",
            "width": 0.04,
            "init_from": str(exported),
            "freeze": ["features"],
        }
    )
    distrain.train(config, console=SilentConsole())
    weights = load_file(exported / "model.safetensors")
    name = "features.0.weight"
    (checkpoint,) = sorted(
        distrain.evaluate(config.run, data=config.data.train).origins
    )
    assert checkpoint.step > 0
    folder = f"{config.run}/checkpoints/{checkpoint.checkpoint}/model.safetensors"
    assert torch.equal(load_file(folder)[name], weights[name])


def test_an_export_of_an_export_and_an_upload(exported, tmp_path):
    stale = tmp_path / "it"
    shutil.copytree(exported, stale)
    (stale / "model.pt2").write_bytes(b"of an earlier export")
    result = distrain.export(exported, to=stale, upload=f"file://{tmp_path}/copy")
    assert result.uploaded == f"file://{tmp_path}/copy"
    assert list_files(stale) == list_files(exported) == list_files(tmp_path / "copy")
    first = distrain.evaluate(exported).result
    assert distrain.evaluate(tmp_path / "copy").result == first


@pytest.fixture(scope="module")
def resizing_run(digits, tmp_path_factory):
    """A run that takes images of any size, in another precision than its export."""
    config = narrow_recipe(
        digits,
        tmp_path_factory.mktemp("resizing") / "run",
        augment={"crop": 64, "short_side": 72},
        precision="bf16",
        model={"name": "alexnet", "width": 0.04, "dropout": 0.0},
        optimizer={"name": "adam"},
        schedule={"name": "constant", "lr": 0.005},
    )
    distrain.train(config, console=SilentConsole())
    return config.run


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_images_that_are_resized_are_a_figure_of_their_own(
    resizing_run, digits, tmp_path, backend
):
    """By Pillow to the same pixels (of wide images), by DALI to nearly the same."""
    dataset = Dataset.open(digits / "val")
    writer = SetWriter(Store(str(tmp_path / "set")), list("0123456789"), None)
    for i in range(30):
        image = Image.open(io.BytesIO(bytes(dataset[i].data)))
        # The first ten keep their size.
        width, height = (72, 72) if i < 10 else (80 + 9 * i, 77 + 5 * i)
        file = io.BytesIO()
        image.resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
        writer.add(file.getvalue(), dataset[i].label, f"{i}.png", (height, width))
    writer.finish(STATISTICS)
    result = distrain.export(
        resizing_run,
        to=tmp_path / "it",
        data=tmp_path / "set",
        overrides=[f"data.backend={backend}"],
    )
    assert result.evaluation.settings["precision"] == "fp32"
    proof = result.proof
    assert (proof.stored.images, proof.resized.images) == (10, 20)
    assert proof.stored.max_pixel_difference == 0
    assert proof.passed
    if backend == "torch":
        assert proof.resized.max_pixel_difference == 0
    else:
        assert 0 < proof.resized.max_pixel_difference <= 2
        assert 0 < proof.resized.different_pixels < 0.2
    told = json.loads((tmp_path / "it/export.json").read_text())["proof"]
    assert told["resized"]["images"] == 20
    card = (tmp_path / "it/README.md").read_text()
    assert f"on {proof.resized.agreeing} of 20 images that are resized" in card


def test_torchvisions_form_is_evaluated_too(few_digits, narrow, tmp_path):
    """It has counters of batches, which distrain's normalization lacks."""
    config = narrow(
        data={name: str(few_digits / name) for name in ("train", "val")},
        model={"name": "torchvision:shufflenet_v2_x0_5"},
    )
    distrain.train(config, console=SilentConsole())
    result = distrain.export(config.run, "torchvision", to=tmp_path / "it")
    assert result.proof.stored.agreeing == 80
    names = load_file(tmp_path / "it/model.safetensors").keys()
    assert any(name.endswith(".num_batches_tracked") for name in names)
    found = distrain.evaluate(tmp_path / "it")
    assert found.result == result.evaluation.result
    assert found.origins[0].weights == result.evaluation.origins[0].weights
    card = (tmp_path / "it/README.md").read_text()
    assert "torchvision.models.shufflenet_v2_x0_5(num_classes=10)" in card


def test_images_that_do_not_decode_are_left_out_and_named(
    trained, damaged_set, tmp_path
):
    damaged_set(tmp_path / "set", {3, 20}, classes=10)
    result = distrain.export(trained.run, to=tmp_path / "it", data=tmp_path / "set")
    assert result.proof.stored.images == 38
    names = [name.removeprefix(f"{tmp_path}/set/") for name in result.proof.left_out]
    assert names == sorted(result.evaluation.left_out)


def spoil(write, change):
    """Write an exported file, and then change its weights."""

    def call(model, folder):
        write(model, folder)
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return call


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["classifier.6.bias"][3].add_(1.0),
        lambda tensors: tensors["classifier.6.bias"][3].fill_(float("nan")),
    ],
    ids=["another class", "not finite"],
)
def test_a_file_that_disagrees_is_not_passed_on(trained, tmp_path, monkeypatch, change):
    form = formats.FORMATS["safetensors"]
    monkeypatch.setattr(form, "write", spoil(form.write, change), raising=False)
    with pytest.raises(
        RunError, match=r"disagrees with distrain on \d+ images \(.*row"
    ):
        distrain.export(trained.run, to=tmp_path / "it", upload=str(tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()
    assert "FAILED: do not use" in (tmp_path / "it/README.md").read_text()
    proof = json.loads((tmp_path / "it/export.json").read_text())["proof"]
    assert proof["passed"] is False
    assert len(proof["stored"]["disagreeing"]) > 0


def compare(**changes):
    one = ImageComparison("x", False, True, False, 1e-6, 0, 0, 100)
    return one._replace(**changes)


@pytest.mark.parametrize(
    ("num_wrong", "passed"), [(0, True), (1, True), (2, False)], ids=str
)
def test_one_of_a_hundred_resized_images_may_differ(num_wrong, passed):
    resized = [compare(is_resized=True, agrees=i >= num_wrong) for i in range(100)]
    stored = Agreement.summarize([compare()])
    proof = Proof(stored, Agreement.summarize(resized), {})
    assert proof.passed is passed
    # Of images as they are stored, none may.
    wrong = Agreement.summarize([compare(agrees=False)] + [compare()] * 1000)
    assert not replace(proof, stored=wrong).passed
    tie = Agreement.summarize([compare(agrees=False, is_tie=True)])
    assert replace(proof, stored=tie).passed is passed


def test_nothing_is_proved_without_images(trained, damaged_set, tmp_path):
    empty = Agreement.summarize([])
    assert not Proof(empty, empty, {}).passed
    damaged_set(tmp_path / "set", set(range(40)), classes=10)
    with pytest.raises(RunError, match="not proved, since none of the images could"):
        distrain.export(trained.run, to=tmp_path / "it", data=tmp_path / "set")


def test_a_proof_sums_up_its_images():
    found = Agreement.summarize(
        [
            compare(name="a", probability_difference=0.5, num_different_pixels=30),
            compare(name="b", agrees=False, pixel_difference=2),
            compare(name="c", agrees=False, is_tie=True),
        ]
    )
    assert found == Agreement(3, 1, 1, 0.5, 2, 0.1, ("b",))
    assert found.share == 2 / 3
    proof = Proof(found, Agreement.summarize([]), {})
    assert proof.describe() == [
        "the same class as distrain on 1 of 3 images that are used as stored (1 more "
        "are ties); probabilities differ by at most 5.0e-01; 10.0% of the pixels "
        "differ, by at most 2 of 255"
    ]


def test_a_folder_with_something_else_is_left_alone(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty, and not an exported model"):
        distrain.export(trained.run, to=tmp_path)
    assert list_files(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "pth"}, "format 'pth' is not one of"),
        ({"model": "nothing"}, "nothing at nothing: pass a run directory"),
        ({"format": "torchvision"}, "has no form in torchvision"),
        ({"data": "nothing"}, "no data set at nothing"),
        ({"checkpoint": "7"}, "no complete checkpoint of step 7"),
        ({"overrides": ["model.width=1"]}, "decides its weights"),
        ({"overrides": ["precision=bf16"]}, "=fp32: remove precision=bf16"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_mistakes_are_sentences(trained, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        distrain.export(**{"model": trained.run, "to": tmp_path / "it", **arguments})
    assert not (tmp_path / "it").exists()


def test_damage_is_found_and_named(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged \(the bytes of model\.saf.*again"):
        distrain.evaluate(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"is damaged \(model.safetensors is missing"):
        distrain.evaluate(folder)
    for text in ("{", "[]", '{"format": 1}'):
        (folder / "export.json").write_text(text)
        with pytest.raises(UserError, match=r"export\.json cannot be used.*again"):
            distrain.evaluate(folder)


def test_a_later_format_is_not_read(folder):
    path = folder / "export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(UserError, match="has format 2, and this version of distrain"):
        distrain.evaluate(folder)


def test_a_file_of_weights_alone_is_not_enough(exported, tmp_path):
    shutil.copy(exported / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match="is not in an exported folder, whose export"):
        distrain.evaluate(tmp_path / "model.safetensors")
