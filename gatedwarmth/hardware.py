"""What this machine is, and which dtype its matrix products are fast in."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

# Processor flags of bfloat16 products: x86 (AVX-512, AMX) and ARM.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def faster_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32.

    A CPU without bfloat16 instructions emulates them: 8 to 50 times slower than float32 on one with AVX2 alone.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if BFLOAT16_FLAGS & _cpu_flags() else torch.float32


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


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
