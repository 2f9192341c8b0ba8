"""Open a trained model: a run directory, one of its checkpoints, or an exported one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from distrain.config import Config, parse_config
from distrain.data.batch_builder import Normalization
from distrain.data.storage.store import Store
from distrain.data.storage.url import join_url
from distrain.errors import UserError
from distrain.parsing import OptionOverride, parse_mapping
from distrain.result_fields import get_result_fields
from distrain.rundir import files
from distrain.rundir.checkpoint import hash_tensors, read_best_name
from distrain.rundir.checkpoint_folder import DamagedCheckpointError
from distrain.rundir.checkpoint_loading import (
    LoadedCheckpoint,
    find_checkpoint,
    load_checkpoint,
    load_newest_checkpoint,
)
from distrain.rundir.export_folder import (
    WEIGHTS_FILE,
    find_export_url,
    read_exported_files,
)
from distrain.rundir.model_info import ModelInfo, read_model_info
from distrain.rundir.weights_file import decode_weights
from distrain.training.checkpoint_state import CheckpointState

# They change how an evaluation computes, not what it computes: its result says which.
_EVALUATION_FIELDS = (
    "data.backend",
    "data.normalise",
    "data.pixel_limit",
    "evaluate.batch",
    "precision",
)


class ModelOrigin(NamedTuple):
    """Where the weights of a model come from."""

    run: str
    """Run directory, or exported folder, without credentials."""
    checkpoint: str
    """Name of the checkpoint."""
    step: int
    """Steps done."""
    weights: str
    """SHA-256 of all parameters and running statistics."""
    reduction: str
    """exact, or fast: then training again gives these weights up to rounding only."""
    environment: Mapping[str, str]
    """Versions and kind of hardware that trained it."""


@dataclass(frozen=True)
class TrainedModel:
    """Network with trained weights, and what it takes to run it."""

    module: nn.Module
    """On the CPU, in evaluation mode."""
    config: Config
    """Config of the run, with the caller's overrides."""
    trained_config: Config
    """Config of the run as it was trained."""
    info: ModelInfo
    """Its classes, and how its input is made of an image."""
    origin: ModelOrigin
    url: str
    """URL that opens this very checkpoint, or exported folder, again."""
    notes: tuple[str, ...]
    """Warnings about damaged checkpoints that were passed over, one sentence each."""

    @property
    def normalization(self) -> Normalization:
        """Normalization of the images, that of the training set."""
        mean = np.array(self.info.mean, np.float32)
        return Normalization(mean, np.array(self.info.std, np.float32))


def open_trained_model(
    url: str,
    *,
    checkpoint: str | int = "newest",
    overrides: Sequence[str | OptionOverride] = (),
) -> TrainedModel:
    """Open a run directory, one of its checkpoints, or an exported model.

    Args:
        url: path or URL of a run directory, of a folder in its `checkpoints`, or of a
            folder that `export` wrote (or the `model.safetensors` in it).
        checkpoint: which checkpoint of a run directory: "newest", "best" (by its top-1
            in validation), or the number of a step.
        overrides: `key.sub=value` changes to fields of the config that do not decide
            the weights.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or an override is wrong.
        RunError: it has another format, or all checkpoints are damaged.
        OSError: the run directory cannot be read.
    """
    export_url = find_export_url(url)
    if export_url is not None:
        return _open_exported_model(export_url, overrides)

    # Load the checkpoint, and what the run says of it.
    match = files.CHECKPOINT_URL_PATTERN.fullmatch(url)
    store = Store(match[1] if match else url)
    if match:
        loaded = _load_by_name(store, match[2])
        notes = list[str]()
    else:
        loaded, notes = _load_chosen(store, str(checkpoint))
    state = CheckpointState.from_dict(loaded.state)
    info = _read_info(store, loaded.name)
    place = f"{files.CHECKPOINTS_DIR}/{loaded.name}"
    module = _build_module(
        parse_config(dict(state.config), "the run's config"),
        info,
        loaded.model_state_dict,
        f"{store.redacted_url}/{place}",
    )
    origin = ModelOrigin(
        run=store.redacted_url,
        checkpoint=loaded.name,
        step=loaded.step,
        weights=hash_tensors(loaded.model_state_dict),
        reduction=state.reduction,
        environment=state.environment,
    )
    return TrainedModel(
        module=module,
        config=_override_config(state.config, store.url, overrides),
        trained_config=parse_config(dict(state.config), "the run's config"),
        info=info,
        origin=origin,
        url=join_url(store.url, place),
        notes=tuple(notes),
    )


def _open_exported_model(
    url: str, overrides: Sequence[str | OptionOverride]
) -> TrainedModel:
    """Open a folder that `export` wrote. Raises UserError and OSError."""
    store = Store(url)
    shown = store.redacted_url
    exported = read_exported_files(store)
    info = ModelInfo.from_json(exported.contents[files.MODEL_FILE])
    text = exported.contents[files.CONFIG_FILE].decode()
    tree = parse_mapping(text, f"{shown}/{files.CONFIG_FILE}")
    trained_config = parse_config(tree, f"{shown}/{files.CONFIG_FILE}")
    weights = decode_weights(exported.contents[WEIGHTS_FILE], f"{shown}/{WEIGHTS_FILE}")
    # torchvision's own layers have counters that ours lack.
    model = trained_config.model
    tensors = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if not model.is_unused_weight(name)
    }
    origin = exported.manifest.model
    return TrainedModel(
        module=_build_module(trained_config, info, tensors, shown),
        config=_override_config(tree, trained_config.run, overrides),
        trained_config=trained_config,
        info=info,
        origin=ModelOrigin(
            run=shown,
            checkpoint=origin["checkpoint"],
            step=origin["step"],
            weights=hash_tensors(tensors),
            reduction=origin["reduction"],
            environment=origin["environment"],
        ),
        url=store.url,
        notes=(),
    )


