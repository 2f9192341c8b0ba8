"""Graph of a trained model: images of any size in, probabilities out."""

import warnings

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from distrain.errors import UserError
from distrain.exporting.preprocessing import Preprocessing
from distrain.fields import format_error
from distrain.inference.trained_model import TrainedModel

SIZE_NAMES = ("images", "height", "width")
"""Names of the sizes of the input that may be any."""


class ImageClassifier(nn.Module):
    """Network with the preprocessing before it, and the softmax behind it."""

    def __init__(self, preprocessing: Preprocessing, network: nn.Module) -> None:
        """Take the parts, both in evaluation mode."""
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Classify n images of one size.

        Args:
            images: RGB, uint8 of shape (n, height, width, 3).

        Returns:
            Probabilities: float32 of shape (n, classes).
        """
        logits: Tensor = self.network(self.preprocessing(images))
        return logits.softmax(1)


def trace_graph(model: TrainedModel) -> ExportedProgram:
    """Trace a model on the CPU for any number of images of any size.

    Raises:
        UserError: torch cannot trace the network.
    """
    info = model.info
    classifier = ImageClassifier(Preprocessing(info), model.module).eval()
    classifier.requires_grad_(False)
    # None of these sizes is special to the network, so that none becomes a constant.
    side = info.resized_side
    images = torch.zeros(2, side + 5, side + 9, 3, dtype=torch.uint8)
    sizes = {axis: Dim(name) for axis, name in enumerate(SIZE_NAMES)}
    # A first forward fills what layers keep, such as matrices of an average pooling,
    # which must not be made within the trace.
    model.module(torch.zeros(1, 3, info.crop, info.crop))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # torch's own deprecations, which concern neither caller nor graph.
            warnings.simplefilter("ignore")
            return torch.export.export(classifier, (images,), dynamic_shapes=(sizes,))
    # torch.export raises errors of many kinds, for code of any kind.
    except Exception as error:
        raise UserError(
            f"model {model.config.model.name} has no graph, since torch.export cannot "
            f"trace it ({format_error(error)}): export it as safetensors"
        ) from error
