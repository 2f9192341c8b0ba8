"""`model.json`: what it takes to use a model's weights without its data sets.

The run directory has one, and each checkpoint another with the same content.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.rundir import files
from distrain.rundir.checkpoint_folder import (
    DamagedCheckpointError,
    read_verified_files,
)

FORMAT_VERSION = 1


# The field names are the keys of the file.
@dataclass(frozen=True)
class ModelInfo:
    """Network, classes, and how an evaluation makes its input of an image.

    The image is resized to `short_side`, both sides rounded to the nearest whole pixel
    and the result to whole values, and its center of `crop` x `crop` pixels is cut out;
    of a margin that is odd, the larger part is at the bottom or the right. The network
    takes (pixels - `mean`) / `std`, float32 of shape (n, 3, crop, crop).
    """

    distrain: str
    """Version that trained the model."""
    model: Mapping[str, Any]
    """Section `model` of the config: name and settings."""
    classes: tuple[str, ...]
    """Class name of each output."""
    channels: str
    """RGB: the order of the channels."""
    mean: tuple[float, ...]
    """Subtracted from each channel, in units of 0 to 255."""
    std: tuple[float, ...]
    """Divides each channel, in units of 0 to 255."""
    crop: int
    """Side of the network's input in pixels."""
    short_side: int | None
    """Pixels of the short side before the crop; null: images are used as stored, see
    `image_size`."""
    image_size: tuple[int, int] | None
    """Height and width of the training set's images as stored; null: they differ."""
    interpolation: str
    """How images are resized: bilinear."""
    antialias: bool
    """Whether the filter is widened where images become smaller."""

    @property
    def resized_side(self) -> int:
        """Pixels to which the short side of an image of any size is resized.

        It is that of the training set's stored images if those are used as they are.
        """
        if self.short_side is not None:
            return self.short_side
        assert self.image_size is not None, "images that differ in size are resized"
        return min(self.image_size)

    def to_json(self) -> str:
        """Return the content of the file."""
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> "ModelInfo":
        """Read the content of a file.

        Raises:
            ValueError: it is of a later format, or not such a file.
        """
        tree = json.loads(text)
        if not isinstance(tree, dict) or "format" not in tree:
            raise ValueError("it has no format")
        if tree["format"] != FORMAT_VERSION:
            raise ValueError(
                f"it has format {tree['format']}, and this version of distrain reads "
                f"format {FORMAT_VERSION}"
            )
        missing = [field.name for field in fields(ModelInfo) if field.name not in tree]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        values = {field.name: tree[field.name] for field in fields(ModelInfo)}
        for key in ("classes", "mean", "std", "image_size"):
            if values[key] is not None:
                values[key] = tuple(values[key])
        return ModelInfo(**values)


def read_model_info(store: Store, checkpoint: str | None = None) -> ModelInfo:
    """Read `model.json` of a run directory, or of one of its checkpoints.

    Args:
        store: the run directory.
        checkpoint: name of a checkpoint, whose manifest verifies the file.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    place = files.MODEL_FILE
    if checkpoint is not None:
        place = f"{files.CHECKPOINTS_DIR}/{checkpoint}/{place}"
    shown = f"{store.redacted_url}/{place}"
    try:
        if checkpoint is None:
            return ModelInfo.from_json(store.read(place))
        contents = read_verified_files(store, checkpoint, (files.MODEL_FILE,))
        return ModelInfo.from_json(contents[files.MODEL_FILE])
    except FileNotFoundError:
        raise UserError(
            f"there is no {shown}: repeat the command that trained the run, which "
            "writes it from the config and the data"
        ) from None
    except (DamagedCheckpointError, ValueError, TypeError) as error:
        raise UserError(
            f"{shown} cannot be used ({error}): repeat the command that trained the "
            "run, which writes it anew into the run directory"
        ) from None