def _build_module(
    config: Config, info: ModelInfo, tensors: Mapping[str, Tensor], place: str
) -> nn.Module:
    """Build the network of a run with trained weights, in evaluation mode.

    Args:
        config: of the run.
        info: its classes.
        tensors: state dict of the network.
        place: where the tensors are from, for messages.

    Raises:
        UserError: the tensors are of another network.
    """
    # Without drawing weights, where that is possible.
    module = config.model.build_skeleton(len(info.classes))
    check_state_dict(module, tensors, place)
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def check_state_dict(
    module: nn.Module, tensors: Mapping[str, Tensor], place: str
) -> None:
    """Check that tensors are those of a network, by name and shape.

    Args:
        module: the network.
        tensors: a state dict.
        place: where the tensors are from, for messages.

    Raises:
        UserError: names the first tensor that differs.
    """
    expected = module.state_dict()
    for name in [*expected, *tensors]:
        if name not in tensors:
            problem = f"lacks {name}"
        elif name not in expected:
            problem = f"has {name}, which the network lacks"
        elif tensors[name].shape != expected[name].shape:
            shape = tuple(tensors[name].shape)
            problem = f"has {name} of shape {shape}, not {tuple(expected[name].shape)}"
        else:
            continue
        raise UserError(
            f"{place} {problem}: it is of another network or number of classes; check "
            "section model of the config"
        )


def _load_chosen(store: Store, checkpoint: str) -> tuple[LoadedCheckpoint, list[str]]:
    """Load the newest or best checkpoint, or that of a step.

    Returns:
        The checkpoint, and sentences on those that it was not.

    Raises:
        UserError: there is no such checkpoint.
    """
    if checkpoint == "newest":
        loaded, problems = load_newest_checkpoint(store, with_optimizer=False)
        if loaded is None:
            raise UserError(_explain_missing_run(store))
        return loaded, problems
    if checkpoint == "best":
        name = read_best_name(store)
        if name is None:
            raise UserError(
                f"{store.redacted_url} has no best checkpoint, since it was not "
                "evaluated yet: use the newest"
            )
        return _load_by_name(store, name), []
    if not checkpoint.isdecimal():
        raise UserError(
            f"checkpoint {checkpoint!r} is not one: use newest, best, or the number of "
            "a step"
        )
    name = find_checkpoint(store, int(checkpoint))
    if name is None:
        raise UserError(
            f"{store.redacted_url} has no complete checkpoint of step {checkpoint}: "
            f"use newest, best or one of those in {files.CHECKPOINTS_DIR}"
        )
    return _load_by_name(store, name), []


def _load_by_name(store: Store, name: str) -> LoadedCheckpoint:
    """Load a checkpoint. Raises UserError: it is missing or damaged."""
    place = f"{store.redacted_url}/{files.CHECKPOINTS_DIR}/{name}"
    try:
        return load_checkpoint(store, name, with_optimizer=False)
    except FileNotFoundError:
        raise UserError(f"there is no complete checkpoint at {place}") from None
    except DamagedCheckpointError as error:
        raise UserError(f"{place} is damaged ({error}): use another one") from None


def _explain_missing_run(store: Store) -> str:
    """Return why a folder has no checkpoint to open."""
    url = store.redacted_url
    if store.exists(files.CONFIG_FILE):
        return f"{url} has no complete checkpoint yet: train it first, or until one"
    if store.exists(files.CHECKPOINTS_DIR) or store.list_names():
        return f"{url} is not a run directory: pass the one that training printed"
    try:
        store.get_size("")
    except OSError:
        return f"nothing at {url}: pass a run directory, such as runs/quickstart"
    return (
        f"{url} is a file, which does not say what network it is of: pass a run "
        "directory, or a folder that distrain export wrote"
    )


def _override_config(
    tree: Mapping[str, Any],
    run: str | None,
    overrides: Sequence[str | OptionOverride],
) -> Config:
    """Return the config of a trained model with overrides.

    Args:
        tree: the config as it was trained, as plain values.
        run: URL of the run directory now: it may have been copied or moved.
        overrides: the changes.

    Raises:
        UserError: an override is wrong, or changes what the model was trained with.
    """
    trained = parse_config(dict(tree), "the run's config")
    config = parse_config(dict(tree), "the run's config", overrides)
    before = get_result_fields(trained)
    after = get_result_fields(config)
    for key in sorted(before.keys() | after.keys()):
        is_same = before.get(key) == after.get(key)
        if not is_same and key not in _EVALUATION_FIELDS:
            raise UserError(
                f"{key} is {before.get(key)!r} in the model's run, and decides its "
                f"weights: remove {key}= (of the fields that decide weights, only "
                f"{', '.join(_EVALUATION_FIELDS)} may differ)"
            )
    return config.model_copy(update={"run": run})


def _read_info(store: Store, checkpoint: str) -> ModelInfo:
    """Read `model.json` of a checkpoint; of the run, for an early checkpoint."""
    path = f"{files.CHECKPOINTS_DIR}/{checkpoint}/{files.MODEL_FILE}"
    return read_model_info(store, checkpoint if store.exists(path) else None)
