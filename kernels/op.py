"""`gated_lora` and `gated_lora_siblings`: check the arguments, choose a path, differentiate.

The rule, in this order:

1. `GATEDWARMTH_KERNEL=reference|dense|triton` forces a path (triton on CPU tensors only with TRITON_INTERPRET=1).
2. CPU, or no Triton installed: dense. Two library products; measured to be the fastest exact form on CPUs.
3. GPU, bfloat16 or float16: triton, for any number of tokens.
4. GPU, float32: triton up to 256 tokens, where launches are what costs; above, dense, because the library's float32
   products beat plain-core tiles.
5. GPU, any other dtype: dense.

Rules 3 to 5 come from reasoning: no GPU has run this yet.

Eager calls go straight to a path's autograd function. Only under torch.compile does the call become the custom op
`gatedwarmth::gated_lora_siblings`, one node without a graph break: called eagerly, the op costs about 0.05 ms more than
the function, and 0.25 ms more with gradients (one token, width 576, CPU), as much as the arithmetic or more. The
reference path has no custom op and breaks the graph.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gatedwarmth.kernels.dense import GatedLoraSiblings, gated_lora_siblings_dense
from gatedwarmth.kernels.reference import gated_lora_reference

PATHS = ("reference", "dense", "triton")
# Above this many tokens float32 goes to the library's products; few enough below that launches dominate.
FLOAT32_TRITON_TOKENS = 256


def chosen_path(x: Tensor) -> str:
    """The path that x takes: the one GATEDWARMTH_KERNEL names, else the module's rule.

    Raises
    ------
    ValueError: an unknown name, or triton where it cannot run.
    """
    name = os.environ.get("GATEDWARMTH_KERNEL")
    if name is None:
        return "dense" if x.device.type == "cpu" else _path_on_gpu(x)
    if name not in PATHS:
        raise ValueError(f"GATEDWARMTH_KERNEL is {name!r}; set it to one of {PATHS} or leave it unset")
    if name == "triton":
        _check_triton_runs(x)
    return name


def _path_on_gpu(x: Tensor) -> str:
    if x.device.type != "cuda" or not triton_installed():  # "cuda" is AMD's name too
        return "dense"
    if x.dtype in (torch.bfloat16, torch.float16):
        return "triton"
    return "triton" if x.dtype == torch.float32 and x.shape[0] <= FLOAT32_TRITON_TOKENS else "dense"


def _check_triton_runs(x: Tensor) -> None:
    if not triton_installed():
        raise ValueError("GATEDWARMTH_KERNEL is 'triton', which is not installed: pip install 'gatedwarmth[triton]'")
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "GATEDWARMTH_KERNEL is 'triton', but the tensors are on the CPU: move them to a GPU, unset the variable, "
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the triton path takes float32, bfloat16 or float16, found {x.dtype}")


@lru_cache(maxsize=1)
def triton_installed() -> bool:
    """Whether the `triton` package can be imported."""
    return find_spec("triton") is not None


def gated_lora(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """Add several LoRAs to `residual`, each weighed per token by its gate.

    Differentiable in x, a, b, gates and residual. `gated_lora_reference` is the specification.

    Parameters
    ----------
    x: [tokens, in]. a: [R, in]. b: [out, R]. residual: [tokens, out] or None.
    gates: [tokens, traits], already times each trait's scaling. With x on a GPU they may be on the CPU.
    ranks: the rank of each trait in order, R = sum(ranks).

    Returns
    -------
    [tokens, out] in the dtype of x. All gates zero: the residual, bitwise (and, where the gates are on the CPU and need
    no gradient, that very tensor, with nothing computed or launched).

    Raises
    ------
    ValueError: shapes that do not fit together, or a GATEDWARMTH_KERNEL that cannot be followed.
    """
    return gated_lora_siblings(x, [a], [b], gates, [ranks], [residual])[0]


def gated_lora_siblings(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    ranks: Sequence[Sequence[int]],
    residuals: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """`gated_lora` for layers that read one x (q/k/v, gate/up); one entry a layer in a, b, ranks, residuals."""
    for a_i, b_i, ranks_i, residual in zip(a, b, ranks, residuals, strict=True):
        check_shapes(x, a_i, b_i, gates, ranks_i, residual)
    path = chosen_path(x)
    if path == "reference":
        layers = zip(a, b, ranks, residuals, strict=True)
        return tuple(gated_lora_reference(x, a_i, b_i, gates, r, y) for a_i, b_i, r, y in layers)
    if torch.compiler.is_compiling():
        return _call_op(x, a, b, gates, ranks, residuals)
    if gates.device.type == "cpu":
        if not gates.requires_grad and not gates.any():
            pairs = zip(b, residuals, strict=True)
            return tuple(x.new_zeros(x.shape[0], b_i.shape[0]) if y is None else y for b_i, y in pairs)
        if x.device.type != "cpu":
            gates = gates.to(x.device, non_blocking=True)
    if path == "triton":
        from gatedwarmth.kernels.triton_ops import gated_lora_siblings_triton

        return gated_lora_siblings_triton(x, a, b, gates, ranks, residuals)
    return gated_lora_siblings_dense(x, a, b, gates, ranks, residuals)


def check_shapes(x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None) -> None:
    """Refuse shapes that do not fit `gated_lora`, naming them."""
    total, tokens = sum(ranks), x.shape[0]
    if x.dim() != 2 or a.shape != (total, x.shape[1]) or b.dim() != 2 or b.shape[1] != total:
        raise ValueError(
            f"gated_lora needs x [tokens, in], a [{total}, in], b [out, {total}] for ranks {list(ranks)}; "
            f"found x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)}"
        )
    if gates.shape != (tokens, len(ranks)):
        expected = f"[{tokens}, {len(ranks)}]"
        raise ValueError(f"gates must be [tokens, traits] = {expected}, found {list(gates.shape)}")
    if residual is not None and residual.shape != (tokens, b.shape[0]):
        raise ValueError(f"residual must be [{tokens}, {b.shape[0]}], found {list(residual.shape)}")


# The custom op, for torch.compile. `need` is whether x, gates, any a, any b want a gradient. A list with None in it
# gets no gradients from torch.library, so `residuals` holds the tensors and `has_residual` says whose they are.


class Saved:
    """What a path's autograd function expects of its context, as a plain object."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor, ...] = ()
        self.ranks: tuple[tuple[int, ...], ...] = ()
        self.has_residual: list[bool] = []

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


