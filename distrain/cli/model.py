"""Config of `distrain model`: a model and its image size, without a run."""

from collections.abc import Sequence

from pydantic import ValidationInfo, field_validator

from distrain.config import AnyModel
from distrain.data.config import Augment
from distrain.fields import Section
from distrain.models.model import Model
from distrain.parsing import parse_section


class ModelTableConfig(Section):
    """Sections of a config that the table of a model's layers needs."""

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


def make_model_table_config(name: str, overrides: Sequence[str]) -> ModelTableConfig:
    """Build the config of a model's table from its name and `key.sub=value` overrides.

    Raises:
        UserError: the name or an override is wrong; names every problem at once.
    """
    tree = {"model": {"name": name}}
    return parse_section(ModelTableConfig, tree, f"model {name}", overrides)
