"""First weights of a run that starts from those of another: `model.init_from`."""

from dataclasses import dataclass

from torch import Tensor, nn

from distrain.config import Config
from distrain.distributed.world import World
from distrain.errors import UserError
from distrain.models.weight_matching import find_class_dimensions, match_weights
from distrain.rundir.weights_source import read_named_weights
from distrain.training.checkpoint_state import CheckpointState


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from, on rank 0 alone."""

    tensors: dict[str, Tensor]
    """By the network's names; what is not among them keeps its drawn weights."""
    sha256: str
    """Of the file that they are from."""
    lines: tuple[str, ...]
    """What is taken and what is new, for the log."""


def read_initial_weights(
    config: Config, model: nn.Module, classes: tuple[str, ...]
) -> InitialWeights:
    """Read the weights that `model.init_from` names, and match them to the network.

    Args:
        config: the run.
        model: the network, built for the run's classes.
        classes: class names of the run, by label.

    Raises:
        UserError: there are none, they are of another network, or not those that
            `model.init_sha256` names.
        AttemptError: their storage fails.
    """
    source = read_named_weights(str(config.model.init_from))
    weights = source.file
    expected_hash = config.model.init_sha256
    if expected_hash not in (None, weights.sha256):
        raise UserError(
            f"model.init_sha256 is {expected_hash}, but {weights.url} has "
            f"{weights.sha256}: use the file that the config was made for, or remove "
            "model.init_sha256"
        )
    state_dict = model.state_dict()
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name in state_dict or not config.model.is_unused_weight(name)
    }
    matched = match_weights(
        tensors,
        state_dict,
        find_class_dimensions(config.model, state_dict, len(classes)),
        weights.url,
        classes=classes,
        file_classes=source.classes,
    )
    parameters = dict(model.named_parameters())
    for name in matched.new_names:
        if name in parameters and not parameters[name].requires_grad:
            raise UserError(
                f"model.freeze includes {name}, which {weights.url} does not have for "
                "these classes, so that it would stay as it is drawn: leave it out of "
                "model.freeze"
            )
    lines = (*weights.notes, f"init: {matched.description}")
    return InitialWeights(matched.tensors, weights.sha256, lines)


def share_initial_weights(
    config: Config, world: World, model: nn.Module, classes: tuple[str, ...]
) -> tuple[Config, InitialWeights | None]:
    """Read the weights of `model.init_from` on rank 0, for a run that starts.

    All ranks must call it.

    Args:
        config: the run.
        world: this rank.
        model: the network, built for the run's classes.
        classes: class names of the run, by label.

    Returns:
        The config with the hash of the weights' file; and on rank 0 the weights, if
        there is a `model.init_from`.

    Raises:
        UserError, AttemptError: as in `read_initial_weights`.
    """
    if config.model.init_from is None:
        if config.model.init_sha256 is not None:
            raise UserError(
                "model.init_sha256 is set, but model.init_from is not: set "
                "model.init_from to the weights that it belongs to, or remove it"
            )
        return config, None
    weights = None
    with world.raise_on_all_ranks():
        if world.is_rank_zero:
            weights = read_initial_weights(config, model, classes)
    local_hash = weights and weights.sha256
    return _set_hash(config, world.all_gather_object(local_hash)[0]), weights


def keep_initial_hash(config: Config, state: CheckpointState) -> Config:
    """Return the config with the hash of the weights that a resumed run started from.

    Raises:
        UserError: the run started from drawn weights, and the config names others.
    """
    saved_hash = state.result.get("model.init_sha256")
    if saved_hash is None and config.model.init_from is not None:
        raise UserError(
            f"{config.run} started from drawn weights, and model.init_from is for the "
            "start of a run: remove it to resume, or start afresh in another run "
            "directory with run=..."
        )
    # Another hash is refused with all other differences.
    if config.model.init_sha256 is not None:
        return config
    return _set_hash(config, saved_hash)


def explain_unread_init(config: Config, state: CheckpointState) -> str | None:
    """Return a line if a resume names other weights than the run has started from."""
    if config.model.init_from in (None, state.config["model"].get("init_from")):
        return None
    return (
        "model.init_from is not read, since the run has started from other weights "
        f"(SHA-256 {config.model.init_sha256})"
    )


def load_initial_weights(
    world: World, model: nn.Module, weights: InitialWeights | None
) -> None:
    """Load the weights on rank 0, which has read them, and broadcast all tensors."""
    if weights is not None:
        model.load_state_dict(weights.tensors, strict=False)
    for tensor in model.state_dict().values():
        world.broadcast(tensor)


def _set_hash(config: Config, sha256: str | None) -> Config:
    model = config.model.model_copy(update={"init_sha256": sha256})
    return config.model_copy(update={"model": model})