def _call_op(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    ranks: Sequence[Sequence[int]],
    residuals: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    grad = torch.is_grad_enabled()
    wanted = (
        x.requires_grad,
        gates.requires_grad,
        any(t.requires_grad for t in a),
        any(t.requires_grad for t in b),
    )
    flat = [r for layer in ranks for r in layer]
    op = torch.ops.gatedwarmth.gated_lora_siblings
    has = [y is not None for y in residuals]
    present = [y for y in residuals if y is not None]
    need = [grad and w for w in wanted]
    outputs = op(x, list(a), list(b), gates.to(x.device), flat, present, has, need)
    return tuple(outputs[:-1])


def _function(x: Tensor) -> type[torch.autograd.Function]:
    if chosen_path(x) != "triton":
        return GatedLoraSiblings
    from gatedwarmth.kernels import triton_ops

    return triton_ops.GatedLoraSiblings


def _needs(need: Sequence[bool], count: int) -> tuple[bool, ...]:
    x, gates, a, b = need
    return (x, gates, False, *[a] * count, *[b] * count, *[False] * count)


def _layer_ranks(flat: Sequence[int], count: int) -> tuple[tuple[int, ...], ...]:
    traits = len(flat) // count
    return tuple(tuple(flat[i * traits : (i + 1) * traits]) for i in range(count))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op(
    "gatedwarmth::gated_lora_siblings",
    mutates_args=(),
    schema="(Tensor x, Tensor[] a, Tensor[] b, Tensor gates, int[] ranks, Tensor[] residuals, bool[] has_residual, "
    "bool[] need) -> Tensor[]",
)
def _op(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    gates: Tensor,
    ranks: list[int],
    residuals: list[Tensor],
    has_residual: list[bool],
    need: list[bool],
) -> list[Tensor]:
    """One output a layer, then the unscaled shrink for the backward pass (empty where `need` is all False)."""
    count = len(a)
    saved = Saved(_needs(need, count))
    present = iter(residuals)
    every = [next(present) if has else None for has in has_residual]
    outputs = _function(x).forward(saved, x, gates, _layer_ranks(ranks, count), *a, *b, *every)
    shrunk = saved.saved_tensors[2].to(_wide(x.dtype)) if any(need) else x.new_empty(0, dtype=_wide(x.dtype))
    return [*outputs, shrunk]


@_op.register_fake
def _op_fake(
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    gates: Tensor,
    ranks: list[int],
    residuals: list[Tensor],
    has_residual: list[bool],
    need: list[bool],
) -> list[Tensor]:
    shape = (x.shape[0], sum(ranks)) if any(need) else (0,)
    outputs = [x.new_empty(x.shape[0], b_i.shape[0]) for b_i in b]
    return [*outputs, x.new_empty(shape, dtype=_wide(x.dtype))]


@torch.library.custom_op(
    "gatedwarmth::gated_lora_siblings_backward",
    mutates_args=(),
    schema="(Tensor[] dy, Tensor x, Tensor[] a, Tensor[] b, Tensor gates, Tensor shrunk, int[] ranks, bool[] need) "
    "-> Tensor[]",
)
def _backward_op(
    dy: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    gates: Tensor,
    shrunk: Tensor,
    ranks: list[int],
    need: list[bool],
) -> list[Tensor]:
    """The gradients of x, gates, every a, every b; empty where `need` is False."""
    count = len(a)
    function = _function(x)
    saved = Saved(_needs(need, count))
    saved.ranks, saved.has_residual = _layer_ranks(ranks, count), [False] * count
    saved.save_for_backward(x, gates, shrunk.to(x.dtype) if function is GatedLoraSiblings else shrunk, *a, *b)
    grad_x, grad_gates, _, *grads = function.backward(saved, *dy)
    flags = [need[0], need[1], *[need[2]] * count, *[need[3]] * count]
    found = [grad_x, grad_gates, *grads[: 2 * count]]
    # An op's outputs may not share memory, and the parts of a split do.
    return [g.clone() if wanted else x.new_empty(0) for g, wanted in zip(found, flags, strict=True)]


@_backward_op.register_fake
def _backward_fake(
    dy: list[Tensor],
    x: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    gates: Tensor,
    shrunk: Tensor,
    ranks: list[int],
    need: list[bool],
) -> list[Tensor]:
    flags = [need[0], need[1], *[need[2]] * len(a), *[need[3]] * len(b)]
    inputs = zip((x, gates, *a, *b), flags, strict=True)
    return [t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in inputs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, a, b, gates, ranks, _, has_residual, need = inputs
    ctx.save_for_backward(x, gates, output[-1], *a, *b)
    ctx.ranks, ctx.need, ctx.count = ranks, need, len(a)
    ctx.has_residual = has_residual


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, gates, shrunk, *layers = ctx.saved_tensors
    count, dy = ctx.count, list(grads[:-1])
    grad_residuals = [d for d, has in zip(dy, ctx.has_residual, strict=True) if has]
    if not any(ctx.need):
        return None, [None] * count, [None] * count, None, None, grad_residuals, None, None
    op = torch.ops.gatedwarmth.gated_lora_siblings_backward
    found = op(dy, x, layers[:count], layers[count:], gates, shrunk, ctx.ranks, ctx.need)
    need_x, need_gates, need_a, need_b = ctx.need
    return (
        found[0] if need_x else None,
        found[2 : 2 + count] if need_a else [None] * count,
        found[2 + count :] if need_b else [None] * count,
        found[1] if need_gates else None,
        None,
        grad_residuals,
        None,
        None,
    )


_op.register_autograd(_backward, setup_context=_save)
