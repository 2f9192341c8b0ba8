"""Each network in each format gives distrain's own logits."""

import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
import torch
import torchvision
from narrow import narrow_recipe
from safetensors import safe_open
from safetensors.torch import load_file

from distrain.errors import UserError
from distrain.exporting import formats
from distrain.exporting.formats import FORMATS, get_format
from distrain.exporting.graph import ImageClassifier
from distrain.exporting.preprocessing import Preprocessing
from distrain.inference.trained_model import ModelOrigin, TrainedModel
from distrain.rundir.model_info import ModelInfo


@pytest.fixture
def build(digits, tmp_path):
    """A model of a config with drawn weights, as if it had been trained."""

    def call(classes=10, crop=64, **model):
        config = narrow_recipe(
            digits, tmp_path / "run", model=model, augment={"crop": crop}
        )
        module = config.model.build(classes, 0).eval()
        info = ModelInfo(
            distrain="0",
            model=model,
            classes=tuple(map(str, range(classes))),
            channels="RGB",
            mean=(80.0, 81.0, 82.0),
            std=(70.0, 71.0, 72.0),
            crop=crop,
            short_side=None,
            image_size=(crop + 8, crop + 8),
            interpolation="bilinear",
            antialias=True,
        )
        origin = ModelOrigin("run", "step-1", 7, "0" * 64, "exact", {})
        return TrainedModel(module, config, config, info, origin, "run", ())

    return call


def draw_images(n, height, width):
    rng = np.random.default_rng(n)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def expect(model, images):
    classifier = ImageClassifier(Preprocessing(model.info), model.module)
    with torch.no_grad():
        return classifier(torch.from_numpy(images)).double().numpy()


@pytest.mark.parametrize(
    "network",
    [
        {"name": "alexnet2012", "width": 0.04},
        {"name": "alexnet_bn", "width": 0.04, "hidden": True},
    ],
    ids=lambda network: network["name"],
)
def test_a_graph_of_each_network(build, network, tmp_path):
    model = build(**network)
    for name, tolerance in (("torch-export", 1e-6), ("onnx", 1e-5)):
        FORMATS[name].write(model, tmp_path)
        runtime = FORMATS[name].load(model, tmp_path)
        # One image and several, of the stored size and of others.
        for size in ((1, 72, 72), (3, 72, 72), (2, 61, 130), (1, 200, 90), (1, 1, 1)):
            images = draw_images(*size)
            found = runtime.compute_probabilities(images)
            wanted = expect(model, images)
            assert np.abs(found - wanted).max() < tolerance, (name, size)


def test_a_graph_names_its_input_its_output_and_its_classes(build, tmp_path):
    model = build(name="alexnet", width=0.04)
    FORMATS["onnx"].write(model, tmp_path)
    graph = onnx.load(tmp_path / "model.onnx")
    (image,) = graph.graph.input
    shape = [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim]
    assert (image.name, shape) == ("images", ["images", "height", "width", 3])
    assert [output.name for output in graph.graph.output] == ["probabilities"]
    metadata = {prop.key: prop.value for prop in graph.metadata_props}
    assert metadata["classes"] == str(list("0123456789")).replace("'", '"')
    FORMATS["torch-export"].write(model, tmp_path)
    extra = {"classes": "", "weights": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert extra == {"classes": metadata["classes"], "weights": "0" * 64}


@pytest.mark.parametrize(
    ("network", "crop"),
    [
        ({"name": "alexnet"}, 224),
        ({"name": "torchvision:resnet18"}, 64),
    ],
    ids=["alexnet", "resnet18"],
)
def test_torchvisions_own_network_takes_the_weights(build, network, crop, tmp_path):
    """Strictly: each of its tensors, and no other."""
    model = build(**network, crop=crop)
    form = FORMATS["torchvision"]
    form.check_model(model)
    form.write(model, tmp_path)
    images = draw_images(2, crop + 8, crop + 8)
    found = form.load(model, tmp_path).compute_probabilities(images)
    assert np.abs(found - expect(model, images)).max() < 1e-6
    name = network["name"].removeprefix("torchvision:")
    own = torchvision.models.get_model(name, num_classes=10)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        # transformers refuses files without it.
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(tmp_path / "model.safetensors")
    own.load_state_dict(tensors, strict=True)
    assert tensors.keys() == own.state_dict().keys()


def test_a_network_without_auxiliary_classifiers_has_torchvisions_form(build):
    FORMATS["torchvision"].check_model(build(name="torchvision:googlenet"))


def test_timm_takes_them_too(build, tmp_path):
    """timm's residual networks have torchvision's names."""
    model = build(name="torchvision:resnet18")
    FORMATS["torchvision"].write(model, tmp_path)
    # In another process: timm's registry slows each import of torch.
    code = """\
import sys, timm, torch
network = timm.create_model("resnet18", num_classes=10, checkpoint_path=sys.argv[1])
torch.save(network.eval()(torch.load(sys.argv[2])).detach(), sys.argv[3])
"""
    images = torch.rand(2, 3, 64, 64)
    torch.save(images, tmp_path / "in.pt")
    arguments = [tmp_path / "model.safetensors", tmp_path / "in.pt", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)
    with torch.no_grad():
        wanted = model.module(images)
    assert torch.allclose(torch.load(tmp_path / "out"), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"name": "alexnet", "width": 0.5}, "another features.0.weight of shape"),
        ({"name": "alexnet2012"}, "model alexnet2012 has no form in torchvision"),
        ({"name": "own_models:Small"}, "own_models:Small has no form in torchvision"),
    ],
    ids=["narrow", "2012", "own"],
)
def test_a_network_that_torchvision_lacks(build, network, message):
    with pytest.raises(UserError, match=message):
        FORMATS["torchvision"].check_model(build(**network))


def test_a_network_that_cannot_be_traced(build, tmp_path):
    model = build(name="alexnet", width=0.04)
    model.module.register_forward_hook(lambda *args: args[2] * float(args[2].sum()))
    with pytest.raises(UserError, match="has no graph, since torch.export cannot"):
        FORMATS["torch-export"].write(model, tmp_path)


def test_a_format_that_there_is_not():
    with pytest.raises(UserError, match="format 'pth' is not one of safetensors, tor"):
        get_format("pth")


def test_a_package_that_is_missing(monkeypatch):
    """The message names an extra that has it."""
    monkeypatch.setattr(formats, "find_spec", {"onnx": True}.get)
    with pytest.raises(UserError, match=r"needs onnxscript: .*'distrain\[onnx\]'"):
        get_format("onnx").check_packages()
    monkeypatch.undo()
    assert all(find_spec(package) for package in get_format("onnx").packages)
