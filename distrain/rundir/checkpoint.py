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

from distrain.data.storage.retry import retry
from distrain.data.storage.store import Store
from distrain.errors import AttemptError, RunError
from distrain.rundir import files
from distrain.rundir.lease import Lease, attempts, superseded

FORMAT = 3
_MANIFEST = "manifest.json"
_TYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read and proven."""

    name: str
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the text says which file and how."""


class Checkpoints:
    """The checkpoints of a run directory. Saving goes on in the background, one at a time."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        keep: int,
        patience: float,
        tell: Callable[[str], None],
        saved: Callable[[float, int], None] = lambda seconds, size: None,
        failed: Callable[[], None] = lambda: None,
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
        self._store, self._lease, self._keep, self._patience, self._tell = (
            store,
            lease,
            keep,
            patience,
            tell,
        )
        self._saved, self._failed = saved, failed
        # Copies for the background, kept from save to save: fresh memory costs more CPU time than the rest of a save.
        self._copies: dict[str, Tensor] = {}
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
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
            "model": self._copied("model", model),
            "optimizer": self._copied("optimizer", optimizer),
        }
        plain = {"format": FORMAT, "step": step, "attempt": self._lease.number, **state}
        name = files.checkpoint(step, self._lease.number)
        arguments = (name, tensors, plain, best)
        self._thread = threading.Thread(
            target=self._save, args=arguments, name="distrain-checkpoint"
        )
        self._thread.start()
        return name

    def _copied(self, part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU; from a GPU into pinned memory, so that no copy waits for the one before it."""
        copies = {}
        for name, tensor in tensors.items():
            key = f"{part}:{name}"
            if key not in self._copies:
                self._copies[key] = torch.empty(
                    tensor.shape,
                    dtype=tensor.dtype,
                    pin_memory=tensor.device.type == "cuda",
                )
            copies[name] = self._copies[key].copy_(tensor.detach(), non_blocking=True)
        for device in {
            tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"
        }:
            torch.cuda.current_stream(device).synchronize()
        return copies

    def check(self) -> None:
        """Tell what happened in the background; costs nothing. Raises AttemptError if a save has failed meanwhile."""
        while not self._news.empty():
            self._tell(self._news.get())
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. Raises AttemptError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.check()
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, AttemptError):
                raise error
            raise AttemptError(
                f"a checkpoint could not be saved in {self._store.name}: {error}. The one before is untouched: "
                "free space or mend the storage, then run the same command to go on"
            ) from error

    def _save(
        self,
        name: str,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        best: Mapping[str, Any] | None,
    ) -> None:
        def again(error: OSError, failures: int) -> None:
            if failures == 1:
                self._news.put(
                    f"warning: checkpoint {name} could not be saved yet ({error}): trying again"
                )

        began = time.monotonic()
        try:
            contents = {
                f"{part}.safetensors": _safetensors(t) for part, t in tensors.items()
            }
            contents["state.json"] = [json.dumps(state, indent=1).encode()]
            # Every error: a permission that is taken away may be given back before the patience is over.
            size = retry(
                lambda: self._write(name, contents),
                self._patience,
                transient=lambda _: True,
                again=again,
            )
            self._saved(time.monotonic() - began, size)
        except (
            BaseException
        ) as error:  # raised by the next check or wait, on the training thread
            self._error = error
            return
        try:
            self._lease.check()
            if best is not None:
                write_best(self._store, name, best)
            self._prune()
        except AttemptError as error:
            self._error = error
        except OSError as error:
            self._news.put(
                f"warning: checkpoint {name} is saved, but older ones could not be cleaned up: {error}"
            )

    def _write(
        self, name: str, contents: Mapping[str, Sequence[bytes | memoryview]]
    ) -> int:
        """Write a checkpoint, its manifest last; return its bytes. What fails leaves nothing behind."""
        folder = f"{files.CHECKPOINTS}/{name}"
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
            self._lease.check()  # a manifest of an attempt that was given up would not count, so it is not written
            self._store.write(
                f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1).encode()
            )
        except BaseException as error:
            if isinstance(error, OSError):
                self._failed()
            self._discard(folder)
            raise
        return sum(entry["bytes"] for entry in manifest.values())

    def _discard(self, folder: str) -> None:
        try:
            self._store.remove(folder)
        except OSError:
            return  # without a manifest it does not exist; the next prune tries again

    def _prune(self) -> None:
        records = attempts(self._store)
        found = [
            (name, superseded(records, attempt, step))
            for step, attempt, name in _found(self._store)
        ]
        complete = [
            name for name, given_up in found if not given_up and self._whole(name)
        ]
        kept = {*complete[-self._keep :], best_name(self._store)}
        for name, _ in found:
            if name not in kept:
                # The manifest goes first: half a checkpoint must not look like a whole one.
                if self._whole(name):
                    self._store.remove(f"{files.CHECKPOINTS}/{name}/{_MANIFEST}")
                self._store.remove(f"{files.CHECKPOINTS}/{name}")

    def _whole(self, name: str) -> bool:
        return self._store.exists(f"{files.CHECKPOINTS}/{name}/{_MANIFEST}")


