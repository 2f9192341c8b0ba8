"""Numerics: torch's global settings, and the versions that may change results.

"Exact" means that a run gives the same bits every time.
"""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from distrain.errors import UserError

_PACKAGES = (
    "distrain",
    "torch",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "pillow",
)
_GPU_PACKAGES = (
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvjpeg",
    "nvidia-nvjpeg-cu12",
)
# Measured: each of these changes the bits of a gradient.
_ENV_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "ATEN_CPU_CAPABILITY",
)
_GPU_ENV_VARIABLES = ("NVIDIA_TF32_OVERRIDE",)
_CUBLAS_WORKSPACE_CONFIG = ":4096:8"
_DRIVER_VERSION_FILE = Path("/proc/driver/nvidia/version")


@contextmanager
def set_torch_numerics(
    device: torch.device, *, precision: str, exact: bool
) -> Iterator[None]:
    """Set torch's global numerics, and the GPU of this thread; restore the numerics.

    Args:
        device: the device that computes.
        precision: fp32, tf32 or bf16.
        exact: compute the same bits every time, at the price of speed.

    Raises:
        UserError: the device lacks the precision, or it is too late to set cuBLAS's
            workspace.
    """
    if precision == "tf32" and device.type == "cpu":
        raise UserError(
            "precision tf32 exists on NVIDIA GPUs only: use precision=fp32 or bf16 here"
        )
    allow_tf32 = precision == "tf32"

    if exact:
        # cuBLAS reads this when it starts; any other value, or none, selects other
        # kernels.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE_CONFIG
        # Read by torch's compiler, once a model loads it.
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"

    with _restore_numerics():
        _set_deterministic_mode(2 if exact else 0)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = allow_tf32
        torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.backends.cudnn.benchmark = not exact and device.type == "cuda"
        # The lanes use the cores. A team of OpenMP threads on this thread would spin
        # between its uses and take the cores from the lanes: measured, this made a run
        # beside another job three times slower.
        torch.set_num_threads(1)

        if device.type == "cuda":
            # Streams and events that name no device are created on this thread's.
            torch.cuda.set_device(device)
            if exact:
                _check_cublas_workspace(device)
        yield


@contextmanager
def _restore_numerics() -> Iterator[None]:
    """Restore torch's global numerics after the block."""
    deterministic_mode = torch.get_deterministic_debug_mode()
    fill_memory = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul_tf32 = torch.backends.cuda.matmul.allow_tf32
    cudnn_tf32 = torch.backends.cudnn.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        _set_deterministic_mode(deterministic_mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill_memory  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(num_threads)


def _set_deterministic_mode(mode: int) -> None:
    """Set torch's deterministic mode: 0 off, 1 warn, 2 raise on other operations."""
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        # use_deterministic_algorithms also sets the flag of torch's compiler, and
        # loads the compiler for that, which takes a second or more.
        torch.set_deterministic_debug_mode(mode)


def _check_cublas_workspace(device: torch.device) -> None:
    """Multiply two matrices to check that cuBLAS uses CUBLAS_WORKSPACE_CONFIG.

    torch reads the variable at a process's first product, and never again.

    Raises:
        UserError: this process computed on a GPU before, without the variable.
    """
    one = torch.ones(1, 1, device=device)
    try:
        torch.mm(one, one)
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" not in str(error):
            raise
        raise UserError(
            "this process has multiplied matrices on a GPU before training, and "
            "cuBLAS keeps the workspace that it chose then: set "
            f"CUBLAS_WORKSPACE_CONFIG={_CUBLAS_WORKSPACE_CONFIG} in the environment "
            "before Python starts, or use reduction.mode=fast"
        ) from None


def collect_environment(device: torch.device) -> dict[str, str]:
    """Return the hardware and versions that may change a result's bits, by name."""
    gpu = device.type == "cuda"
    environment = {"python": platform.python_version()}

    # Packages that are installed, and variables that are set.
    for package in _PACKAGES + _GPU_PACKAGES * gpu:
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            continue
    for name in _ENV_VARIABLES + _GPU_ENV_VARIABLES * gpu:
        if name in os.environ:
            environment[name] = os.environ[name]

    # The hardware, and what comes with its driver.
    device_name = torch.cuda.get_device_name(device) if gpu else _read_cpu_name()
    environment["device"] = device_name
    environment["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if gpu:
        environment["driver"] = _read_driver_version()
        environment["cuda"] = str(torch.version.cuda)
        environment["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return environment


def select_gpu_versions(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the GPU versions, which may explain different bits.

    They need not be equal on all ranks: drivers may differ in a cluster.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in (*_GPU_PACKAGES, "driver", "cuda", "cudnn")
    }


def _read_driver_version() -> str:
    """Return the version of NVIDIA's kernel driver, or "unknown"."""
    try:
        text = _DRIVER_VERSION_FILE.read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    match = re.search(r"\d+\.\d+(\.\d+)?", text)
    return match[0] if match else "unknown"


def _read_cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
            return "CPU"
    except OSError:
        return platform.processor() or platform.machine()
