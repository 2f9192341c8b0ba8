"""Record names, versions and ceilings of the machine: `machine.py env SECONDS`."""

import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from common import DRY, Out, main
from device import DEVICE, elapsed
from short_runs import digits, run

from distrain.distributed.numerics import collect_environment

QUERY = "name,driver_version,memory.total,clocks.max.sm,power.limit,pcie.link.gen.max,pcie.link.width.max"
COMMANDS = {
    "cpu": ["lscpu"],
    "memory": ["free", "-g"],
    "disk": ["df", "-h", "/tmp", "/dev/shm"],
}
CPU_LINES = re.compile(r"(Model name|CPU\(s\)|Thread|Core|Socket|L3)")
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "triton",
    "pyarrow",
    "nvidia-dali-cuda130",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "pydantic",
    "pillow",
    "nvidia-nccl-cu13",
)


def env(out: Out) -> None:
    """Write down what the machine is, and how fast a copy, a product and a launch are on it."""
    digits()  # here, since several groups want them at once
    commands = COMMANDS
    if not DRY:
        commands = {
            "gpu": ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"],
            **COMMANDS,
        }
    for what, command in commands.items():
        with out.guarded(what):
            lines = run(command, 10)[1].splitlines()
            out(
                what,
                text=[line for line in lines if what != "cpu" or CPU_LINES.match(line)][
                    :8
                ],
            )
    with out.guarded("versions"):
        out("versions", **versions())
    with out.guarded("environment"):
        out("environment", **collect_environment(DEVICE))
    if DRY:
        return
    with out.guarded("ceilings"):
        out("ceilings", **copies(), **products())
    with out.guarded("launch"):
        out("launch", **launches())


def versions() -> dict[str, object]:
    """Return the versions of Python, CUDA and packages, and the number of cores."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
        **packages,
        "cudnn": torch.backends.cudnn.version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds of one call on the GPU, after a first one."""
    work()
    return elapsed(work, repeats)


def copies() -> dict[str, float]:
    """Measure copies on the GPU, and to and from it."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    found = {
        "copy TB/s (read + write)": 2
        * 4
        * 2**30
        / timed(lambda: target.copy_(source), 5)
        / 1e9
    }
    device = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for name in ("pinned", "pageable"):
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=name == "pinned")

        def to_device(host: torch.Tensor = host) -> None:
            device.copy_(host, non_blocking=True)

        def from_device(host: torch.Tensor = host) -> None:
            host.copy_(device, non_blocking=True)

        found[f"to the device, {name} GB/s"] = 2**28 / timed(to_device, 3) / 1e6
        found[f"from the device, {name} GB/s"] = 2**28 / timed(from_device, 3) / 1e6
    return {name: round(rate, 2) for name, rate in found.items()}


def products() -> dict[str, float]:
    """Measure a product of two matrices in each precision."""
    found = {}
    for name, dtype in (
        ("bf16", torch.bfloat16),
        ("tf32", torch.float32),
        ("fp32", torch.float32),
    ):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        x = torch.randn(8192, 8192, device="cuda").to(dtype)
        y = torch.randn(8192, 8192, device="cuda").to(dtype)

        def product(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            return x @ y

        milliseconds = timed(product, 2 if name == "fp32" else 4)
        found[f"matmul {name} TFLOP/s"] = round(2 * 8192**3 / milliseconds / 1e9, 2)
    return found


def host_microseconds(work: Callable[[], object], n: int = 3000) -> float:
    """Return the microseconds until the host has launched one call."""
    for _ in range(50):
        work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(n):
        work()
    spent = time.perf_counter() - began
    torch.cuda.synchronize()
    return round(1e6 * spent / n, 2)


def launches() -> dict[str, float]:
    """Measure what a step does many times."""
    x = torch.zeros(8, device="cuda")
    linear = torch.nn.Linear(64, 64, device="cuda")
    rows = torch.zeros(8, 64, device="cuda")
    found = {
        "add_ us": host_microseconds(lambda: x.add_(1)),
        "timing event us": host_microseconds(
            lambda: torch.cuda.Event(enable_timing=True).record()
        ),
        "linear forward us": host_microseconds(lambda: linear(rows), 1000),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            x.add_(1)
    found["replay of 100 kernels us"] = host_microseconds(graph.replay, 300)
    return found


if __name__ == "__main__":
    main({"env": env})
