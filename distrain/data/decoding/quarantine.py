"""Quarantine: find the files that crash the decoder, after the crash.

DALI is C++, and may crash on files that were never decoded, or that `index` decoded
with PIL only. Each loader of such files records on this machine's disk which samples
are in flight. If its process dies, the next attempt reads the record and decodes those
suspects one at a time in a child process. The verdict is a function of the bytes: every
attempt that repeats this gets the same one.
"""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distrain.data.decoding.augment import AugmentParams
from distrain.data.decoding.dali import DaliDecoder
from distrain.data.decoding.decoder import DecodeError, DecodeInput, DecodePlan
from distrain.data.decoding.image import encode_ppm
from distrain.data.shards.dataset import Dataset
from distrain.errors import AttemptError

# Files that crash DALI 2.4 in a batch of 64 do not in a batch of 8.
_BATCH_SIZE = 64
_EMPTY_SLOT = -1
# Signals of a crash. Others, such as SIGKILL from an operator or the kernel's
# out-of-memory killer, say nothing about the file.
_CRASH_SIGNALS = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
}


class InFlightRecorder:
    """Record of the samples in flight, readable by others after this process dies.

    Close it when all went well.
    """

    def __init__(
        self, run_dir: str, dataset: Dataset, *, num_slots: int, batch_size: int
    ) -> None:
        folder = _get_record_folder(run_dir, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder)
        self._path = Path(path)
        self._file = os.fdopen(descriptor, "r+b")
        # The kernel drops the lock when this process ends, however it ends.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        # A shared mapping: what is stored in it survives a crash of this process.
        self._slots = np.memmap(
            self._path, np.int64, "w+", shape=(num_slots, batch_size)
        )
        self.clear_slots()

    def record_fed(self, sample_ids: NDArray[np.int64]) -> None:
        """Record that a batch was fed to the decoder."""
        self._slots[self._num_fed % len(self._slots)] = sample_ids
        self._num_fed += 1

    def record_decoded(self) -> None:
        """Record that the oldest batch in flight was decoded."""
        self._slots[self._num_decoded % len(self._slots)] = _EMPTY_SLOT
        self._num_decoded += 1

    def clear_slots(self) -> None:
        """Record that no batch is in flight."""
        self._slots[:] = _EMPTY_SLOT
        self._num_fed = 0
        self._num_decoded = 0

    def close(self) -> None:
        """Delete the record."""
        self._path.unlink(missing_ok=True)
        self._file.close()
        # Another loader has a record in the folder, or has removed the folder.
        with suppress(OSError):
            self._path.parent.rmdir()


