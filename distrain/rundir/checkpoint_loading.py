"""Load the checkpoints of a run directory: only complete and undamaged ones."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from distrain.data.storage.store import Store
from distrain.errors import RunError
from distrain.rundir import files
from distrain.rundir.checkpoint_folder import (
    FILES_TO_EVALUATE,
    FILES_TO_RESUME,
    DamagedCheckpointError,
    is_complete,
    list_checkpoints,
    read_verified_files,
)
from distrain.rundir.lease import is_rolled_back, read_attempts

FORMAT_VERSION = 3


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Checkpoint that was read and verified."""

    name: str
    step: int
    model_state_dict: dict[str, Tensor]
    optimizer_state_dict: dict[str, Tensor]
    """Empty if it was not asked for."""
    state: dict[str, Any]


def find_newest_checkpoint(store: Store) -> str | None:
    """Return the name of the newest checkpoint that is complete and not rolled back.

    Its files are not verified. Return None if no checkpoint is complete.

    Raises OSError.
    """
    return next(_iter_valid_checkpoints(store), None)


def find_checkpoint(store: Store, step: int) -> str | None:
    """Return the name of the complete checkpoint of a step that is not rolled back.

    Return None if there is none.

    Raises OSError.
    """
    for name in _iter_valid_checkpoints(store):
        match = files.CHECKPOINT_PATTERN.fullmatch(name)
        if match and int(match[1]) == step:
            return name
    return None


def _iter_valid_checkpoints(store: Store) -> Iterator[str]:
    """Yield the checkpoints that are complete and not rolled back, newest first."""
    records = read_attempts(store)
    for step, attempt, name in reversed(list_checkpoints(store)):
        if not is_rolled_back(records, attempt, step) and is_complete(store, name):
            yield name


def load_newest_checkpoint(
    store: Store, *, with_optimizer: bool = True
) -> tuple[LoadedCheckpoint | None, list[str]]:
    """Load the newest checkpoint that is complete and not rolled back.

    Args:
        store: the run directory.
        with_optimizer: read the optimizer's state, too.

    Returns:
        The checkpoint (None if there are none), and one sentence on each newer one that
        is damaged.

    Raises:
        RunError: every complete checkpoint is damaged, or the newest undamaged one has
            another format.
    """
    problems: list[str] = []
    for name in _iter_valid_checkpoints(store):
        try:
            loaded = load_checkpoint(store, name, with_optimizer=with_optimizer)
            return loaded, problems
        except DamagedCheckpointError as error:
            problems.append(f"checkpoint {name} is damaged: {error}")
    # Starting afresh here would hide the loss.
    if problems:
        raise RunError(
            f"all checkpoints in {store.redacted_url} are damaged "
            f"({'; '.join(problems)}): restore one from a backup, or start afresh with "
            "another run directory, run=..."
        )
    return None, problems


def load_checkpoint(
    store: Store, name: str, *, with_optimizer: bool = True
) -> LoadedCheckpoint:
    """Load one checkpoint, after every byte that is read was verified.

    Args:
        store: the run directory.
        name: the checkpoint.
        with_optimizer: read the optimizer's state, too.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedCheckpointError: a file is missing, cut off or changed.
        RunError: it has another format.
    """
    wanted_files = FILES_TO_RESUME if with_optimizer else FILES_TO_EVALUATE
    contents = read_verified_files(store, name, wanted_files)
    state = json.loads(contents["state.json"])
    if state["format"] != FORMAT_VERSION:
        raise RunError(
            f"checkpoint {name} has format {state['format']}, and this version of "
            f"distrain reads format {FORMAT_VERSION}: use the version that wrote it"
        )
    try:
        model = safetensors.torch.load(contents["model.safetensors"])
        optimizer = {}
        if with_optimizer:
            optimizer = safetensors.torch.load(contents["optimizer.safetensors"])
    except SafetensorError as error:
        raise DamagedCheckpointError(f"not safetensors: {error}") from None
    return LoadedCheckpoint(name, state["step"], model, optimizer, state)
