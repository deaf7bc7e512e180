"""The op against what it replaces: the bare linear, PEFT's loop over adapters, Arrow's products over all experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedwarmth.kernels.bench.measure import Clock, Contender, Measured, clock_for, describe_error, measure
from gatedwarmth.kernels.bench.memory import peak_bytes
from gatedwarmth.kernels.bench.shapes import OpShape
from gatedwarmth.kernels.dense import gated_lora_dense
from gatedwarmth.kernels.op import gated_lora, triton_installed
from gatedwarmth.kernels.reference import gated_lora_reference

LINEAR = "linear"
# How far a path may be from the reference, in units of the reference's largest value; rounding stays far below.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class OpSettings:
    """runs: rounds a shape. shortest: seconds that a measurement lasts at least. peaks: measure memory too."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    runs: int = 9
    shortest: float = 0.01
    peaks: bool = True


@dataclass(frozen=True)
class Operands:
    """x [tokens, in]; w [out, in]; a [R, in]; b [out, R]; gates [tokens, traits]; every trait has rank `rank`."""

    x: Tensor
    w: Tensor
    a: Tensor
    b: Tensor
    gates: Tensor
    ranks: tuple[int, ...]


def linear(o: Operands) -> Tensor:
    """The base layer alone: what all ratios are to."""
    return F.linear(o.x, o.w)


def reference(o: Operands) -> Tensor:
    return gated_lora_reference(o.x, o.a, o.b, o.gates, o.ranks, F.linear(o.x, o.w))


def dense(o: Operands) -> Tensor:
    return gated_lora_dense(o.x, o.a, o.b, o.gates, o.ranks, F.linear(o.x, o.w))


def dispatched(o: Operands) -> Tensor:
    """What `gated_lora` chooses for these tensors."""
    return gated_lora(o.x, o.a, o.b, o.gates, o.ranks, F.linear(o.x, o.w))


def triton(o: Operands) -> Tensor:
    from gatedwarmth.kernels.triton_ops import gated_lora_siblings_triton

    return gated_lora_siblings_triton(o.x, [o.a], [o.b], o.gates, [o.ranks], [F.linear(o.x, o.w)])[0]


def loop(o: Operands) -> Tensor:
    """As PEFT's LoRA layer runs its active adapters: two products and an addition each."""
    y = F.linear(o.x, o.w)
    for trait, (a, b) in enumerate(zip(o.a.split(o.ranks), o.b.split(o.ranks, dim=1), strict=True)):
        y = y + F.linear(F.linear(o.x, a), b) * o.gates[:, trait, None]
    return y


def einsum(o: Operands) -> Tensor:
    """As PEFT's Arrow: weights restacked each time, every expert's output [tokens, traits, out] written out."""
    a = torch.stack(o.a.split(o.ranks))
    b = torch.stack(o.b.split(o.ranks, dim=1))
    experts = torch.einsum("ter,eor->teo", torch.einsum("tf,erf->ter", o.x, a), b)
    return F.linear(o.x, o.w) + torch.einsum("te,teo->to", o.gates, experts)


OPS: Mapping[str, Callable[[Operands], Tensor]] = MappingProxyType(
    {
        LINEAR: linear,
        "reference": reference,
        "dense": dense,
        "gated_lora": dispatched,
        "loop": loop,
        "einsum": einsum,
        "triton": triton,
    }
)


def operands(shape: OpShape, settings: OpSettings) -> Operands:
    """Random operands, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    total = shape.rank * shape.traits

    def normal(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / columns**0.5
        return values.to(settings.device, settings.dtype)

    x, w = normal(shape.tokens, shape.width), normal(shape.out, shape.width)
    a, b = normal(total, shape.width), normal(shape.out, total)
    gates = pattern(shape.gates, shape.tokens, shape.traits).to(settings.device, settings.dtype)
    return Operands(x, w, a, b, gates, (shape.rank,) * shape.traits)


def pattern(name: str, tokens: int, traits: int) -> Tensor:
    """float32 gates [tokens, traits] of a name of PATTERNS; "half" shares 1 evenly between the traits."""
    if name == "zero":
        return torch.zeros(tokens, traits)
    if name == "half":
        return torch.full((tokens, traits), 1 / traits)
    if name == "one-hot":
        return torch.eye(traits)[torch.arange(tokens) % traits]
    return torch.rand(tokens, traits, generator=torch.Generator().manual_seed(1))


def contenders_on(device: str) -> tuple[str, ...]:
    """Names of OPS that run on a device: Triton's kernels need a GPU."""
    gpu = torch.device(device).type == "cuda" and triton_installed()
    return tuple(name for name in OPS if name != "triton" or gpu)


@torch.no_grad()
def measure_op(shape: OpShape, settings: OpSettings, clock: Clock | None = None) -> Iterator[Measured]:
    """A row a contender, ratios to the bare linear; one that computes something else gives an error instead."""
    given = operands(shape, settings)
    names = contenders_on(settings.device)
    wrong = {name: problem for name in names if name != LINEAR and (problem := _problem(name, given))}
    contenders = [Contender(name, _call(name, given)) for name in names if name not in wrong]
    clock = clock or clock_for(settings.device)
    rows = measure(shape.name, contenders, LINEAR, settings.runs, clock, shortest=settings.shortest)
    base = peak_bytes(contenders[0].run, settings.device) if settings.peaks else 0
    for contender, row in zip(contenders, rows, strict=True):
        if settings.peaks and not row.error:
            row = dataclasses.replace(row, peak=peak_bytes(contender.run, settings.device) - base)
        yield row
    for name, problem in wrong.items():
        yield Measured(shape.name, name, baseline=LINEAR, error=problem)


def _call(name: str, given: Operands) -> Callable[[], Tensor]:
    return lambda: OPS[name](given)


def _problem(name: str, given: Operands) -> str:
    """Why a contender's output cannot be compared, "" where it equals the reference's."""
    wanted = reference(given).float()
    try:
        found = OPS[name](given).float()
    except Exception as error:  # it belongs in the table
        return describe_error(error)
    far = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    limit = TOLERANCE[given.x.dtype]
    return "" if far <= limit else f"differs from the reference by {far:.2g} of its largest value, {limit:g} at most"
