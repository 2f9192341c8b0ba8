"""Checkpoints on any fsspec URL: safetensors and JSON, the manifest last. One without a manifest does not exist.

`checkpoints/step-00000120-attempt-001/` holds model.safetensors, optimizer.safetensors, state.json and manifest.json,
which has size and SHA-256 of each; `checkpoints/best.json` names the best one.
"""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distrain.data.storage.retry import call_with_retries
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, RunError
from distrain.rundir import files
from distrain.rundir.lease import Lease, is_superseded, read_attempts

FORMAT_VERSION = 3
_MANIFEST_FILE = "manifest.json"
_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint that was read and proven."""

    name: str
    step: int
    model_state_dict: dict[str, Tensor]
    optimizer_state_dict: dict[str, Tensor]
    state: dict[str, Any]


class DamagedCheckpointError(Exception):
    """A checkpoint is not what its manifest says; the text says which file and how."""


class CheckpointManager:
    """The checkpoints of a run directory. Saving goes on in the background, one at a time."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        keep_latest: int,
        retry_seconds: float,
        warn: Callable[[str], None],
        on_saved: Callable[[float, int], None] = lambda seconds, size: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is written yet.

        Args:
            store: the run directory.
            lease: the right to write there.
            keep: how many of the newest stay, beside the best.
            patience: seconds for which a save that fails is tried again.
            tell: gets warnings, on the training thread.
            saved: gets the seconds and bytes of each checkpoint that is whole, in the background.
            failed: is called for each time that a save fails, in the background.
        """
        self._store, self._lease, self._keep_latest, self._retry_seconds, self._warn = (
            store,
            lease,
            keep_latest,
            retry_seconds,
            warn,
        )
        self._on_saved, self._on_failure = on_saved, on_failure
        # Copies for the background, kept from save to save: fresh memory costs more CPU time than the rest of a save.
        self._cpu_copies: dict[str, Tensor] = {}
        self._pending_warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._save_error: BaseException | None = None

    def save(
        self,
        step: int,
        model_state_dict: Mapping[str, Tensor],
        optimizer_state_dict: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: Mapping[str, Any] | None,
    ) -> str:
        """Copy the tensors and write them in the background, after the save before is done; the checkpoint's name.

        Args:
            step: steps that are done.
            model: its parameters and running statistics.
            optimizer: its moments.
            state: what else `state.json` says.
            best: what best.json says, where this checkpoint is the best so far.

        Raises:
            AttemptError: the save before failed.
        """
        self.wait()
        tensors = {
            "model": self._copy_to_cpu("model", model_state_dict),
            "optimizer": self._copy_to_cpu("optimizer", optimizer_state_dict),
        }
        plain = {
            "format": FORMAT_VERSION,
            "step": step,
            "attempt": self._lease.attempt,
            **state,
        }
        name = files.checkpoint_name(step, self._lease.attempt)
        arguments = (name, tensors, plain, best)
        self._thread = threading.Thread(
            target=self._save_in_background, args=arguments, name="distrain-checkpoint"
        )
        self._thread.start()
        return name

    def _copy_to_cpu(
        self, part: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Copy tensors to the CPU; from a GPU into pinned memory, so that no copy waits for the one before it."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{part}:{name}"
            if key not in self._cpu_copies:
                self._cpu_copies[key] = torch.empty(
                    tensor.shape,
                    dtype=tensor.dtype,
                    pin_memory=tensor.device.type == "cuda",
                )
            copies[name] = self._cpu_copies[key].copy_(
                tensor.detach(), non_blocking=True
            )
        for device in {
            tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"
        }:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def poll_save(self) -> None:
        """Tell what happened in the background; costs nothing. Raises AttemptError if a save has failed meanwhile."""
        while not self._pending_warnings.empty():
            self._warn(self._pending_warnings.get())
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. Raises AttemptError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.poll_save()
        if self._save_error is not None:
            error, self._save_error = self._save_error, None
            if isinstance(error, AttemptError):
                raise error
            raise AttemptError(
                f"a checkpoint could not be saved in {self._store.redacted_url}: {error}. The one before is untouched: "
                "free space or mend the storage, then run the same command to go on"
            ) from error

    def _save_in_background(
        self,
        name: str,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        best: Mapping[str, Any] | None,
    ) -> None:
        def warn_once(error: OSError, failures: int) -> None:
            if failures == 1:
                self._pending_warnings.put(
                    f"warning: checkpoint {name} could not be saved yet ({error}): trying again"
                )

        began = time.monotonic()
        try:
            contents = {
                f"{part}.safetensors": _encode_safetensors(t)
                for part, t in tensors.items()
            }
            contents["state.json"] = [json.dumps(state, indent=1).encode()]
            # Every error: a permission that is taken away may be given back before the patience is over.
            size = call_with_retries(
                lambda: self._write_checkpoint(name, contents),
                self._retry_seconds,
                should_retry=lambda _: True,
                on_retry=warn_once,
            )
            self._on_saved(time.monotonic() - began, size)
        except (
            BaseException
        ) as error:  # raised by the next check or wait, on the training thread
            self._save_error = error
            return
        try:
            self._lease.raise_if_superseded()
            if best is not None:
                write_best(self._store, name, best)
            self._prune()
        except AttemptError as error:
            self._save_error = error
        except OSError as error:
            self._pending_warnings.put(
                f"warning: checkpoint {name} is saved, but older ones could not be cleaned up: {error}"
            )

    def _write_checkpoint(
        self, name: str, contents: Mapping[str, Sequence[bytes | memoryview]]
    ) -> int:
        """Write a checkpoint, its manifest last; return its bytes. What fails leaves nothing behind."""
        folder = f"{files.CHECKPOINTS_DIR}/{name}"
        manifest: dict[str, dict[str, Any]] = {}
        try:
            for file, parts in contents.items():
                self._store.write(f"{folder}/{file}", *parts)
                digest = hashlib.sha256()
                for data in parts:
                    digest.update(data)
                manifest[file] = {
                    "bytes": sum(map(len, parts)),
                    "sha256": digest.hexdigest(),
                }
            self._lease.raise_if_superseded()  # a manifest of an attempt that was given up would not count, so it is not written
            self._store.write(
                f"{folder}/{_MANIFEST_FILE}", json.dumps(manifest, indent=1).encode()
            )
        except BaseException as error:
            if isinstance(error, OSError):
                self._on_failure()
            self._discard_folder(folder)
            raise
        return sum(entry["bytes"] for entry in manifest.values())

    def _discard_folder(self, folder: str) -> None:
        try:
            self._store.remove(folder)
        except OSError:
            return  # without a manifest it does not exist; the next prune tries again

    def _prune(self) -> None:
        records = read_attempts(self._store)
        found = [
            (name, is_superseded(records, attempt, step))
            for step, attempt, name in _list_checkpoints(self._store)
        ]
        complete = [
            name for name, given_up in found if not given_up and self._is_complete(name)
        ]
        kept = {*complete[-self._keep_latest :], read_best_name(self._store)}
        for name, _ in found:
            if name not in kept:
                # The manifest goes first: half a checkpoint must not look like a whole one.
                if self._is_complete(name):
                    self._store.remove(
                        f"{files.CHECKPOINTS_DIR}/{name}/{_MANIFEST_FILE}"
                    )
                self._store.remove(f"{files.CHECKPOINTS_DIR}/{name}")

    def _is_complete(self, name: str) -> bool:
        return self._store.exists(f"{files.CHECKPOINTS_DIR}/{name}/{_MANIFEST_FILE}")


def write_best(store: Store, name: str, best: Mapping[str, Any]) -> None:
    """Name the best checkpoint."""
    store.write(files.BEST_FILE, json.dumps({"checkpoint": name, **best}).encode())


def read_best_name(store: Store) -> str | None:
    """The best checkpoint's name, where one is named."""
    try:
        return str(json.loads(store.read(files.BEST_FILE))["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def load_newest_checkpoint(store: Store) -> tuple[LoadedCheckpoint | None, list[str]]:
    """The newest checkpoint that is whole and was not given up, and what is wrong with each newer one.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    records = read_attempts(store)
    for step, attempt, name in reversed(_list_checkpoints(store)):
        if is_superseded(records, attempt, step) or not store.exists(
            f"{files.CHECKPOINTS_DIR}/{name}/{_MANIFEST_FILE}"
        ):
            continue
        try:
            return load_checkpoint(store, name), problems
        except DamagedCheckpointError as error:
            problems.append(f"checkpoint {name} is damaged: {error}")
    if problems:
        raise RunError(
            f"no checkpoint in {store.redacted_url} is whole ({'; '.join(problems)}): "
            "restore one, or start afresh with another run directory, run=..."
        )
    return None, problems


def load_checkpoint(store: Store, name: str) -> LoadedCheckpoint:
    """Read one checkpoint, every byte proven before anything is made of it.

    Raises:
        DamagedError: a file is missing, cut or changed.
    """
    folder = f"{files.CHECKPOINTS_DIR}/{name}"
    try:
        manifest = json.loads(store.read(f"{folder}/{_MANIFEST_FILE}"))
        listed = {
            file: (int(entry["bytes"]), str(entry["sha256"]))
            for file, entry in manifest.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{_MANIFEST_FILE} cannot be read ({type(error).__name__})"
        ) from None
    data = {}
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        if file not in listed:
            raise DamagedCheckpointError(f"{_MANIFEST_FILE} does not name {file}")
        try:
            data[file] = store.read(f"{folder}/{file}")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{file} is missing") from None
        size, digest = listed[file]
        if len(data[file]) != size:
            raise DamagedCheckpointError(
                f"{file} has {len(data[file])} bytes, not {size}"
            )
        if hashlib.sha256(data[file]).hexdigest() != digest:
            raise DamagedCheckpointError(
                f"the bytes of {file} have changed (SHA-256 differs)"
            )
    state = json.loads(data["state.json"])
    if state["format"] != FORMAT_VERSION:
        raise RunError(
            f"checkpoint {name} has format {state['format']}, this distrain reads {FORMAT_VERSION}: use its version"
        )
    try:
        tensors = [
            safetensors.torch.load(data[f"{part}.safetensors"])
            for part in ("model", "optimizer")
        ]
    except SafetensorError as error:
        raise DamagedCheckpointError(f"not safetensors: {error}") from None
    return LoadedCheckpoint(name, state["step"], tensors[0], tensors[1], state)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).numpy().data.cast("B"))
    return h.hexdigest()


def _encode_safetensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, without a copy of the tensors: length, JSON header, data.

    The library copies each tensor twice. It is what reads the file.
    """
    header, end = {}, 0
    parts: list[bytes | memoryview] = []
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _list_checkpoints(store: Store) -> list[tuple[int, int, str]]:
    """(step, attempt, name) of everything that is named like a checkpoint, ascending."""
    return sorted(
        (int(m[1]), int(m[2]), name)
        for name in store.list_names(files.CHECKPOINTS_DIR)
        if (m := files.CHECKPOINT_PATTERN.fullmatch(name))
    )
