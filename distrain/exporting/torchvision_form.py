"""Form of a trained model in torchvision: a network of its own, and its weights."""

import torch
from torch import Tensor, nn

from distrain.errors import UserError
from distrain.inference.trained_model import TrainedModel
from distrain.models.model import ImportedModel

_PREFIX = "torchvision:"
_COUNTER = ".num_batches_tracked"
# By default these have auxiliary classifiers, which are not built for training either.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


def get_torchvision_name(model: TrainedModel) -> str | None:
    """Return the name of a model's network in torchvision; None: it has none."""
    config = model.trained_config.model
    if config.name == "alexnet":
        return "alexnet"
    if config.name.startswith(_PREFIX):
        return config.name.removeprefix(_PREFIX)
    return None


def get_torchvision_options(model: TrainedModel) -> dict[str, object]:
    """Return the keyword arguments of the network beside its number of classes."""
    config = model.trained_config.model
    if not isinstance(config, ImportedModel):
        return {}
    is_auxiliary = get_torchvision_name(model) in _WITH_AUXILIARY
    defaults = {"aux_logits": False, "init_weights": False} if is_auxiliary else {}
    return {**defaults, **config.options}


def build_torchvision_network(model: TrainedModel) -> nn.Module:
    """Build torchvision's network of a model, with random weights."""
    import torchvision.models

    name = get_torchvision_name(model)
    assert name is not None, "see convert_state_dict"
    options = get_torchvision_options(model)
    # The caller's random numbers stay as they are.
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = torchvision.models.get_model(
            name, num_classes=len(model.info.classes), **options
        )
    return network


def convert_state_dict(model: TrainedModel) -> dict[str, Tensor]:
    """Return a model's weights under the names that torchvision's network has.

    Raises:
        UserError: torchvision has no such network, or of other shapes.
    """
    config = model.trained_config.model
    if get_torchvision_name(model) is None:
        raise UserError(
            f"model {config.name} has no form in torchvision, which has alexnet and "
            "torchvision:NAME alone: use another format"
        )
    tensors = model.module.state_dict()
    with torch.device("meta"):
        expected = build_torchvision_network(model).state_dict()
    converted = {}
    for name, like in expected.items():
        if name not in tensors and name.endswith(_COUNTER):
            # Ours do not count batches, which matters to cumulative averages alone.
            converted[name] = torch.tensor(model.origin.step)
        elif name in tensors and tensors[name].shape == like.shape:
            converted[name] = tensors[name]
        else:
            raise UserError(
                f"model {config.name} has no form in torchvision, whose network has "
                f"another {name} of shape {tuple(like.shape)}: use another format, or "
                "train with model.width=1"
            )
    assert tensors.keys() <= converted.keys(), "torchvision lacks a tensor"
    return converted
