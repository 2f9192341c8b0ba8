"""The settings of `distrain model`: a network and the images that it sees, without a run around them."""

from collections.abc import Sequence

from pydantic import ValidationInfo, field_validator

from distrain.config import AnyModel
from distrain.data.config import Augment
from distrain.fields import Section
from distrain.models.model import Model
from distrain.parsing import parse_section


class ModelTableConfig(Section):
    """The sections of a config that the table of a network uses."""

    augment: Augment = Augment()
    """Augmentation."""
    model: AnyModel
    """Network."""

    @field_validator("model")
    @classmethod
    def _check_crop(cls, value: Model, info: ValidationInfo) -> Model:
        if "augment" in info.data:
            value.check_crop(info.data["augment"].crop)
        return value


def make_model_table_config(name: str, overrides: Sequence[str]) -> ModelTableConfig:
    """Make the settings of a network's table. Raises UserError naming every problem."""
    return parse_section(
        ModelTableConfig, {"model": {"name": name}}, f"model {name}", overrides
    )
