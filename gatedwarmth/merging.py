"""Merged stretches: gates that stay the same for long are folded into the base's weights, and taken out bit for bit.

W·x + Σ gate·scaling·B·(A·x) = (W + Σ gate·scaling·B·A)·x, so while all rows of a batch keep one set of gates the bare
base with other weights gives the gated output, up to rounding, at the cost of the base.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from gatedwarmth.gates import GatePlan
from gatedwarmth.layers import GatedLinear, is_plain

log = logging.getLogger("gatedwarmth")

# A stretch is merged once it has lasted about as long as merging takes to pay for itself, so that it costs at most
# about twice what the better choice would have (the ski-rental rule). Measured on SmolLM2-135M in float32 on two AVX2
# cores: merging rank 16 takes 0.28 to 0.33 s and saves about 7 ms a step; beside another job it took 3 s. On two cores
# with bfloat16 instructions: 0.15 to 0.8 s in float32, 0.09 s and about 6 ms a step in bfloat16.
MERGE_AFTER = 40

# On CPUs, where it was measured. Rounding W + Σ gate·scaling·B·A to bfloat16 costs nothing that can be seen: mean KL to
# the float32 model's next token, over 100 test turns, 0.0023 merged and 0.0022 not, where the adapters move it by 0.18,
# and 0.0016 and 0.0018 where they move it by 0.015 (random adapters; a script that is not kept).
MERGED_DTYPES = (torch.float32, torch.bfloat16)

# Merged weights stand beside the base's own; at least this many times their size must be free.
FREE = 2.0


class Merging:
    """The stretch under way of one model: how long its gates have stayed the same, and the weights that it replaced.

    The base's own tensors are set aside, not computed back: restoring them is exact by construction.

    Parameters
    ----------
    base, layers: the model and the gated layers in it.
    wanted: None for the rule (MERGED_DTYPES on CPUs, where it was measured); True for others too; False for never.
    after: steps before a stretch is merged.
    """

    def __init__(
        self, base: nn.Module, layers: Iterable[GatedLinear], wanted: bool | None = None, after: int = MERGE_AFTER
    ) -> None:
        self.base, self.layers = base, tuple(layers)
        self.wanted, self.after = wanted, after
        self._plan: GatePlan | None = None
        self._steps = 0
        self._own: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def merged(self) -> bool:
        """Whether the base carries other weights than its own right now."""
        return bool(self._own)

    def follow(self, plan: GatePlan | None) -> GatePlan | None:
        """What the layers shall work under in the pass about to run; None, as for the bare base, once merged."""
        if not self.merged and (self.wanted is False or torch.compiler.is_compiling()):
            return plan  # a count in a compiled pass would make the compiler start over at every step
        if plan is None or plan is not self._plan or torch.is_grad_enabled():
            self.end()
            self._plan = plan
            return plan
        self._steps += 1
        if self._steps == self.after and self._worthwhile(plan):
            self._try_to_merge(plan.gates[0, 0])
        return None if self.merged else plan

    def end(self) -> None:
        """Give the base its own weights back."""
        for parameter, own in self._own:
            parameter.data = own
        self._own, self._plan, self._steps = [], None, 0

    def _worthwhile(self, plan: GatePlan) -> bool:
        if self.wanted is False or torch.is_grad_enabled() or plan.start or plan.gates.shape[1] != 1:
            return False
        if not torch.equal(plan.gates, plan.gates[:1].expand_as(plan.gates)) or not self._possible():
            return False
        device = self.layers[0].weight.device
        if self.wanted is None and (device.type != "cpu" or self.layers[0].weight.dtype not in MERGED_DTYPES):
            return False
        return free_bytes(device) >= FREE * sum(layer.weight.nbytes for layer in self.layers)

    def _possible(self) -> bool:
        """Plain linears of one dtype with their adapters, of which no other module uses the weight (tied ones)."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False  # a sharded model owns its weights' storage
        uses = Counter(id(p) for _, p in self.base.named_parameters(remove_duplicate=False))
        return all(
            is_plain(layer.base) and layer.weight.dtype == layer.a.dtype and uses[id(layer.weight)] == 1
            for layer in self.layers
        )

    def _try_to_merge(self, gates: Tensor) -> None:
        try:
            self._merge(gates)
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
            plan = self._plan
            self.end()
            self._plan, self._steps = plan, self.after  # not tried again in this stretch
            log.warning("going on without merged weights: %s", error)

    @torch.no_grad()
    def _merge(self, gates: Tensor) -> None:
        with torch.inference_mode(False):
            for layer in self.layers:
                weight = layer.weight
                scaled = gates.to(weight.device) * torch.tensor(layer.scalings, device=weight.device)
                columns = scaled.repeat_interleave(torch.tensor(layer.ranks, device=weight.device)).to(weight.dtype)
                self._own.append((weight, weight.data))  # type: ignore[arg-type]
                weight.data = torch.addmm(weight.data, layer.b.data * columns, layer.a.data)


def _container_free() -> list[int]:
    """What control groups, version 2 or 1, leave to this process; empty outside of limits."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return [int(Path(limit).read_text()) - int(Path(used).read_text())]
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return []


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, within a container's limit; 0 where it cannot be told."""
    if device.type == "cpu":
        return min([int(psutil.virtual_memory().available), *_container_free()])
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
