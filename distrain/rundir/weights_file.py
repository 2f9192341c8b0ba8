"""Weights from a file of any origin: safetensors, or what `torch.save` writes.

This is the only place of the package that unpickles. It does so by torch's restricted
unpickler (`weights_only=True`), which makes tensors and plain values and runs no code.
"""

import hashlib
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distrain.data.storage.retry import is_transient
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, UserError

MAX_WEIGHTS_BYTES = 4 << 30
"""Largest file, and largest content of one: a billion parameters."""

_RETRY_SECONDS = 120.0
# Keys under which training scripts put the state dict, beside an optimizer's, say.
_WRAPPER_KEYS = ("state_dict", "model", "model_state_dict")
# What DistributedDataParallel and torch.compile put before each name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGER_TYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
# How torch names a class or function that it does not import from a pickle.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True)
class WeightsFile:
    """Content of a file of weights."""

    tensors: dict[str, Tensor]
    """Tensors by name, contiguous on the CPU: float32, or integers as they were."""
    sha256: str
    """Of the bytes of the file, in hexadecimal."""
    metadata: dict[str, str]
    """Metadata of a safetensors file; empty for others."""
    url: str
    """Where the file is, without credentials."""
    notes: tuple[str, ...]
    """What the user should know about the content: one sentence each."""


class _Content(NamedTuple):
    """What a file holds before it is checked."""

    value: object
    """A state dict, or what is around one."""
    metadata: dict[str, str]


def read_weights_file(url: str) -> WeightsFile:
    """Read the weights of a network from a file, without running code from it.

    A state dict inside of a checkpoint (under `state_dict`, `model` or
    `model_state_dict`) is found, and the prefixes of DistributedDataParallel and
    torch.compile are removed from names. Floating-point numbers of other types become
    float32.

    Args:
        url: path or URL of a `.safetensors` file, or of a file that `torch.save` wrote.

    Raises:
        UserError: there is no such file, it is not one of weights, it holds code, or it
            is too large.
        AttemptError: its storage fails.
    """
    data, shown = _read_file(url)
    return decode_weights(data, shown)


def decode_weights(data: bytes | memoryview, shown: str) -> WeightsFile:
    """Return the weights in the bytes of a file, as `read_weights_file` does.

    Args:
        data: content of the file.
        shown: URL of the file without credentials, for messages.

    Raises:
        UserError: it is not a file of weights, it holds code, or it is too large.
    """
    is_safetensors = shown.partition("::")[0].endswith(".safetensors")
    # A length of 8 bytes stands before the JSON of a safetensors file.
    if is_safetensors or data[8:9] == b"{":
        content = _decode_safetensors(data, shown)
    else:
        content = _decode_torch_file(data, shown)
    state_dict = _find_state_dict(content.value, shown)
    tensors, notes = _convert_tensors(state_dict, shown)
    return WeightsFile(
        tensors=_remove_prefixes(tensors),
        sha256=hashlib.sha256(data).hexdigest(),
        metadata=content.metadata,
        url=shown,
        notes=notes,
    )


def _read_file(url: str) -> tuple[bytes | memoryview, str]:
    """Return the bytes of a file, and its URL without credentials.

    Raises:
        UserError: there is no such file, or it is too large.
        AttemptError: its storage fails.
    """
    # The URL itself is the folder of the store: it may have a query, or be a chain.
    store = Store(url)
    shown = store.redacted_url
    try:
        size = store.get_size("")
        if size > MAX_WEIGHTS_BYTES:
            raise _make_too_large(shown, size)
        return store.read_view("", 0, size, retry_seconds=_RETRY_SECONDS), shown
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"no file at {shown}: check the path") from None
    except IsADirectoryError:
        raise UserError(
            f"{shown} is a folder: name the file of the weights in it"
        ) from None
    except OSError as error:
        raise make_read_error(shown, error) from None


def make_read_error(shown: str, error: OSError) -> UserError | AttemptError:
    """Make the error for weights that cannot be read.

    Args:
        shown: where they are, without credentials.
        error: what the storage raised.
    """
    # Another attempt may succeed after a transient error, but not after another.
    error_class = AttemptError if is_transient(error) else UserError
    reason = error.strerror or error
    return error_class(
        f"cannot read {shown} ({reason}): check the path and its permissions"
    )


def _make_too_large(shown: str, num_bytes: int) -> UserError:
    return UserError(
        f"{shown} has {num_bytes:,} bytes of weights, more than the "
        f"{MAX_WEIGHTS_BYTES:,} that are read: use a smaller network"
    )


