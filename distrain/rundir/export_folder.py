"""Folder of an exported model, on any fsspec URL: its files, and what verifies them.

`export.json` has size and SHA-256 of each of the others, and where the model comes
from. It is written last: a folder without it is not an exported model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from distrain.data.storage.store import Store
from distrain.errors import UserError
from distrain.rundir import files
from distrain.rundir.checkpoint_folder import DamagedCheckpointError, read_listed_files

EXPORT_FILE = "export.json"
CARD_FILE = "README.md"
CLASSES_FILE = "classes.txt"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1
# Files by which a person may name the folder that they are in.
_MODEL_FILES = (WEIGHTS_FILE, "model.onnx", "model.pt2")
_FILES_TO_EVALUATE = (WEIGHTS_FILE, files.MODEL_FILE, files.CONFIG_FILE)


class FileEntry(NamedTuple):
    """Size and hash of a file."""

    bytes: int
    sha256: str


# The field names are the keys of the file.
@dataclass(frozen=True)
class ExportManifest:
    """Content of `export.json`."""

    distrain: str
    """Version that exported the model."""
    export_format: str
    """safetensors, torchvision, onnx or torch-export."""
    model: Mapping[str, Any]
    """Where the weights come from: run, checkpoint, step, weights (SHA-256), reduction
    and environment of the training."""
    evaluation: Mapping[str, Any]
    """What `distrain eval --json` prints for the model."""
    proof: Mapping[str, Any]
    """How far the exported file agrees with distrain on the evaluated images."""
    files: Mapping[str, FileEntry]
    """The other files of the folder, by name."""

    def to_json(self) -> str:
        """Return the content of the file."""
        listed = {name: entry._asdict() for name, entry in self.files.items()}
        tree = {"format": FORMAT_VERSION, **asdict(self), "files": listed}
        return json.dumps(tree, indent=1)

    @staticmethod
    def from_json(text: str | bytes) -> "ExportManifest":
        """Read the content of a file. Raises ValueError, KeyError or TypeError."""
        tree = json.loads(text)
        if tree["format"] != FORMAT_VERSION:
            raise ValueError(
                f"it has format {tree['format']}, and this version of distrain reads "
                f"format {FORMAT_VERSION}"
            )
        listed = {
            name: FileEntry(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in tree["files"].items()
        }
        return ExportManifest(
            distrain=tree["distrain"],
            export_format=tree["export_format"],
            model=tree["model"],
            evaluation=tree["evaluation"],
            proof=tree["proof"],
            files=listed,
        )


@dataclass(frozen=True)
class ExportedFiles:
    """What an evaluation takes from an exported folder, verified."""

    manifest: ExportManifest
    contents: Mapping[str, bytes]
    """Bytes of the weights, of `model.json` and of `config.yaml`, by name."""


def find_export_url(url: str) -> str | None:
    """Return the URL of the exported folder that a URL means.

    Args:
        url: path or URL of such a folder, or of the model's file in one.

    Returns:
        None: it is another folder, or nothing.

    Raises:
        UserError: it is a file of a model that is not in such a folder.
        OSError: it cannot be read.
    """
    folder, _, name = url.rstrip("/").rpartition("/")
    if name in _MODEL_FILES and not Store(url).is_folder(""):
        folder = folder or ("/" if url.startswith("/") else ".")
        if Store(folder).exists(EXPORT_FILE):
            return folder
        raise UserError(
            f"{Store(url).redacted_url} is not in an exported folder, whose "
            f"{EXPORT_FILE}, {files.CONFIG_FILE} and {files.MODEL_FILE} say what it "
            "is: name the run, or a folder of distrain export"
        )
    return url.rstrip("/") if Store(url).exists(EXPORT_FILE) else None


def read_exported_files(store: Store) -> ExportedFiles:
    """Read what an evaluation takes from an exported folder.

    Raises:
        UserError: it is damaged, or holds a format that distrain cannot run.
    """
    shown = store.redacted_url
    try:
        manifest = ExportManifest.from_json(store.read(EXPORT_FILE))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{shown}/{EXPORT_FILE} cannot be used ({type(error).__name__}: {error}): "
            "export the model again"
        ) from None
    if WEIGHTS_FILE not in manifest.files:
        raise UserError(
            f"{shown} holds the model as {manifest.export_format}, which other "
            "programs run: name its run, or export it as safetensors"
        )
    try:
        contents = read_listed_files(
            store, "", manifest.files, _FILES_TO_EVALUATE, EXPORT_FILE
        )
    except DamagedCheckpointError as error:
        raise UserError(
            f"{shown} is damaged ({error}): export the model again"
        ) from None
    return ExportedFiles(manifest, contents)
