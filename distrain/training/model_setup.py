"""Build the network of a run, freeze what is not trained, and check the rest."""

from torch import nn

from distrain.config import Config
from distrain.errors import UserError
from distrain.models.freezing import freeze_layers
from distrain.models.layers import find_batch_norms, get_trainable_parameters
from distrain.parameter_names import check_prefixes, has_prefix


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
        UserError: it cannot be trained exactly, `model.freeze` or `optimizer.lr_scale`
            names layers that it lacks, or it has batch norm and micro-batches of one
            sample.
    """
    freeze_layers(model, config.model.freeze)
    check_lr_scale(config, model)
    config.model.check_trainable(model, num_classes, config.augment.crop)
    if config.micro_batch_size == 1 and find_batch_norms(model):
        raise UserError(
            f"{config.model.name} has batch normalization, and virtual_workers = "
            f"{config.virtual_workers} leaves one sample to each, which has no "
            "variance: lower virtual_workers, or raise global_batch"
        )


def check_lr_scale(config: Config, model: nn.Module) -> None:
    """Check that `optimizer.lr_scale` names parameters that are trained.

    Raises:
        UserError: it names some that there are not, or that are frozen.
    """
    prefixes = config.optimizer.lr_scale
    check_prefixes(
        "optimizer.lr_scale", prefixes, [name for name, _ in model.named_parameters()]
    )
    trained = get_trainable_parameters(model)
    for prefix in prefixes:
        if not any(has_prefix(name, prefix) for name in trained):
            raise UserError(
                f"optimizer.lr_scale has {prefix}, all of which is frozen: remove it, "
                "or take it out of model.freeze"
            )
