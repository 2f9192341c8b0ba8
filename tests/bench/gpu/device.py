"""The device that is measured: its clock, its memory, and a fingerprint of the bits on it."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence

import torch
from common import DEVICE_NAME, DRY
from torch import Tensor

DEVICE = torch.device(DEVICE_NAME)


def sync() -> None:
    """Wait for the GPU."""
    if not DRY:
        torch.cuda.synchronize()


def milliseconds(
    work: Callable[[], object], seconds: float = 0.5, least: int = 3
) -> dict[str, float]:
    """Measure one call: `ms` on the device, and `host ms` until the host has launched all of it.

    Args:
        work: what is called again and again.
        seconds: about how long to measure.
        least: calls to make at least.
    """
    for _ in range(2):
        work()
    sync()
    began = time.perf_counter()
    work()
    sync()
    once = time.perf_counter() - began
    if DRY:
        return {"ms": round(1000 * once, 3), "host ms": round(1000 * once, 3)}
    n = max(least, min(200, int(seconds / once)))
    device = elapsed(work, n)
    host = []
    for _ in range(
        min(n, 5)
    ):  # one at a time: a queue that is full would hold the host back
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        host.append(1000 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return {"ms": round(device, 3), "host ms": round(sorted(host)[len(host) // 2], 3)}


def elapsed(work: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds of one call on the GPU, as the mean over several in a row."""
    first = torch.cuda.Event(enable_timing=True)
    last = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / repeats


def reset_peak_memory() -> None:
    """Let `peak_memory` begin anew."""
    if not DRY:
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Return the most MiB of the GPU that torch's tensors of this process have taken at once."""
    return 0 if DRY else torch.cuda.max_memory_allocated() >> 20


def memory_of_all() -> int:
    """Return the MiB of the GPU that all processes together take."""
    if DRY:
        return 0
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


def memory_of_process() -> int | None:
    """Return the MiB of the GPU that this process takes, of torch and DALI; None where the driver does not say."""
    if DRY:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
        taken = {
            p.pid: p.usedGpuMemory
            for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        }
        return int(taken[os.getpid()]) >> 20
    except Exception:
        return None


def bits(tensors: Sequence[Tensor]) -> str:
    """Return a fingerprint of the tensors' bits, computed where they are: sums of integers, mixed with their places."""
    sums = []
    for t in tensors:
        flat = t.detach().reshape(-1).contiguous()
        words = flat.view(torch.int32 if t.element_size() == 4 else torch.int16).long()
        places = torch.arange(words.numel(), device=words.device, dtype=torch.int64)
        sums.append((words * (places * 2654435761 + 12345)).sum())
    return hashlib.sha256(repr(torch.stack(sums).tolist()).encode()).hexdigest()[:16]
