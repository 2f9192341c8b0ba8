"""Table of a model's layers, without a run: `distrain model`."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ValidationInfo, field_validator

from distrain.config import AnyModel
from distrain.data.config import Augment
from distrain.errors import UserError
from distrain.fields import CommandSection
from distrain.models.model import Model
from distrain.models.summary import ModelSummary, summarize_layers
from distrain.parsing import parse_section


class ModelTableConfig(CommandSection):
    """Sections of a config that the table of a model's layers needs."""

    command: ClassVar[str] = "distrain model"

    augment: Augment = Augment()
    """Augmentation; its crop is the image size."""
    model: AnyModel
    """Model."""

    # Validation sees the fields above its own only, so `augment` comes first.
    @field_validator("model")
    @classmethod
    def _check_crop(cls, value: Model, info: ValidationInfo) -> Model:
        # Missing if `augment` is invalid itself, which is reported on its own.
        if "augment" in info.data:
            value.check_crop(info.data["augment"].crop)
        return value


def model(
    name: str, overrides: Sequence[str] = (), *, classes: int = 1000
) -> ModelSummary:
    """Return a model's layers: output shapes, parameters and multiply-accumulates.

    Args:
        name: alexnet, alexnet2012, alexnet_bn, torchvision:NAME or package:callable.
        overrides: changes to the config's sections model and augment, as
            `key.sub=value`; augment.crop is the side of the images.
        classes: number of classes, at least 1.

    Raises:
        UserError: the name or an override is wrong (names every problem at once), or
            there are no classes.
    """
    if classes < 1:
        raise UserError(f"classes {classes} is not valid: use at least 1")
    tree = {"model": {"name": name}}
    config = parse_section(ModelTableConfig, tree, f"model {name}", overrides)
    skeleton = config.model.build_skeleton(classes)
    side = config.augment.crop
    return ModelSummary(side, summarize_layers(skeleton, side))