def _make_not_weights(shown: str, reason: str) -> UserError:
    return UserError(
        f"{shown} is not a file of weights ({reason}): use a .safetensors file, or "
        "save a state_dict() by torch.save"
    )


def _decode_safetensors(data: bytes | memoryview, shown: str) -> _Content:
    """Return the tensors and the metadata of a safetensors file. Raises UserError."""
    try:
        tensors = safetensors.torch.load(bytes(data))
    # KeyError: a type of numbers that torch does not have.
    except (SafetensorError, KeyError, ValueError) as error:
        raise _make_not_weights(shown, f"safetensors: {error}") from None
    # The library has checked the header by now.
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:header_end]))
    return _Content(tensors, dict(header.get("__metadata__") or {}))


def _decode_torch_file(data: bytes | memoryview, shown: str) -> _Content:
    """Return what `torch.save` wrote. Raises UserError: it is something else."""
    if data[:4] == _ZIP_START:
        _check_archive(data, shown)
    try:
        value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A damaged file may raise anything.
    except Exception as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{shown} holds more than weights, {refused[1]}, which would run code "
                "when it is read: save the state_dict() of the model alone, by "
                "torch.save or as safetensors"
            ) from None
        raise _make_not_weights(shown, type(error).__name__) from None
    return _Content(value, {})


def _check_archive(data: bytes | memoryview, shown: str) -> None:
    """Raise UserError if a zip archive unpacks to too much, or is a program."""
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _make_not_weights(shown, f"zip: {error}") from None
    # Members may be compressed. None unpacks to more than it claims to.
    num_bytes = sum(member.file_size for member in members)
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise _make_too_large(shown, num_bytes)
    names = [member.filename.rpartition("/")[2] for member in members]
    if "constants.pkl" in names:
        raise _make_not_weights(shown, "a program in TorchScript")


def _find_state_dict(value: object, shown: str) -> Mapping[str, Tensor]:
    """Return the state dict that a file holds, perhaps inside of a checkpoint.

    Raises:
        UserError: there is none, or it holds something else beside tensors.
    """
    # A checkpoint may be in one of its own, as {"model": {"state_dict": ...}}.
    while isinstance(value, Mapping):
        inner = [value[k] for k in _WRAPPER_KEYS if isinstance(value.get(k), Mapping)]
        if not inner:
            break
        value = inner[0]
    items: dict[Any, Any] = dict(value) if isinstance(value, Mapping) else {}
    others = [name for name, item in items.items() if not isinstance(item, Tensor)]
    if len(others) == len(items):
        found = ", ".join(str(name) for name in others[:5]) or type(value).__name__
        raise UserError(
            f"{shown} holds no tensors by name, but {found}: save the state_dict() of "
            "the model"
        )
    if others:
        raise UserError(
            f"{shown} holds {others[0]}, which is not a tensor, among its weights: "
            "save the state_dict() of the model alone"
        )
    return {str(name): tensor for name, tensor in items.items()}


def _convert_tensors(
    state_dict: Mapping[str, Tensor], shown: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors as float32 or integers, contiguous, and notes.

    Raises:
        UserError: one is not a plain tensor of numbers, or all together are too large.
    """
    # Before any is copied: a tensor may repeat few numbers many times.
    num_bytes = sum(4 * tensor.numel() for tensor in state_dict.values())
    if num_bytes > MAX_WEIGHTS_BYTES:
        raise _make_too_large(shown, num_bytes)
    tensors = {}
    converted = set()
    for name, tensor in state_dict.items():
        dtype = tensor.dtype
        is_known = dtype in _FLOAT_TYPES or dtype in _INTEGER_TYPES
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_known or not is_plain:
            raise UserError(
                f"{shown}: {name} is a tensor of type {dtype} and layout "
                f"{tensor.layout} on {tensor.device.type}: save it as a dense float32 "
                "tensor"
            )
        if dtype in _FLOAT_TYPES and dtype != torch.float32:
            converted.add(str(dtype).removeprefix("torch."))
            tensor = tensor.float()
        tensors[name] = tensor.detach().contiguous()
    notes = []
    if converted:
        types = " and ".join(sorted(converted))
        notes.append(f"{shown} has weights in {types}, which become float32")
    return tensors, tuple(notes)


def _remove_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that all names have because the network was wrapped."""
    for prefix in _WRAPPER_PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    return tensors
