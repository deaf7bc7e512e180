"""What this machine is, and which dtype its matrix products are fast in."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def faster_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where its products are fast, else float32; measured on CPUs (0.1 to 1 s).

    A CPU without bfloat16 instructions emulates them: 10 to 60 times slower than float32 on AVX2 alone.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _seconds(torch.bfloat16) < 0.8 * _seconds(torch.float32) else torch.float32


def describe(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """The hardware line of a report."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "processor": gpu or _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _seconds(dtype: torch.dtype) -> float:
    x, w = torch.ones(128, 576, dtype=dtype), torch.ones(576, 576, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        _ = x @ w.T
        best = min(best, time.perf_counter() - start)
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
