"""Formats of an exported model: how each is written, and loaded in its own runtime."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distrain.errors import UserError
from distrain.exporting.graph import SIZE_NAMES, ImageClassifier, trace_graph
from distrain.exporting.preprocessing import Preprocessing
from distrain.exporting.torchvision_form import (
    build_torchvision_network,
    convert_state_dict,
)
from distrain.inference.trained_model import TrainedModel

_OPSET = 20


class Runtime(ABC):
    """Exported file, loaded by the program that it is for."""

    @abstractmethod
    def compute_probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Classify n images of one size; called from several threads.

        Args:
            images: RGB of shape (n, height, width, 3).

        Returns:
            Shape (n, classes).
        """


class ExportFormat(ABC):
    """Format of an exported model."""

    name: ClassVar[str]
    file: ClassVar[str]
    """Name of the model's file."""
    packages: ClassVar[Sequence[str]] = ()
    """Packages that the format needs, of the extra `onnx`."""
    tie_tolerance: ClassVar[float] = 0.0
    """Two classes whose probabilities differ by less may change places."""

    def check_packages(self) -> None:
        """Raise UserError if a package of the format is not installed."""
        for package in self.packages:
            if find_spec(package) is None:
                raise UserError(
                    f"format {self.name} needs {package}: pip install 'distrain[onnx]'"
                )

    @abstractmethod
    def check_model(self, model: TrainedModel) -> None:
        """Raise UserError if the network is known to have no form in this format."""

    @abstractmethod
    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the model's file into a folder."""

    @abstractmethod
    def load(self, model: TrainedModel, folder: Path) -> Runtime:
        """Load the file of a folder in its own runtime.

        Args:
            model: what was exported; of it, the weights are not used.
            folder: the exported folder.
        """


class SafetensorsFormat(ExportFormat):
    """Weights under distrain's names, which it opens itself."""

    name = "safetensors"
    file = "model.safetensors"

    def check_model(self, model: TrainedModel) -> None:
        """Take any network."""

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the weights."""
        write_safetensors(model.module.state_dict(), folder / self.file)

    def load(self, model: TrainedModel, folder: Path) -> Runtime:
        """Build distrain's own network."""
        network = model.trained_config.model.build_skeleton(len(model.info.classes))
        load_safetensors(network, folder / self.file)
        return _TorchRuntime(_make_classifier(model, network))


class TorchvisionFormat(ExportFormat):
    """Weights for a network of torchvision."""

    name = "torchvision"
    file = "model.safetensors"

    def check_model(self, model: TrainedModel) -> None:
        """Raise UserError if torchvision does not have the network."""
        convert_state_dict(model)

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the weights under torchvision's names."""
        write_safetensors(convert_state_dict(model), folder / self.file)

    def load(self, model: TrainedModel, folder: Path) -> Runtime:
        """Build torchvision's own network."""
        network = build_torchvision_network(model)
        load_safetensors(network, folder / self.file)
        return _TorchRuntime(_make_classifier(model, network))


class TorchExportFormat(ExportFormat):
    """Graph of torch.export, which runs without distrain."""

    name = "torch-export"
    file = "model.pt2"

    def check_model(self, model: TrainedModel) -> None:
        """Take any network: whether torch can trace it, writing it shows."""

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the graph."""
        program = trace_graph(model)
        torch.export.save(
            program, folder / self.file, extra_files=_make_metadata(model)
        )

    def load(self, model: TrainedModel, folder: Path) -> Runtime:
        """Load the graph by torch."""
        program = torch.export.load(folder / self.file)
        return _TorchRuntime(program.module())


class OnnxFormat(ExportFormat):
    """Graph of ONNX."""

    name = "onnx"
    file = "model.onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    # onnxruntime adds the products of a convolution in another order.
    tie_tolerance = 1e-5

    def check_model(self, model: TrainedModel) -> None:
        """Take any network: whether torch can trace it, writing it shows."""

    def write(self, model: TrainedModel, folder: Path) -> None:
        """Write the graph."""
        program = torch.onnx.export(
            trace_graph(model),
            input_names=["images"],
            output_names=["probabilities"],
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None, "torch returns None without dynamo"
        _name_sizes(program.model.graph)
        program.model.metadata_props.update(_make_metadata(model))
        program.save(folder / self.file)

    def load(self, model: TrainedModel, folder: Path) -> Runtime:
        """Load the graph by onnxruntime."""
        return _OnnxRuntime(folder / self.file)


FORMATS: Mapping[str, ExportFormat] = {
    format_.name: format_
    for format_ in (
        SafetensorsFormat(),
        TorchvisionFormat(),
        OnnxFormat(),
        TorchExportFormat(),
    )
}
"""By name."""


def get_format(name: str) -> ExportFormat:
    """Return a format by its name. Raises UserError."""
    if name not in FORMATS:
        raise UserError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


class _TorchRuntime(Runtime):
    """Module from images to probabilities, in torch on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def compute_probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        with torch.no_grad():
            probabilities: Tensor = self._module(torch.from_numpy(images))
        return probabilities.double().numpy()


class _OnnxRuntime(Runtime):
    """Session of onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Lanes use the cores.
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )

    def compute_probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        (probabilities,) = self._session.run(None, {"images": images})
        return np.asarray(probabilities, np.float64)


def _make_classifier(model: TrainedModel, network: nn.Module) -> nn.Module:
    return ImageClassifier(Preprocessing(model.info), network).eval()


def _name_sizes(graph: Any) -> None:
    """Give the sizes of the input readable names, wherever they are, in place."""
    (images,) = graph.inputs
    symbols = [str(size) for size in images.shape[:3]]
    names = dict(zip(symbols, SIZE_NAMES, strict=True))
    values = [*graph.inputs, *graph.outputs]
    values += [output for node in graph for output in node.outputs]
    for value in values:
        for axis, size in enumerate(value.shape or ()):
            if str(size) in names:
                value.shape[axis] = names[str(size)]


def _make_metadata(model: TrainedModel) -> dict[str, str]:
    """Return what a graph's file says of itself."""
    return {
        "classes": json.dumps(model.info.classes),
        "weights": model.origin.weights,
    }


def write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as other libraries expect them: as those of PyTorch."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt"})


def load_safetensors(network: nn.Module, path: Path) -> None:
    """Load all weights of a network from a file."""
    network.load_state_dict(safetensors.torch.load_file(path), assign=True)
