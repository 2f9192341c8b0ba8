"""Folder of one checkpoint, on any fsspec URL: its files, and what verifies them.

`checkpoints/step-00000120-attempt-001/` holds model.safetensors, optimizer.safetensors,
state.json, model.json (see `model_info`; early ones have none) and manifest.json. The
manifest has size and SHA-256 of each of the others. It is written last and removed
first: a checkpoint without a manifest does not exist.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

from distrain.data.storage.store import Store
from distrain.rundir import files

MANIFEST_FILE = "manifest.json"
FILES_TO_EVALUATE = ("model.safetensors", "state.json")
FILES_TO_RESUME = (*FILES_TO_EVALUATE, "optimizer.safetensors")


class DamagedCheckpointError(Exception):
    """A checkpoint, or an exported folder, differs from its manifest.

    The text says which file, and how.
    """


def list_checkpoints(store: Store) -> list[tuple[int, int, str]]:
    """List (step, attempt, name) of every folder named like a checkpoint, ascending."""
    return sorted(
        (int(match[1]), int(match[2]), name)
        for name in store.list_names(files.CHECKPOINTS_DIR)
        if (match := files.CHECKPOINT_PATTERN.fullmatch(name))
    )


def is_complete(store: Store, name: str) -> bool:
    """Return whether a checkpoint has its manifest."""
    return store.exists(f"{files.CHECKPOINTS_DIR}/{name}/{MANIFEST_FILE}")


def remove_checkpoint(store: Store, name: str) -> None:
    """Remove a checkpoint, or what was left of one. Raises OSError."""
    folder = f"{files.CHECKPOINTS_DIR}/{name}"
    # The manifest first: half a checkpoint must not look like a whole one.
    if is_complete(store, name):
        store.remove(f"{folder}/{MANIFEST_FILE}")
    store.remove(folder)


def read_verified_files(
    store: Store, name: str, wanted_files: Sequence[str] = FILES_TO_RESUME
) -> dict[str, bytes]:
    """Read files of a checkpoint, and compare them with its manifest.

    Args:
        store: the run directory.
        name: the checkpoint.
        wanted_files: the files. Default: those that a resume takes.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        DamagedCheckpointError: a file is missing, cut off or changed.
    """
    folder = f"{files.CHECKPOINTS_DIR}/{name}"
    try:
        manifest = json.loads(store.read(f"{folder}/{MANIFEST_FILE}"))
        listed = {
            file: (int(entry["bytes"]), str(entry["sha256"]))
            for file, entry in manifest.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{MANIFEST_FILE} cannot be read ({type(error).__name__})"
        ) from None

    return read_listed_files(store, folder, listed, wanted_files, MANIFEST_FILE)


def read_listed_files(
    store: Store,
    folder: str,
    listed: Mapping[str, tuple[int, str]],
    wanted_files: Sequence[str],
    list_name: str,
) -> dict[str, bytes]:
    """Read files of a folder, and compare them with a list of their sizes and hashes.

    Args:
        store: where the folder is.
        folder: path of the folder; empty: the store's own.
        listed: bytes and SHA-256 (hexadecimal) of each file.
        wanted_files: names of the files to read.
        list_name: name of the file with the list, for messages.

    Raises:
        DamagedCheckpointError: a file is missing, cut off or changed.
    """
    contents: dict[str, bytes] = {}
    for file in wanted_files:
        if file not in listed:
            raise DamagedCheckpointError(f"{list_name} does not name {file}")
        try:
            data = store.read(f"{folder}/{file}" if folder else file)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{file} is missing") from None

        # Size first: it tells a file that was cut off from one that was changed.
        size, digest = listed[file]
        if len(data) != size:
            raise DamagedCheckpointError(f"{file} has {len(data)} bytes, not {size}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedCheckpointError(
                f"the bytes of {file} have changed (SHA-256 differs)"
            )
        contents[file] = data
    return contents