def write_best(store: Store, name: str, best: Mapping[str, Any]) -> None:
    """Name the best checkpoint."""
    store.write(files.BEST, json.dumps({"checkpoint": name, **best}).encode())


def best_name(store: Store) -> str | None:
    """The best checkpoint's name, where one is named."""
    try:
        return str(json.loads(store.read(files.BEST))["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def load_newest(store: Store) -> tuple[Loaded | None, list[str]]:
    """The newest checkpoint that is whole and was not given up, and what is wrong with each newer one.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    records = attempts(store)
    for step, attempt, name in reversed(_found(store)):
        if superseded(records, attempt, step) or not store.exists(
            f"{files.CHECKPOINTS}/{name}/{_MANIFEST}"
        ):
            continue
        try:
            return load(store, name), problems
        except DamagedError as error:
            problems.append(f"checkpoint {name} is damaged: {error}")
    if problems:
        raise RunError(
            f"no checkpoint in {store.name} is whole ({'; '.join(problems)}): "
            "restore one, or start afresh with another run directory, run=..."
        )
    return None, problems


def load(store: Store, name: str) -> Loaded:
    """Read one checkpoint, every byte proven before anything is made of it.

    Raises:
        DamagedError: a file is missing, cut or changed.
    """
    folder = f"{files.CHECKPOINTS}/{name}"
    try:
        manifest = json.loads(store.read(f"{folder}/{_MANIFEST}"))
        listed = {
            file: (int(entry["bytes"]), str(entry["sha256"]))
            for file, entry in manifest.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{_MANIFEST} cannot be read ({type(error).__name__})"
        ) from None
    data = {}
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        if file not in listed:
            raise DamagedError(f"{_MANIFEST} does not name {file}")
        try:
            data[file] = store.read(f"{folder}/{file}")
        except FileNotFoundError:
            raise DamagedError(f"{file} is missing") from None
        size, digest = listed[file]
        if len(data[file]) != size:
            raise DamagedError(f"{file} has {len(data[file])} bytes, not {size}")
        if hashlib.sha256(data[file]).hexdigest() != digest:
            raise DamagedError(f"the bytes of {file} have changed (SHA-256 differs)")
    state = json.loads(data["state.json"])
    if state["format"] != FORMAT:
        raise RunError(
            f"checkpoint {name} has format {state['format']}, this distrain reads {FORMAT}: use its version"
        )
    try:
        tensors = [
            safetensors.torch.load(data[f"{part}.safetensors"])
            for part in ("model", "optimizer")
        ]
    except SafetensorError as error:
        raise DamagedError(f"not safetensors: {error}") from None
    return Loaded(name, state["step"], tensors[0], tensors[1], state)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    h = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.reshape(-1).numpy().data.cast("B"))
    return h.hexdigest()


def _safetensors(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes of a safetensors file, without a copy of the tensors: length, JSON header, data.

    The library copies each tensor twice. It is what reads the file.
    """
    header, end = {}, 0
    parts: list[bytes | memoryview] = []
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        parts.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *parts]


def _found(store: Store) -> list[tuple[int, int, str]]:
    """(step, attempt, name) of everything that is named like a checkpoint, ascending."""
    return sorted(
        (int(m[1]), int(m[2]), name)
        for name in store.list(files.CHECKPOINTS)
        if (m := files.CHECKPOINT_NAME.fullmatch(name))
    )
