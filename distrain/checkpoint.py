"""Checkpoints on any fsspec URL: safetensors and JSON, the manifest last. One without a manifest does not exist.

`checkpoints/step-00000120-attempt-001/` holds model.safetensors, optimizer.safetensors, state.json and manifest.json,
which has size and SHA-256 of each; `checkpoints/best.json` names the best one.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from distrain.data.store import Store
from distrain.errors import RunError

FOLDER = "checkpoints"
FORMAT = 1
_NAME = re.compile(r"step-(\d+)-attempt-(\d+)")
_MANIFEST = "manifest.json"
_BEST = f"{FOLDER}/best.json"


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
        self, store: Store, *, attempt: int, keep: int, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """`keep`: how many of the newest stay, beside the best; `tell` gets warnings, on the training thread."""
        self._store, self._attempt, self._keep, self._tell = store, attempt, keep, tell
        self._warning: str | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: bool,
    ) -> None:
        """Copy the tensors and write them in the background, after the save before is done.

        Raises:
            RunError: the save before failed.
        """
        self.wait()
        tensors = {
            "model": {name: t.detach().to("cpu", copy=True).contiguous() for name, t in model.items()},
            "optimizer": {name: t.detach().to("cpu", copy=True).contiguous() for name, t in optimizer.items()},
        }
        plain = {"format": FORMAT, "step": step, "attempt": self._attempt, **state}
        self._thread = threading.Thread(
            target=self._save, args=(step, tensors, plain, best), name="distrain-checkpoint"
        )
        self._thread.start()

    def check(self) -> None:
        """Raises RunError if a save has failed meanwhile; costs nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way. Raises RunError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._warning is not None:
            self._tell(self._warning)
            self._warning = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RunError(
                f"a checkpoint could not be saved in {self._store.name}: {error}. The one before is untouched: "
                "free space or mend the storage, then run the same command to go on"
            ) from error

    def _save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], best: bool) -> None:
        name = f"step-{step:08d}-attempt-{self._attempt:03d}"
        folder = f"{FOLDER}/{name}"
        try:
            files = {f"{part}.safetensors": safetensors.torch.save(t) for part, t in tensors.items()}
            files["state.json"] = json.dumps(state, indent=1).encode()
            manifest = {}
            for file, data in files.items():
                self._store.write(f"{folder}/{file}", data)
                manifest[file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self._store.write(f"{folder}/{_MANIFEST}", json.dumps(manifest, indent=1).encode())
        except BaseException as error:  # raised by the next check or wait, on the training thread
            self._error = error
            self._discard(folder)
            return
        try:
            if best:
                write_best(self._store, name, state["best"])
            self._prune()
        except OSError as error:
            self._warning = f"warning: checkpoint {name} is saved, but older ones could not be cleaned up: {error}"

    def _discard(self, folder: str) -> None:
        try:
            self._store.remove(folder)
        except OSError:
            return  # without a manifest it does not exist; the next prune tries again

    def _prune(self) -> None:
        # By attempt first, which is by age: an older attempt may have left damaged ones at higher steps.
        names = [name for _, _, name in sorted((attempt, step, name) for step, attempt, name in _found(self._store))]
        complete = [name for name in names if self._store.exists(f"{FOLDER}/{name}/{_MANIFEST}")]
        kept = {*complete[-self._keep :], best_name(self._store)}
        for name in names:
            if name not in kept:
                # The manifest goes first: half a checkpoint must not look like a whole one.
                if name in complete:
                    self._store.remove(f"{FOLDER}/{name}/{_MANIFEST}")
                self._store.remove(f"{FOLDER}/{name}")


def write_best(store: Store, name: str, best: Mapping[str, Any]) -> None:
    """Name the best checkpoint."""
    store.write(_BEST, json.dumps({"checkpoint": name, **best}).encode())


def best_name(store: Store) -> str | None:
    """The best checkpoint's name, where one is named."""
    try:
        return str(json.loads(store.read(_BEST))["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def checkpoint_attempts(store: Store) -> list[int]:
    """Numbers of the attempts that left anything."""
    return sorted({attempt for _, attempt, _ in _found(store)})


def load_newest(store: Store) -> tuple[Loaded | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with each newer one.

    Raises:
        RunError: there are checkpoints, and none is whole.
    """
    problems: list[str] = []
    for _, _, name in reversed(_found(store)):
        if not store.exists(f"{FOLDER}/{name}/{_MANIFEST}"):
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
    folder = f"{FOLDER}/{name}"
    try:
        manifest = json.loads(store.read(f"{folder}/{_MANIFEST}"))
        listed = {file: (int(entry["bytes"]), str(entry["sha256"])) for file, entry in manifest.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{_MANIFEST} cannot be read ({type(error).__name__})") from None
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
        raise RunError(f"checkpoint {name} has format {state['format']}, this distrain reads {FORMAT}: use its version")
    try:
        tensors = [safetensors.torch.load(data[f"{part}.safetensors"]) for part in ("model", "optimizer")]
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


def _found(store: Store) -> list[tuple[int, int, str]]:
    """(step, attempt, name) of everything that is named like a checkpoint, ascending."""
    return sorted((int(m[1]), int(m[2]), name) for name in store.list(FOLDER) if (m := _NAME.fullmatch(name)))
