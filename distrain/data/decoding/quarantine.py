"""Files that may kill the decoder, which is C++ on bytes that nobody has proved: found after the crash, one by one.

Each loader of files that were not proved notes on this machine's disk which samples are in flight. If its process dies,
the next attempt finds the note, decodes those suspects one at a time in a child process, and quarantines what kills it.
The verdict is a function of the bytes: whoever asks again gets the same one.
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

# DALI 2.4 survives at 8 files a batch what kills it at 64.
_BATCH_SIZE = 64
_EMPTY_SLOT = -1
# How a process dies of what it does itself. Killed from outside, by a person or for want of memory, says nothing.
_CRASH_SIGNALS = {
    signal.SIGSEGV,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
}


class InFlightRecorder:
    """Notes which samples are in flight, where another process finds them if this one dies. Close it."""

    def __init__(
        self, run_dir: str, dataset: Dataset, *, num_slots: int, batch_size: int
    ) -> None:
        folder = _get_record_folder(run_dir, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
        self._path, self._file = Path(name), os.fdopen(descriptor, "r+b")
        fcntl.flock(
            self._file, fcntl.LOCK_EX
        )  # until this process ends, however it ends
        self._slots = np.memmap(
            self._path, np.int64, "w+", shape=(num_slots, batch_size)
        )
        self.clear_slots()

    def record_fed(self, sample_ids: NDArray[np.int64]) -> None:
        """These samples go to the decoder."""
        self._slots[self._num_fed % len(self._slots)] = sample_ids
        self._num_fed += 1

    def record_decoded(self) -> None:
        """The oldest samples are decoded."""
        self._slots[self._num_decoded % len(self._slots)] = _EMPTY_SLOT
        self._num_decoded += 1

    def clear_slots(self) -> None:
        """Nothing is in flight."""
        self._slots[:] = _EMPTY_SLOT
        self._num_fed = self._num_decoded = 0

    def close(self) -> None:
        """All went well: leave nothing behind."""
        self._path.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):  # another loader notes there, or has removed it
            self._path.parent.rmdir()


@contextmanager
def claim_suspects(run_dir: str, dataset: Dataset) -> Iterator[NDArray[np.int64]]:
    """Samples that were in flight in processes of this run that died on this machine, in ascending order.

    Their notes belong to the caller meanwhile, whatever other ranks look for; a block that ends well takes them away.
    """
    folder, found = _get_record_folder(run_dir, dataset), [np.empty(0, np.int64)]
    with ExitStack() as stack:
        paths = []
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            with suppress(
                OSError
            ):  # its process lives, another rank has it, or it is gone meanwhile
                file = stack.enter_context(path.open("r+b"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                ids = np.frombuffer(file.read(), np.int64)
                found.append(ids[ids != _EMPTY_SLOT])
                paths.append(path)
        yield np.unique(np.concatenate(found))
        for path in paths:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def decode_one_by_one(
    files: Sequence[NDArray[np.uint8]],
    device: torch.device,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str | None]:
    """Decode files one at a time in a child process: why a file cannot be decoded, or None.

    Args:
        files: what the decoder would get.
        device: where it decodes.
        told: called with the number of verdicts so far.

    Raises:
        AttemptError: the child ended for another reason than a file.
    """
    verdicts: list[str | None] = []
    while len(verdicts) < len(files):
        before = len(verdicts)
        code = _decode_in_child(files, verdicts, device, on_progress)
        if len(verdicts) == len(files):
            break
        if -code not in _CRASH_SIGNALS:
            raise AttemptError(
                f"the process that decodes files one at a time ended by itself (code {code})"
            )
        if (
            len(verdicts) == before
        ):  # the first file that a new child was given: no other can be to blame
            verdicts.append(f"the decoder dies of it ({signal.Signals(-code).name})")
    return verdicts


def _decode_in_child(
    files: Sequence[NDArray[np.uint8]],
    verdicts: list[str | None],
    device: torch.device,
    on_progress: Callable[[int], None],
) -> int:
    """Give a new child the files that have no verdict yet, until it has none left or dies; its exit code."""
    child = subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", "distrain.data.decoding.quarantine", str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is not for it
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        for data in files[len(verdicts) :]:
            with suppress(BrokenPipeError):
                child.stdin.write(len(data).to_bytes(8, "little") + bytes(data))
                child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                break
            verdicts.append(json.loads(answer))
            on_progress(len(verdicts))
    finally:
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
        code = child.wait()
    return code


def _get_record_folder(run_dir: str, dataset: Dataset) -> Path:
    key = hashlib.sha256(
        f"{os.getuid()} {run_dir} {dataset.manifest.fingerprint}".encode()
    ).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"distrain-in-flight-{key}"


def _decode_alone(data: NDArray[np.uint8], device: torch.device) -> str | None:
    """Decode a file among blank ones, whole, with all that it takes to kill the decoder."""
    blank = encode_ppm(np.zeros((1, 1, 3), np.uint8))
    colour = np.zeros((_BATCH_SIZE, 3), np.float32)
    draws = AugmentParams(
        np.zeros((_BATCH_SIZE, 2)),
        np.ones((_BATCH_SIZE, 2)),
        np.zeros(_BATCH_SIZE, np.int32),
        colour,
    )
    feed = DecodeInput(
        [data] + [blank] * (_BATCH_SIZE - 1),
        np.ones((_BATCH_SIZE, 2), np.int64),
        draws,
        colour,
    )
    graph = DecodePlan(
        _BATCH_SIZE,
        1,
        is_raw=False,
        resize=False,
        decode_full_image=True,
        normalize=False,
        std=np.ones(3, np.float32),
    )
    decoder = DaliDecoder(
        lambda: feed, graph, device=device, num_threads=1, read_ahead=1
    )
    try:
        decoder.decode_batch()
    except DecodeError as refused:
        return str(refused)
    finally:
        decoder.close()
    return None


def _run_child(device: torch.device) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    while length := sys.stdin.buffer.read(8):
        data = np.frombuffer(
            sys.stdin.buffer.read(int.from_bytes(length, "little")), np.uint8
        )
        answers.write(json.dumps(_decode_alone(data, device)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _run_child(torch.device(sys.argv[1]))
