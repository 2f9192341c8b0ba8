"""Base classes of the networks that a config can name."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ValidationInfo, field_validator

from distrain.data.storage.url import expand_home, forbid_url_secrets
from distrain.fields import Choice, make_conflict, operation_field, result_field

if TYPE_CHECKING:
    import torch
    from torch import nn


class Model(Choice):
    """Settings of a network, and how to build it."""

    default_name = "alexnet"
    import_syntax = "torchvision:NAME, package.module:callable"
    min_crop: ClassVar[int] = 1
    """Smallest side of an image in pixels that the network can take, where it is known
    without building the network."""

    init_from: str | None = operation_field(None)
    """Path or URL of the weights that a new run starts from: a run directory (its best
    checkpoint, else the newest), a checkpoint, or a file of safetensors or torch.save
    (torchvision's, say); null: weights drawn from the seed. A resume does not read it.
    [operation]"""
    init_sha256: str | None = result_field(None, pattern="^[0-9a-f]{64}$")
    """SHA-256 of the file of weights that `init_from` led to; null: filled in when the
    run starts. [result]"""
    freeze: tuple[str, ...] = result_field((), strict=False)
    """Names of layers or parameters that are not trained, such as [features,
    classifier.1]: what is below them is frozen too, and batch normalization there
    stands still. [result]"""

    @field_validator("init_from")
    @classmethod
    def _check_init(cls, value: str | None) -> str | None:
        return forbid_url_secrets(expand_home(value))

    @abstractmethod
    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """Build the network for inspection only.

        It has no memory for weights (torch's meta device) where that is possible.
        """

    @abstractmethod
    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """Build the network with its first weights, on the CPU.

        The weights are a pure function of (config, number of classes, seed).

        Raises:
            UserError: an imported network cannot be built or cannot be trained exactly.
        """

    def check_crop(self, crop: int) -> None:
        """Raise a conflict if images of this side, in pixels, are too small.

        It is for a validator of the section that holds `model` and `augment`.
        """
        if crop < self.min_crop:
            raise make_conflict(
                f"{self.name} needs augment.crop of at least {self.min_crop} pixels, "
                f"not {crop}",
                "model.name",
                "augment.crop",
            )

    def check_trainable(
        self,
        model: "nn.Module",
        num_classes: int,
        crop: int,
    ) -> None:
        """Test whether the built network can be trained exactly. Raises UserError."""

    def is_unused_weight(self, name: str) -> bool:
        """Return whether files of this network may hold a tensor that it does not use.

        That is torch's count of batches, which matters to cumulative averages alone.
        """
        return name.endswith(".num_batches_tracked")

    @classmethod
    def list_classes(cls) -> list[type[BaseModel]]:
        """List every registered network, and the class of imported ones."""
        return [*super().list_classes(), ImportedModel]

    @classmethod
    def _find_external_class(cls, name: str) -> type[Choice]:
        # The name is that of a callable, not of a subclass: one class stands for all.
        return ImportedModel


class BuiltInModel(Model):
    """Network that comes with distrain."""

    width: float = result_field(1.0, gt=0)
    """Factor on all numbers of channels and hidden units, above 0; each is rounded to a
    multiple of 8, and at least 8. [result]"""
    dropout: float = result_field(0.5, ge=0, lt=1)
    """Probability that a unit of the two hidden fully connected layers is dropped, at
    least 0 and below 1. The default is that of Krizhevsky et al. 2012. [result]"""

    @abstractmethod
    def build_layers(self, num_classes: int) -> "nn.Module":
        """Build the layers, on torch's default device."""

    @abstractmethod
    def initialize_weights(
        self,
        model: "nn.Module",
        generator: "torch.Generator",
    ) -> None:
        """Draw the first weights of the layers, in place."""

    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """Build the network without memory for weights."""
        import torch

        with torch.device("meta"):
            return self.build_layers(num_classes)

    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """Build the network with its first weights."""
        import torch

        from distrain.philox import Purpose, derive_seed

        model = self.build_skeleton(num_classes)
        # Allocate the weights. Not by `to_empty`: for tensors without memory that loads
        # torch's symbolic shapes, which takes half a second.
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(tensors, assign=True)
        # Draw them from a generator of their own, so that nothing else changes them.
        generator = torch.Generator().manual_seed(derive_seed(seed, Purpose.WEIGHTS))
        with torch.no_grad():
            self.initialize_weights(model, generator)
        return model

    def scale_channels(self, channels: int) -> int:
        """Scale a number of channels or units by `width`."""
        return max(8, 8 * round(channels * self.width / 8))


class ImportedModel(Model):
    """Network of torchvision, or of the user."""

    name: str = result_field(pattern=r"^[^:]+:[^:]+$")
    """torchvision:NAME, or package.module:callable, which is called with the number of
    classes and returns an nn.Module from images (n, 3, crop, crop) to logits (n,
    classes). [result]"""
    options: dict[str, Any] = result_field({})
    """Further keyword arguments of the callable. [result]"""

    @field_validator("options")
    @classmethod
    def _check_no_weights(
        cls,
        value: dict[str, Any],
        info: ValidationInfo,
    ) -> dict[str, Any]:
        # A callable of the user may have an argument of that name.
        is_torchvision = info.data.get("name", "").startswith("torchvision:")
        if is_torchvision and "weights" in value:
            raise make_conflict(
                "torchvision's weights are not downloaded by a run: remove weights, "
                "save them by torch.save(model.state_dict(), FILE) and set "
                "model.init_from to that file",
                "name",
                "options.weights",
            )
        return value

    def build_skeleton(self, num_classes: int) -> "nn.Module":
        """Build the network with weights: its code decides where they are."""
        return self.build(num_classes, 0)

    def build(self, num_classes: int, seed: int) -> "nn.Module":
        """Call the callable, with torch's generator seeded."""
        from distrain.models.external import build_imported_model
        from distrain.philox import Purpose, derive_seed

        weights_seed = derive_seed(seed, Purpose.WEIGHTS)
        return build_imported_model(self.name, self.options, num_classes, weights_seed)

    def check_trainable(
        self,
        model: "nn.Module",
        num_classes: int,
        crop: int,
    ) -> None:
        """Run a training forward and backward."""
        from distrain.models.external import run_trial_step

        run_trial_step(model, self.name, num_classes, crop)

    def is_unused_weight(self, name: str) -> bool:
        """Return whether files of this network may hold a tensor that it does not use.

        Some of torchvision's have auxiliary classifiers, which are not built here.
        """
        from distrain.models.external import AUXILIARY_CLASSIFIERS

        is_auxiliary = name.startswith(AUXILIARY_CLASSIFIERS.get(self.name, ()))
        return is_auxiliary or super().is_unused_weight(name)
