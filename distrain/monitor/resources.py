"""Memory and open files of this process, and memory, load and power of its GPU."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import torch


def read_resident_bytes() -> int:
    """Return the bytes of this process's resident memory.

    Where the system has no /proc, it is the highest value so far.
    """
    try:
        # The second field of statm is the number of resident pages.
        num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # Kilobytes, as Linux has it.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return num_pages * resource.getpagesize()


def count_open_files() -> int:
    """Return the number of this process's open files; 0 where there is no /proc."""
    if not os.path.isdir("/proc/self/fd"):
        return 0
    return len(os.listdir("/proc/self/fd"))


class GpuReader:
    """Memory, load and power of a rank's GPU; no kernel is run to read them."""

    def __init__(self, device: torch.device, log: Callable[[str], None]) -> None:
        self._device = device
        self._log = log
        self._has_nvml = True

    def read_uuid(self) -> str:
        """Return the UUID of the GPU; its index would depend on the process."""
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def read_gauges(self) -> dict[str, float]:
        """Return the gauges by metric name.

        Load and power come from NVML, for which nvidia-ml-py must be installed. Once
        they cannot be read, they are left out from then on.
        """
        gauges: dict[str, float] = {
            "gpu_memory_bytes": torch.cuda.memory_reserved(self._device)
        }
        if not self._has_nvml:
            return gauges
        try:
            gauges["gpu_busy_ratio"] = torch.cuda.utilization(self._device) / 100
            gauges["gpu_power_watts"] = torch.cuda.power_draw(self._device) / 1000
        except Exception as error:
            # The errors are of many types: the package is not installed, there is no
            # driver, or the GPU is a partition (MIG), which has no such numbers.
            self._has_nvml = False
            reason = " ".join(str(error).split())
            self._log(
                f"GPU load and power are not measured: {reason} "
                "(NVML comes with pip install 'distrain[gpu]')"
            )
        return gauges
