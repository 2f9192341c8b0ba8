"""Model card of an exported model: README.md in the form of the Hugging Face Hub."""

import json
from collections.abc import Callable, Mapping

from distrain.exporting.formats import ExportFormat
from distrain.exporting.proof import Proof
from distrain.exporting.torchvision_form import (
    get_torchvision_name,
    get_torchvision_options,
)
from distrain.inference.evaluation import Evaluation, format_accuracy
from distrain.inference.trained_model import TrainedModel
from distrain.rundir import files
from distrain.yaml12 import dump_yaml

_MAX_CLASSES = 20

_OPEN_IMAGE = f"""\
classes = json.loads(Path("{files.MODEL_FILE}").read_text("utf-8"))["classes"]
image = np.array(Image.open("photo.jpg").convert("RGB"))
"""
_PRINT_CLASS = "print(classes[int(probabilities.argmax())])\n"


def write_model_card(
    name: str,
    model: TrainedModel,
    export_format: ExportFormat,
    evaluation: Evaluation,
    proof: Proof,
) -> str:
    """Write the card of an exported model.

    Args:
        name: name of the exported folder.
        model: what was exported.
        export_format: its format.
        evaluation: its accuracy.
        proof: how far the exported file agrees with distrain.
    """
    sections = {
        "Use": _describe_use(model, export_format),
        "Classes": _describe_classes(model),
        "Training": _describe_training(model),
        "Accuracy": _describe_accuracy(evaluation),
        "Proof": _describe_proof(export_format, proof),
        "Intended use": _describe_intended_use(evaluation),
    }
    text = f"---\n{dump_yaml(_make_metadata(name, model, evaluation))}---\n\n# {name}\n"
    for title, body in sections.items():
        text += f"\n## {title}\n\n{body.strip()}\n"
    return text


def _make_metadata(
    name: str, model: TrainedModel, evaluation: Evaluation
) -> Mapping[str, object]:
    """Return the metadata that the hub reads."""
    result = evaluation.result
    metrics = [
        {"type": "accuracy", "name": "top-1", "value": result.top1},
        {"type": "accuracy", "name": "top-5", "value": result.top5},
    ]
    dataset = {"name": evaluation.data, "type": "imagefolder", "split": "validation"}
    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": dataset,
            "metrics": metrics,
        }
    ]
    return {
        "library_name": "distrain",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", model.trained_config.model.name],
        "model-index": [{"name": name, "results": results}],
    }


def _describe_use(model: TrainedModel, export_format: ExportFormat) -> str:
    """Return the code that classifies an image file, as a user would run it."""
    return f"```python\n{_USES[export_format.name](model)}```"


def _use_distrain(model: TrainedModel) -> str:
    return """\
import distrain

for prediction in distrain.Predictor(".").predict("photo.jpg"):
    print(prediction.classes[0].name)
"""


def _use_torchvision(model: TrainedModel) -> str:
    info = model.info
    arguments = {"num_classes": len(info.classes), **get_torchvision_options(model)}
    shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"""\
import json
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

network = torchvision.models.{get_torchvision_name(model)}({shown})
network.load_state_dict(load_file("model.safetensors"))
network.eval()

# Resize the short side to {info.resized_side}, and cut out the center.
info = json.loads(Path("{files.MODEL_FILE}").read_text("utf-8"))
image = Image.open("photo.jpg").convert("RGB")
ratio = min(image.size) / {info.resized_side}
width, height = (int(length / ratio + 0.5) for length in image.size)
image = image.resize((width, height), Image.Resampling.BILINEAR)
left = (width - {info.crop}) // 2
top = (height - {info.crop}) // 2
image = image.crop((left, top, left + {info.crop}, top + {info.crop}))
pixels = (np.array(image) - np.array(info["mean"])) / np.array(info["std"])
images = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]

with torch.no_grad():
    probabilities = network(images).softmax(1)[0]
print(info["classes"][int(probabilities.argmax())])
"""


def _use_onnx(model: TrainedModel) -> str:
    return f"""\
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
{_OPEN_IMAGE}probabilities = session.run(None, {{"images": image[None]}})[0][0]
{_PRINT_CLASS}"""


def _use_torch_export(model: TrainedModel) -> str:
    return f"""\
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

classify = torch.export.load("model.pt2").module()
{_OPEN_IMAGE}with torch.no_grad():
    probabilities = classify(torch.from_numpy(image)[None])[0]
{_PRINT_CLASS}"""


_USES: Mapping[str, Callable[[TrainedModel], str]] = {
    "safetensors": _use_distrain,
    "torchvision": _use_torchvision,
    "onnx": _use_onnx,
    "torch-export": _use_torch_export,
}


def _describe_classes(model: TrainedModel) -> str:
    """Return the first classes; all of them are in `model.json`."""
    classes = model.info.classes
    shown = json.dumps(classes[:_MAX_CLASSES], ensure_ascii=False)
    more = ""
    if len(classes) > _MAX_CLASSES:
        more = f" The first {_MAX_CLASSES}:"
    return (
        f"{len(classes):,} classes, listed in `model.json` in the order of the "
        f"outputs.{more}\n\n```\n{shown}\n```"
    )


def _describe_training(model: TrainedModel) -> str:
    config = model.trained_config
    origin = model.origin
    is_exact = origin.reduction == "exact"
    again = "gives these weights bit for bit" if is_exact else "gives close weights"
    versions = ", ".join(f"{key} {value}" for key, value in origin.environment.items())
    rows = {
        "network": config.model.name,
        "training set": f"{config.data.train} (fingerprint {config.data.fingerprint})",
        "optimizer": config.optimizer.name,
        "learning rate": f"{config.schedule.name}, from {config.schedule.lr:g}",
        "loss": config.loss.name,
        "global batch": f"{config.global_batch:,} images",
        "steps": f"{origin.step:,}",
        "checkpoint": origin.checkpoint,
        "weights, SHA-256": f"`{origin.weights}`",
        "trained with": versions,
    }
    return (
        f"{_format_table(rows)}\n\n`config.yaml` is the whole recipe: training it "
        f"again on the same kind of hardware {again}, on any number of workers."
    )


def _describe_accuracy(evaluation: Evaluation) -> str:
    result = evaluation.result
    rows = {
        "images": f"{result.num_samples:,} of {evaluation.data} (fingerprint "
        f"{evaluation.data_fingerprint})",
        "top-1": format_accuracy(result.top1, evaluation.top1_interval),
        "top-5": format_accuracy(result.top5, evaluation.top5_interval),
        "loss": f"{result.loss:.4f} ({evaluation.loss_name})",
    }
    return (
        f"{_format_table(rows)}\n\nMeasured by distrain on center crops, in fp32; "
        "`export.json` has it for each class."
    )


def _describe_proof(export_format: ExportFormat, proof: Proof) -> str:
    verdict = "passed" if proof.passed else "FAILED: do not use the file"
    sentences = "\n".join(f"- {sentence}" for sentence in proof.describe())
    return (
        f"`{export_format.file}` was loaded in its own runtime, and given the decoded "
        f"images of the table above ({verdict}):\n\n{sentences}"
    )


def _describe_intended_use(evaluation: Evaluation) -> str:
    return (
        "To classify images like those of its training set into the classes above. "
        "Each image gets one of them, also if it shows none. The accuracy is that on "
        f"{evaluation.data}; on other images it is not known."
    )


def _format_table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {key} | {_escape(value)} |" for key, value in rows.items()]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Return a text without what would end a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
