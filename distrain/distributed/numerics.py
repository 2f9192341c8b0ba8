"""The arithmetic of a run: torch's global settings, and the versions that may change a result's bits."""

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
    """Set torch's global numerics, and the GPU of this thread, for the run; set the numerics back after it.

    Args:
        device: what computes.
        precision: fp32, tf32 or bf16.
        exact: the same bits every time, at the price of speed.

    Raises:
        UserError: the device lacks the precision, or it is too late to set cuBLAS's workspace.
    """
    if precision == "tf32" and device.type == "cpu":
        raise UserError(
            "precision tf32 exists on NVIDIA GPUs only: use precision=fp32 or bf16 here"
        )
    tf32 = precision == "tf32"
    if (
        exact
    ):  # read by cuBLAS when it starts; another value, or none, gives other kernels
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE_CONFIG
        os.environ["TORCHINDUCTOR_DETERMINISTIC"] = (
            "1"  # read by torch's compiler when a model loads it
        )
    deterministic = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    matmul, cudnn = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    benchmark, threads = torch.backends.cudnn.benchmark, torch.get_num_threads()
    _set_deterministic_mode(2 if exact else 0)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not exact and device.type == "cuda"
    # Lanes use the cores. A team of OpenMP threads on this one would spin between its uses and take the cores away
    # from them: measured, that made a run beside another job three times slower.
    torch.set_num_threads(1)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(
                device
            )  # streams and events that name no device are made on this thread's
            if exact:
                _check_cublas_workspace(device)
        yield
    finally:
        _set_deterministic_mode(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (
            matmul,
            cudnn,
        )
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)


def _set_deterministic_mode(mode: int) -> None:
    """Set torch's deterministic mode: 0 off, 1 warn, 2 refuse what is not.

    Where torch's compiler is not loaded its flag is not set, since that would load it, which takes a second and more.
    """
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)


def _check_cublas_workspace(device: torch.device) -> None:
    """Multiply two matrices: torch reads CUBLAS_WORKSPACE_CONFIG at a process's first product, and then never again.

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
            "this process has multiplied matrices on a GPU before training, and cuBLAS keeps the workspace that it "
            f"chose then: set CUBLAS_WORKSPACE_CONFIG={_CUBLAS_WORKSPACE_CONFIG} in the environment before Python starts, or use "
            "reduction.mode=fast"
        ) from None


def collect_environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions that may change a result's bits, by name."""
    gpu = device.type == "cuda"
    found = {"python": platform.python_version()}
    for package in _PACKAGES + _GPU_PACKAGES * gpu:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for name in _ENV_VARIABLES + _GPU_ENV_VARIABLES * gpu:
        if name in os.environ:
            found[name] = os.environ[name]
    found["device"] = torch.cuda.get_device_name(device) if gpu else _read_cpu_name()
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if gpu:
        found["driver"] = _read_driver_version()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def select_gpu_versions(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment explains other bits and need not be the same: drivers may differ in a cluster."""
    return {
        name: value
        for name, value in environment.items()
        if name in (*_GPU_PACKAGES, "driver", "cuda", "cudnn")
    }


def _read_driver_version() -> str:
    """The version of NVIDIA's kernel driver, or "unknown"."""
    try:
        found = re.search(
            r"\d+\.\d+(\.\d+)?", _DRIVER_VERSION_FILE.read_text(encoding="utf-8")
        )
    except OSError:
        return "unknown"
    return found[0] if found else "unknown"


def _read_cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (
                    line.partition(":")[2].strip()
                    for line in file
                    if line.startswith("model name")
                ),
                "CPU",
            )
    except OSError:
        return platform.processor() or platform.machine()
