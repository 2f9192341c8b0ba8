"""Build the network of a run, freeze what is not trained, and check the rest."""

from torch import nn

from distrain.config import Config
from distrain.errors import UserError
from distrain.models.freezing import freeze_layers
from distrain.models.layers import find_batch_norms


def build_model(config: Config, num_classes: int) -> nn.Module:
    """Build the model with weights drawn from the seed, on the CPU.

    Raises:
        UserError: it cannot be trained exactly, or a micro-batch has no variance.
    """
    model = config.model.build(num_classes, config.seed)
    prepare_model(config, model, num_classes)
    return model


def prepare_model(config: Config, model: nn.Module, num_classes: int) -> None:
    """Freeze the layers of `model.freeze`, and check that the rest can be trained.

    Raises:
        UserError: it cannot be trained exactly, there are no such layers, or it has
            batch norm and micro-batches of one sample.
    """
    freeze_layers(model, config.model.freeze)
    config.model.check_trainable(model, num_classes, config.augment.crop)
    if config.micro_batch_size == 1 and find_batch_norms(model):
        raise UserError(
            f"{config.model.name} has batch normalization, and virtual_workers = "
            f"{config.virtual_workers} leaves one sample to each, which has no "
            "variance: lower virtual_workers, or raise global_batch"
        )