@contextmanager
def claim_suspects(run_dir: str, dataset: Dataset) -> Iterator[NDArray[np.int64]]:
    """Claim the samples that were in flight in dead processes of this run.

    Only processes of this machine count. Yields the sample ids, ascending. During the
    block the records are locked against other ranks; if it does not raise, they are
    deleted.
    """
    folder = _get_record_folder(run_dir, dataset)
    claimed_ids = [np.empty(0, np.int64)]
    claimed_paths = []
    with ExitStack() as stack:
        record_paths = sorted(folder.iterdir()) if folder.exists() else []
        for path in record_paths:
            # Its process is alive, another rank has claimed it, or it was deleted.
            with suppress(OSError):
                file = stack.enter_context(path.open("r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ids = np.frombuffer(file.read(), np.int64)
                claimed_ids.append(ids[ids != _EMPTY_SLOT])
                claimed_paths.append(path)

        yield np.unique(np.concatenate(claimed_ids))
        # Delete before the locks are released, or another rank could claim them again.
        for path in claimed_paths:
            path.unlink(missing_ok=True)
    # Fails if other records are in the folder.
    with suppress(OSError):
        folder.rmdir()


def decode_one_by_one(
    files: Sequence[NDArray[np.uint8]],
    device: torch.device,
    on_progress: Callable[[int], None] = lambda num_verdicts: None,
) -> list[str | None]:
    """Decode files one at a time in a child process.

    Args:
        files: the files as the decoder would get them.
        device: where to decode.
        on_progress: called with the number of verdicts so far.

    Returns:
        For each file the reason why it cannot be decoded, or None.

    Raises:
        AttemptError: the child ended for a reason other than a file.
    """
    verdicts: list[str | None] = []
    while len(verdicts) < len(files):
        num_before = len(verdicts)
        exit_code = _decode_in_child(files, verdicts, device, on_progress)
        if len(verdicts) == len(files):
            break
        # A process that a signal ends has the exit code -signal.
        if -exit_code not in _CRASH_SIGNALS:
            raise AttemptError(
                "the child process that decodes files one at a time ended unexpectedly "
                f"(exit code {exit_code}), perhaps for lack of memory"
            )
        # Blame a file only if it was the first one of a new child. A later one may
        # crash in memory that an earlier file corrupted: a new child starts with it.
        if len(verdicts) == num_before:
            signal_name = signal.Signals(-exit_code).name
            verdicts.append(f"crashes the decoder ({signal_name})")
    return verdicts


def _decode_in_child(
    files: Sequence[NDArray[np.uint8]],
    verdicts: list[str | None],
    device: torch.device,
    on_progress: Callable[[int], None],
) -> int:
    """Feed a new child the files that have no verdict yet, until it ends.

    Appends to `verdicts`. Returns the child's exit code.
    """
    child = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", "distrain.data.decoding.quarantine", str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C in the terminal must not end the child.
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        for data in files[len(verdicts) :]:
            # A dead child breaks the pipe; its empty answer ends the loop below.
            with suppress(BrokenPipeError):
                child.stdin.write(len(data).to_bytes(8, "little") + bytes(data))
                child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                break
            verdicts.append(json.loads(answer))
            on_progress(len(verdicts))
    finally:
        # The end of its input ends the child.
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        exit_code = child.wait()
    return exit_code


def _get_record_folder(run_dir: str, dataset: Dataset) -> Path:
    key = f"{os.getuid()} {run_dir} {dataset.manifest.fingerprint}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"distrain-in-flight-{digest}"


def _decode_alone(data: NDArray[np.uint8], device: torch.device) -> str | None:
    """Decode a whole file among blank ones; return the reason if it fails.

    The batch is as large as it must be for the decoder to crash.
    """
    # One file, blank images in the rest of the batch, and a window of one pixel each.
    blank_file = encode_ppm(np.zeros((1, 1, 3), np.uint8))
    no_color = np.zeros((_BATCH_SIZE, 3), np.float32)
    augment_params = AugmentParams(
        window_start=np.zeros((_BATCH_SIZE, 2)),
        window_size=np.ones((_BATCH_SIZE, 2)),
        mirror=np.zeros(_BATCH_SIZE, np.int32),
        color_shift=no_color,
    )
    decode_input = DecodeInput(
        images=[data] + [blank_file] * (_BATCH_SIZE - 1),
        image_sizes=np.ones((_BATCH_SIZE, 2), np.int64),
        augment_params=augment_params,
        mean=no_color,
    )
    plan = DecodePlan(
        batch_size=_BATCH_SIZE,
        crop_size=1,
        is_raw=False,
        resize=False,
        decode_full_image=True,
        normalize=False,
        std=np.ones(3, np.float32),
    )

    decoder = DaliDecoder(
        lambda: decode_input, plan, device=device, num_threads=1, read_ahead=1
    )
    try:
        decoder.decode_batch()
    except DecodeError as error:
        return str(error)
    finally:
        decoder.close()
    return None


def _run_child(device: torch.device) -> None:
    """Answer each file on stdin (8 bytes of length, then content) with a JSON line."""
    answers = os.fdopen(os.dup(1), "w")
    # Send what libraries print to stderr: only answers belong on stdout.
    os.dup2(2, 1)
    while length := sys.stdin.buffer.read(8):
        content = sys.stdin.buffer.read(int.from_bytes(length, "little"))
        data = np.frombuffer(content, np.uint8)
        answers.write(json.dumps(_decode_alone(data, device)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _run_child(torch.device(sys.argv[1]))
