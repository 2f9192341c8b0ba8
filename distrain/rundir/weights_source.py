"""Find the weights that a URL means: those of a run, of a checkpoint, or of a file."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from distrain.data.storage.store import Store
from distrain.data.storage.url import join_url, redact_url
from distrain.errors import UserError
from distrain.rundir import files
from distrain.rundir.checkpoint import read_best_name
from distrain.rundir.checkpoint_folder import (
    DamagedCheckpointError,
    read_verified_files,
)
from distrain.rundir.checkpoint_loading import find_newest_checkpoint
from distrain.rundir.model_info import ModelInfo, read_model_info
from distrain.rundir.weights_file import (
    WeightsFile,
    decode_weights,
    make_read_error,
    read_weights_file,
)

WEIGHTS_FILE = "model.safetensors"
"""Weights of a checkpoint, or of a folder that holds a model."""

_FILE_EXTENSIONS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class NamedWeights:
    """Weights, and the classes of their network."""

    file: WeightsFile
    classes: tuple[str, ...] | None
    """Class name of each output; None: not known."""


def read_named_weights(url: str) -> NamedWeights:
    """Read the weights that a URL means, and the names of their classes.

    Args:
        url: path or URL of a run directory (its best checkpoint, or else its newest),
            of a folder in its `checkpoints`, of a folder with `model.safetensors`, or
            of a file, beside which `model.json` may have the classes.

    Raises:
        UserError: there are no weights at the URL, or they cannot be used.
        AttemptError: their storage fails.
    """
    try:
        return _find_and_read(url)
    except OSError as error:
        raise make_read_error(redact_url(url), error) from None


def _find_and_read(url: str) -> NamedWeights:
    """Do what `read_named_weights` does. Raises OSError: a run cannot be read."""
    match = files.CHECKPOINT_URL_PATTERN.fullmatch(url)
    if match:
        return _read_checkpoint(Store(match[1]), match[2])
    store = Store(url)
    # Servers may refuse to list what lies below a file.
    has_extension = urlsplit(url.partition("::")[0]).path.endswith(_FILE_EXTENSIONS)
    if has_extension and not (store.local_path and store.is_folder("")):
        return _read_file(url)
    if store.is_folder(files.CHECKPOINTS_DIR):
        name = read_best_name(store) or find_newest_checkpoint(store)
        if name is None:
            raise UserError(
                f"{store.redacted_url} has no complete checkpoint yet: train it first, "
                "or name another run"
            )
        return _read_checkpoint(store, name)
    if store.exists(WEIGHTS_FILE):
        return _read_file(join_url(url.rstrip("/"), WEIGHTS_FILE))
    return _read_file(url)


def _read_checkpoint(store: Store, name: str) -> NamedWeights:
    """Read the weights of a checkpoint, after its manifest has verified them."""
    place = f"{files.CHECKPOINTS_DIR}/{name}"
    shown = f"{store.redacted_url}/{place}"
    try:
        contents = read_verified_files(store, name, (WEIGHTS_FILE,))
    except FileNotFoundError:
        raise UserError(f"there is no complete checkpoint at {shown}") from None
    except DamagedCheckpointError as error:
        raise UserError(f"{shown} is damaged ({error}): use another one") from None
    # Early checkpoints have no classes of their own.
    is_early = not store.exists(f"{place}/{files.MODEL_FILE}")
    info = read_model_info(store, None if is_early else name)
    weights = decode_weights(contents[WEIGHTS_FILE], f"{shown}/{WEIGHTS_FILE}")
    return NamedWeights(weights, info.classes)


def _read_file(url: str) -> NamedWeights:
    """Read a file of weights, and the classes in the `model.json` beside it."""
    weights = read_weights_file(url)
    # Of a chain of URLs, such as zip://model.pth::models.zip, the first has the file.
    first, chain, rest = url.partition("::")
    parent, _, _ = first.rpartition("/")
    folder = Store((parent or ("/" if url.startswith("/") else ".")) + chain + rest)
    # Not every `model.json` is one of ours.
    try:
        info = ModelInfo.from_json(folder.read(files.MODEL_FILE))
    except (OSError, ValueError, TypeError):
        return NamedWeights(weights, None)
    return NamedWeights(weights, info.classes)
