"""`bench train`: one optimiser step of the gated model against PEFT's, on the same data."""

from __future__ import annotations

import copy
import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.adapters import Adapter, cast, save_adapter
from gatedwarmth.bench.model import random_ids
from gatedwarmth.bench.rows import Row, dtype_of, row_of
from gatedwarmth.bench.subjects import TRAITS
from gatedwarmth.injection import fresh_adapter
from gatedwarmth.kernels.bench import Clock, Contender, Measured, clock_for, measure
from gatedwarmth.kernels.bench.memory import peak_bytes

NAME = "train"
PEFT = "PEFT, one adapter"
IGNORED = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class TrainSettings:
    """rank: of PEFT's adapter, and in total of the gated model's. prompt: leading tokens without a label."""

    base: str = bases.DEFAULT
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    runs: int = 9
    warmup: int = 2
    rank: int = 16
    batch: int = 4
    tokens: int = 128
    prompt: int = 64
    lr: float = 1e-4


@dataclass(frozen=True)
class Batch:
    """input_ids, labels int64 [batch, tokens]; labels are IGNORED in the first `prompt` columns."""

    ids: Tensor
    labels: Tensor
    prompt: int


class Step:
    """Forward, backward, AdamW. `losses` are those of all steps so far, detached."""

    def __init__(self, parameters: list[nn.Parameter], loss: Callable[[], Tensor], lr: float) -> None:
        self.loss, self.losses = loss, list[Tensor]()
        self.optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def __call__(self) -> None:
        loss = self.loss()
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


def run_train(settings: TrainSettings) -> Iterator[Row]:
    """Rows of every dtype."""
    for dtype in settings.dtypes:
        base = bases.load(settings.base, dtype_of(dtype), settings.device)
        yield from measure_train(base, settings, dtype)
        gc.collect()


def measure_train(base: bases.Base, settings: TrainSettings, dtype: str, clock: Clock | None = None) -> Iterator[Row]:
    """Rows of a base that is loaded already; ratios are to PEFT's step."""
    steps = steps_of(base, settings)
    contenders = [Contender(name, step) for name, step in steps.items()]
    case = f"step, {settings.batch}×{settings.tokens} tokens, {settings.prompt} of prompt, rank {settings.rank}"
    clock = clock or clock_for(settings.device)
    measured = measure(case, contenders, PEFT, settings.runs, clock, settings.warmup)
    for row in _with_peaks(measured, steps, settings.device):
        yield row_of(NAME, row, base.name, dtype, settings.device)


def _with_peaks(measured: list[Measured], steps: dict[str, Step], device: str) -> Iterator[Measured]:
    peaks = {row.contender: peak_bytes(steps[row.contender], device) for row in measured if not row.error}
    for row in measured:
        known = row.contender in peaks and PEFT in peaks
        yield dataclasses.replace(row, peak=peaks[row.contender] - peaks[PEFT] if known else None)


def steps_of(base: bases.Base, settings: TrainSettings) -> dict[str, Step]:
    """PEFT's step first; every one starts from the same adapter weights (lora_B zero) on a copy of the base.

    "replies only" is how `train adapter` runs: prompts are the bare base's, so they need no gradient.
    """
    batch = batch_of(base.model, settings)
    dtype = base.model.dtype
    whole = cast(fresh_adapter(base.model, settings.rank, 2.0 * settings.rank), dtype)
    halves = [cast(fresh_adapter(base.model, settings.rank // 2, settings.rank, seed=s), dtype) for s in (0, 1)]
    return {
        PEFT: _peft_step(base, whole, batch, settings.lr),
        "gated, one trait": _gated_step(base, [whole], batch, settings.lr),
        "gated, two traits": _gated_step(base, halves, batch, settings.lr),
        "gated, replies only": _gated_step(base, [whole], batch, settings.lr, replies_only=True),
    }


def batch_of(model: nn.Module, settings: TrainSettings) -> Batch:
    ids = random_ids(model, settings.batch, settings.tokens)
    labels = ids.clone()
    labels[:, : settings.prompt] = IGNORED
    return Batch(ids, labels, settings.prompt)


def _peft_step(base: bases.Base, adapter: Adapter, batch: Batch, lr: float) -> Step:
    options: Any = {"is_trainable": True, "autocast_adapter_dtype": False}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder) / "adapter")
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(Path(folder) / "adapter"), **options)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return Step(parameters, lambda: model(input_ids=batch.ids, labels=batch.labels).loss, lr)


def _gated_step(base: bases.Base, adapters: list[Adapter], batch: Batch, lr: float, replies_only: bool = False) -> Step:
    own = replace(base, model=copy.deepcopy(base.model))
    model = GatedWarmthModel(own, dict(zip(TRAITS[: len(adapters)], adapters, strict=True)))
    model.requires_grad_(False)
    parameters = [p for layer in model.injection.layers.values() for p in (layer.a, layer.b)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    model.train()
    gates = torch.full((len(batch.ids), len(adapters)), 1 / len(adapters))
    loss = _reply_loss if replies_only else _loss
    return Step(parameters, lambda: loss(model, batch, gates), lr)


def _loss(model: GatedWarmthModel, batch: Batch, gates: Tensor) -> Tensor:
    return model(input_ids=batch.ids, labels=batch.labels, gates=gates).loss


def _reply_loss(model: GatedWarmthModel, batch: Batch, gates: Tensor) -> Tensor:
    head, tail = batch.ids[:, : batch.prompt], batch.ids[:, batch.prompt :]
    with torch.no_grad():
        cache = model(input_ids=head, use_cache=True, logits_to_keep=1).cache
    labels = batch.labels[:, batch.prompt :]
    return model(input_ids=tail, labels=labels, gates=gates, cache=cache, use_cache=True).loss
