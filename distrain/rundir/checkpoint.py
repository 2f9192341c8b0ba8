"""Checkpoints of a run directory: saved in the background, and pruned.

A checkpoint is a folder (see `checkpoint_folder`); `checkpoints/best.json` names the
best one.
"""

import hashlib
import json
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distrain.data.storage.retry import call_with_retries
from distrain.data.storage.store import Store
from distrain.errors import AttemptError
from distrain.rundir import files
from distrain.rundir.checkpoint_folder import (
    MANIFEST_FILE,
    is_complete,
    list_checkpoints,
    remove_checkpoint,
)
from distrain.rundir.checkpoint_loading import (
    FORMAT_VERSION,
    find_newest_checkpoint,
)
from distrain.rundir.lease import Lease, is_rolled_back, read_attempts
from distrain.rundir.model_info import ModelInfo
from distrain.rundir.safetensors_file import encode_safetensors


class CheckpointManager:
    """Checkpoints of a run directory, saved one at a time by a background thread."""

    def __init__(
        self,
        store: Store,
        lease: Lease,
        *,
        keep_latest: int,
        retry_seconds: float,
        model_info: ModelInfo | None = None,
        warn: Callable[[str], None],
        on_saved: Callable[[float, int], None] = lambda seconds, size: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Remember the settings; nothing is written yet.

        Args:
            store: the run directory.
            lease: the right to write there.
            keep_latest: how many of the newest to keep, beside the best.
            retry_seconds: seconds for which a save that fails is retried.
            model_info: content of `model.json`; None: checkpoints have none.
            warn: gets warnings, on the training thread.
            on_saved: gets the seconds and bytes of each complete checkpoint, on the
                background thread.
            on_failure: called after each failed attempt to write, retries included,
                on the background thread.
        """
        self._store = store
        self._lease = lease
        self._keep_latest = keep_latest
        self._retry_seconds = retry_seconds
        self._model_info = model_info
        self._warn = warn
        self._on_saved = on_saved
        self._on_failure = on_failure
        # Copies for the background thread, reused by all saves: fresh memory costs more
        # CPU time than the rest of a save.
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
        kept_step: int | None = None,
    ) -> str:
        """Copy the tensors, and write them in the background.

        Waits for the previous save before it copies anything.

        Args:
            step: steps done.
            model_state_dict: parameters and running statistics.
            optimizer_state_dict: state of the optimizer.
            state: further contents of `state.json`.
            best: contents of `best.json` if this checkpoint is the best so far.
            kept_step: step of a checkpoint to keep beside the newest and the best.

        Returns:
            Name of the checkpoint.

        Raises:
            AttemptError: the previous save failed.
        """
        # The background thread reads the copies until it is done.
        self.wait()
        tensors = {
            "model": self._copy_to_cpu("model", model_state_dict),
            "optimizer": self._copy_to_cpu("optimizer", optimizer_state_dict),
        }
        json_state = {
            "format": FORMAT_VERSION,
            "step": step,
            "attempt": self._lease.attempt,
            **state,
        }
        name = files.checkpoint_name(step, self._lease.attempt)
        self._thread = threading.Thread(
            target=self._save_in_background,
            args=(name, tensors, json_state, best, kept_step),
            name="distrain-checkpoint",
        )
        self._thread.start()
        return name

    def _copy_to_cpu(
        self, part: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Copy tensors to the CPU, and wait for the copies.

        From a GPU they go to pinned memory, so that the host can enqueue all copies
        without blocking, and synchronizes once.
        """
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

        # Without this, the thread would write tensors that are still on their way.
        devices = {tensor.device for tensor in tensors.values()}
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def poll_save(self) -> None:
        """Report what happened in the background; cheap, so call it at every step.

        Raises:
            AttemptError: a save has failed.
        """
        self._report_warnings()
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save that is under way.

        Raises:
            AttemptError: it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._report_warnings()
        if self._save_error is not None:
            # Raise it only once.
            error = self._save_error
            self._save_error = None
            if isinstance(error, AttemptError):
                raise error
            reason = getattr(error, "strerror", None) or error
            raise AttemptError(
                f"a checkpoint could not be saved in {self._store.redacted_url} "
                f"({reason}; {self._describe_previous()}): free space or fix the "
                "storage, then run the same command to resume"
            ) from error

    def _report_warnings(self) -> None:
        while not self._pending_warnings.empty():
            self._warn(self._pending_warnings.get())

    def _describe_previous(self) -> str:
        """Return what a save that failed has left to resume from."""
        try:
            name = find_newest_checkpoint(self._store)
        except OSError:
            return "the previous one is untouched"
        return "none was saved before" if name is None else f"{name} is untouched"

    def _save_in_background(
        self,
        name: str,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        best: Mapping[str, Any] | None,
        kept_step: int | None,
    ) -> None:
        def warn_once(error: OSError, failures: int) -> None:
            if failures == 1:
                self._pending_warnings.put(
                    f"warning: checkpoint {name} could not be saved yet ({error}): "
                    "retrying"
                )

        # Write the checkpoint. An error is raised later, on the training thread, by the
        # next `poll_save` or `wait`.
        start_time = time.monotonic()
        try:
            contents = {
                f"{part}.safetensors": encode_safetensors(state_dict)
                for part, state_dict in tensors.items()
            }
            contents["state.json"] = [json.dumps(state, indent=1).encode()]
            if self._model_info is not None:
                contents[files.MODEL_FILE] = [self._model_info.to_json().encode()]
            # Retry after any OSError, even one that is usually permanent: a permission
            # that was revoked may be granted again before the time is up.
            size = call_with_retries(
                lambda: self._write_checkpoint(name, contents),
                self._retry_seconds,
                should_retry=lambda _: True,
                on_retry=warn_once,
            )
            self._on_saved(time.monotonic() - start_time, size)
        except BaseException as error:
            self._save_error = error
            return

        # The checkpoint is complete now. A failure to name the best one or to prune is
        # only a warning.
        try:
            self._lease.raise_if_superseded()
            if best is not None:
                write_best(self._store, name, best)
            self._prune(kept_step)
        except AttemptError as error:
            self._save_error = error
        except OSError as error:
            self._pending_warnings.put(
                f"warning: checkpoint {name} is saved, but naming the best one "
                f"or removing old ones failed: {error}"
            )

    def _write_checkpoint(
        self, name: str, contents: Mapping[str, Sequence[bytes | memoryview]]
    ) -> int:
        """Write the files of a checkpoint, and its manifest last; leave all or nothing.

        Returns:
            Size of the files in bytes, without the manifest.
        """
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

            # Stop if a newer attempt has taken over. The check need not be atomic with
            # the write: a manifest that the newer attempt did not see when it chose its
            # checkpoint is rolled back if it is from a later step.
            self._lease.raise_if_superseded()
            text = json.dumps(manifest, indent=1)
            self._store.write(f"{folder}/{MANIFEST_FILE}", text.encode())
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
            # Without a manifest it is ignored as incomplete; the next prune removes it.
            return

    def _prune(self, kept_step: int | None) -> None:
        """Remove all but the newest complete checkpoints, the best, and one of a step.

        Checkpoints that a later attempt rolled back (it resumed from an earlier step)
        and incomplete ones are removed too, except the one that `best.json` names.
        """
        records = read_attempts(self._store)
        names = []
        complete_names = []
        kept = {read_best_name(self._store)}
        for step, attempt, name in list_checkpoints(self._store):
            names.append(name)
            if is_rolled_back(records, attempt, step):
                continue
            if is_complete(self._store, name):
                complete_names.append(name)
                if step == kept_step:
                    kept.add(name)
        kept.update(complete_names[-self._keep_latest :])
        for name in names:
            if name not in kept:
                remove_checkpoint(self._store, name)


def write_best(store: Store, name: str, best: Mapping[str, Any]) -> None:
    """Write `best.json`, which names the best checkpoint."""
    store.write(files.BEST_FILE, json.dumps({"checkpoint": name, **best}).encode())


def read_best_name(store: Store) -> str | None:
    """Return the best checkpoint's name; None if `best.json` is missing or damaged."""
    try:
        return str(json.loads(store.read(files.BEST_FILE))["checkpoint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).numpy().data.cast("B"))
    return digest.hexdigest()
