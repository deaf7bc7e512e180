"""Bytes that tensors hold, and bytes that a run needs for a while, on CPUs as on GPUs."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gatedwarmth.kernels.bench.measure import Run


def live_bytes(device: str | torch.device = "cpu") -> int:
    """Bytes of all living tensors of a kind of device, each storage once: weights, buffers, caches and copies."""
    kind = torch.device(device).type
    gc.collect()
    if kind == "cuda":
        return int(torch.cuda.memory_allocated(device))
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some lazy modules warns of their deprecation
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and thing.device.type == kind:
                storages.update(_storage(thing))
    return sum(storages.values())


def _storage(tensor: Tensor) -> dict[int, int]:
    try:
        storage = tensor.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    except (RuntimeError, NotImplementedError):  # fake, sparse and wrapper tensors have none
        return {}


def peak_bytes(run: Run, device: str | torch.device = "cpu") -> int:
    """The most bytes that `run` had allocated at one time, on top of what was there before.

    On CPUs the sum of the allocations and releases that torch's profiler saw; scratch memory inside the libraries
    that torch calls is not among them.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak
