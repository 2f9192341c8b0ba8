"""What a network of a config is: its settings, and how it is made."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from distrain.fields import Choice, result_field

if TYPE_CHECKING:
    import torch
    from torch import nn


class Model(Choice):
    """A network."""

    default_name = "alexnet"
    import_syntax = "torchvision:NAME, package.module:callable"
    min_crop: ClassVar[int] = 1
    """The least side of an image in pixels that it can take, where it is known without building the network."""

    @abstractmethod
    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """The network to look at, without memory for weights (on torch's meta device) where that can be had."""

    @abstractmethod
    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """The network with its first weights, a pure function of (config, classes, seed), on the CPU.

        Raises:
            UserError: a model that is imported cannot be, or not be trained exactly.
        """

    def check_crop(self, crop: int) -> None:
        """Raises ValueError where images of that side in pixels are too small for it."""
        if crop < self.min_crop:
            raise ValueError(
                f"{self.name} needs augment.crop of at least {self.min_crop} pixels, not {crop}"
            )

    def check_trainable(self, model: "nn.Module", num_classes: int, crop: int) -> None:
        """Try out whether it can be trained exactly. Raises UserError."""

    @classmethod
    def list_classes(cls) -> list[type[BaseModel]]:
        """Every form, that of others' networks among them."""
        return [*super().list_classes(), ImportedModel]

    @classmethod
    def _find_external_class(cls, name: str) -> type[Choice]:
        """A callable that makes a network is no form of its own."""
        return ImportedModel


class BuiltInModel(Model):
    """A network of distrain's own."""

    width: float = result_field(1.0, gt=0)
    """Factor on all channel and hidden unit counts, each rounded to a multiple of 8. [result]"""
    dropout: float = result_field(0.5, ge=0, lt=1)
    """Probability that a unit of the two hidden fully connected layers is dropped. [result]"""

    @abstractmethod
    def build_layers(self, num_classes: int) -> "nn.Module":
        """Its layers."""

    @abstractmethod
    def initialize_weights(
        self, model: "nn.Module", generator: "torch.Generator"
    ) -> None:
        """Give its layers their first weights, in place."""

    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """Without memory for weights."""
        import torch

        with torch.device("meta"):
            return self.build_layers(num_classes)

    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """With its first weights."""
        import torch

        from distrain.philox import Purpose, derive_seed

        model = self.build_skeleton(num_classes)
        # Not `to_empty`: for tensors without memory that loads torch's symbolic shapes, which takes half a second.
        room = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(room, assign=True)
        with torch.no_grad():
            self.initialize_weights(
                model,
                torch.Generator().manual_seed(derive_seed(seed, Purpose.WEIGHTS)),
            )
        return model

    def scale_channels(self, channels: int) -> int:
        """Channels or units at this width."""
        return max(8, 8 * round(channels * self.width / 8))


class ImportedModel(Model):
    """A network of torchvision's, or the user's own."""

    name: str = result_field(pattern=r"^[^:]+:[^:]+$")
    """torchvision:NAME, or package.module:callable, which is called with the number of classes and returns an
    nn.Module from images (n, 3, crop, crop) to logits (n, classes). [result]"""
    options: dict[str, Any] = result_field({})
    """Further keyword arguments of the callable. [result]"""

    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """With weights: what others make takes memory."""
        return self.build(num_classes, 0)

    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """Call the callable, under a seed."""
        from distrain.models.external import build_imported_model
        from distrain.philox import Purpose, derive_seed

        return build_imported_model(
            self.name, self.options, num_classes, derive_seed(seed, Purpose.WEIGHTS)
        )

    def check_trainable(self, model: "nn.Module", num_classes: int, crop: int) -> None:
        """Run a training forward and backward."""
        from distrain.models.external import run_trial_step

        run_trial_step(model, self.name, num_classes, crop)
