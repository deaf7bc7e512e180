"""The gated-LoRA op on Triton: launches of `triton_kernels`, and their autograd function.

None of this has been run on a GPU yet. It is checked in Triton's interpreter against `reference` and compiled ahead of
time (`aot`); speeds are unknown.

Few tokens: two launches, a shrink in partial sums and one expand for all siblings that adds the sums up and gates them.
Many: a shrink that gates in its epilogue, and the expand. Nothing is read back to the host, so the launches can be
captured in a CUDA graph (after one warm-up call, which compiles and uploads the trait of each rank column).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from gatedwarmth.kernels.tiles import Tile, launch_options, tile_for
from gatedwarmth.kernels.triton_kernels import (
    expand_kernel,
    grad_shrunk_kernel,
    grad_weight_kernel,
    shrink_kernel,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ranks = tuple[tuple[int, ...], ...]


class GatedLoraSiblings(torch.autograd.Function):
    """Autograd of `gated_lora_siblings_triton`; the equations are those of `dense.GatedLoraSiblings`.

    Saves x, gates, the unscaled shrink (float32), a and b.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, ranks: Ranks, *layers: Tensor | None) -> tuple[Tensor, ...]:
        count = len(ranks)
        need_x, need_gates, _, *need_layers = ctx.needs_input_grad
        save = need_x or need_gates or any(need_layers[: 2 * count])
        outputs, shrunk = run_forward(x, gates, ranks, layers, save=save, skip=not need_gates)
        ctx.save_for_backward(x, gates, shrunk, *layers[: 2 * count])
        ctx.ranks, ctx.has_residual = ranks, [residual is not None for residual in layers[2 * count :]]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        x, gates, shrunk, *layers = ctx.saved_tensors
        ranks, count = ctx.ranks, len(ctx.ranks)
        need_x, need_gates, _, *need = ctx.needs_input_grad
        grad_residual = [
            dy if has and wanted else None
            for dy, has, wanted in zip(grad_outputs, ctx.has_residual, need[2 * count :], strict=True)
        ]
        need_a, need_b = any(need[:count]), any(need[count : 2 * count])
        if not (need_x or need_gates or need_a or need_b):
            return (None, None, None, *[None] * (2 * count), *grad_residual)
        dy = [grad.contiguous() for grad in grad_outputs]
        stacked = stack_rows(layers[:count])
        grad_scaled, grad_gates = grad_shrunk(dy, layers[count:], shrunk, gates, ranks, need_gates)
        grad_x = grad_a = None
        if need_x:
            grad_x = expand(grad_scaled, gates, [stacked.T], [None], ranks, 1, together=True)[0].to(x.dtype)
        if need_a:
            grad_a = grad_weight(grad_scaled, [x], gates, ranks, together=True)[0]
        grad_b: Sequence[Tensor | None] = [None] * count
        if need_b:
            grad_b = grad_weight(shrunk, dy, gates, ranks, together=False)
        parts = [None] * count if grad_a is None else grad_a.split([sum(r) for r in ranks])
        return (grad_x, grad_gates, None, *parts, *grad_b, *grad_residual)


def gated_lora_siblings_triton(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    ranks: Sequence[Sequence[int]],
    residuals: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """`dense.gated_lora_siblings_dense` on Triton; same arguments, same gradients. x, a, b: one dtype of DTYPES.

    With all gates zero the kernels copy the residual bit for bit and load nothing else; only op.py, where the gates are
    on the host, can avoid the launch.
    """
    return GatedLoraSiblings.apply(x, gates, tuple(tuple(r) for r in ranks), *a, *b, *residuals)


def gated_lora_triton(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """`gated_lora_reference` on Triton; same arguments, gradients for x, a, b, gates, residual."""
    return gated_lora_siblings_triton(x, [a], [b], gates, [ranks], [residual])[0]


def run_forward(
    x: Tensor, gates: Tensor, ranks: Ranks, layers: Sequence[Tensor | None], *, save: bool, skip: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The outputs, and with `save` the unscaled shrink [tokens, R] float32 (closed columns 0 with `skip`)."""
    count = len(ranks)
    a: list[Any] = list(layers[:count])
    b: list[Any] = list(layers[count : 2 * count])
    raw, scaled, split = shrink(x, stack_rows(a), gates, ranks, save=save, skip=skip)
    outputs = expand(raw if scaled is None else scaled, gates, b, layers[2 * count :], ranks, split, x.dtype)
    if not save:
        return outputs, None
    return outputs, raw[0] if split == 1 else raw.sum(0)  # type: ignore[index,union-attr]


def shrink(
    x: Tensor, a: Tensor, gates: Tensor, ranks: Ranks, *, save: bool, skip: bool, tile: Tile | None = None
) -> tuple[Tensor | None, Tensor | None, int]:
    """x·Aᵀ for all siblings at once: (raw [split, tokens, R] float32, scaled [tokens, R], split).

    scaled is None where the sum is split; raw is None where it is neither split nor to be saved.
    """
    tokens, width = x.shape
    rank = a.shape[0]
    tile = tile or tile_for("shrink", tokens, width, rank, x.dtype)
    split = tile.split
    raw = x.new_empty(split, tokens, rank, dtype=torch.float32) if save or split > 1 else None
    scaled = x.new_empty(tokens, rank) if split == 1 else None
    if tokens and rank:
        grid = (triton.cdiv(tokens, tile.tokens), triton.cdiv(rank, tile.rank), split)
        shrink_kernel[grid](
            x,
            a,
            gates,
            trait_of_column(ranks, x.device),
            raw,
            scaled,
            tokens,
            width,
            rank,
            *x.stride(),
            *gates.stride(),
            SKIP=skip,
            STORE_RAW=raw is not None,
            STORE_SCALED=scaled is not None,
            SPLIT=split,
            **blocks("shrink", tile),
        )
    return raw, scaled, split


def expand(
    s: Tensor | None,
    gates: Tensor,
    b: Sequence[Tensor],
    residuals: Sequence[Tensor | None],
    ranks: Ranks,
    split: int,
    dtype: torch.dtype | None = None,
    *,
    together: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, ...]:
    """residual_i + S_i·B_iᵀ for every sibling, in one launch.

    s: scaled [tokens, R] (split 1) or raw partial sums [split, tokens, R], gated here. Each b [out, R_i] may have any
    strides. dtype of the outputs: that of s unless given. together: one b [out, R] takes the columns of all siblings.
    """
    assert s is not None
    tokens, rank = s.shape[-2:]
    widths = tuple(w.shape[0] for w in b)
    ys = tuple(s.new_empty(tokens, width, dtype=dtype or s.dtype) for width in widths)
    if not tokens:
        return ys
    tile = tile or tile_for("expand", tokens, max(widths), widest(offsets_of(ranks, together)), ys[0].dtype)
    rows = [None if y is None else _unit_columns(y) for y in residuals]
    grid = (sum(triton.cdiv(width, tile.width) for width in widths), triton.cdiv(tokens, tile.tokens))
    traits = gates.shape[1]
    expand_kernel[grid](
        s,
        gates,
        starts_of_traits(ranks, s.device),
        tuple(b),
        tuple(rows),
        ys,
        widths,
        tokens,
        rank,
        traits,
        traits * len(ranks) if together else traits,
        tuple(w.stride(0) for w in b),
        tuple(w.stride(1) for w in b),
        tuple(0 if y is None else y.stride(0) for y in rows),
        *gates.stride(),
        LAYERS=len(b),
        ALIGN=alignment(ranks),
        SPLIT=split,
        **blocks("expand", tile),
    )
    return ys


def grad_shrunk(
    dy: Sequence[Tensor],
    b: Sequence[Tensor],
    raw: Tensor,
    gates: Tensor,
    ranks: Ranks,
    need_gates: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(gate ∘ dS [tokens, R] in the dtype of dy, the gates' gradient or None), with dS = dY·B."""
    tokens, rank = raw.shape
    traits = gates.shape[1]
    widths = tuple(d.shape[1] for d in dy)
    grad_scaled = dy[0].new_empty(tokens, rank)
    if not (tokens and rank):
        return grad_scaled, torch.zeros_like(gates) if need_gates else None
    offsets = offsets_of(ranks)
    tile = tile or tile_for("grad_shrunk", tokens, max(widths), widest(offsets), dy[0].dtype)
    count = sum(triton.cdiv(sum(r), tile.rank) for r in ranks)
    partial = raw.new_empty(count, tokens, traits) if need_gates else None
    grad_shrunk_kernel[(triton.cdiv(tokens, tile.tokens), count)](
        tuple(dy),
        tuple(w.contiguous() for w in b),
        raw,
        gates,
        trait_of_column(ranks, raw.device),
        grad_scaled,
        partial,
        offsets,
        widths,
        tokens,
        rank,
        *gates.stride(),
        LAYERS=len(ranks),
        TRAITS=traits,
        SKIP=not need_gates,
        **blocks("grad_shrunk", tile),
    )
    return grad_scaled, None if partial is None else partial.sum(0).to(gates.dtype)


def grad_weight(
    s: Tensor, z: Sequence[Tensor], gates: Tensor, ranks: Ranks, *, together: bool, tile: Tile | None = None
) -> list[Tensor]:
    """Σ over tokens of S_iᵀ·Z_i, in sums over ranges of tokens that are added in a fixed order.

    together: dA [R, in] of all siblings from s = gate ∘ dS and z = [x]. Otherwise dB [out_i, R_i] of each from the raw
    shrink, gated in the kernel, and its dY.
    """
    tokens, rank = s.shape
    offsets, scale = offsets_of(ranks, together), not together
    layer_ranks = [end - begin for begin, end in pairwise(offsets)]
    widths = tuple(part.shape[1] for part in z)
    shapes = [(w, r) if scale else (r, w) for w, r in zip(widths, layer_ranks, strict=True)]
    if not (tokens and rank):
        return [part.new_zeros(shape) for part, shape in zip(z, shapes, strict=True)]
    tile = tile or tile_for("grad_weight", tokens, max(widths), widest(offsets), z[0].dtype)
    dtype = z[0].dtype if tile.split == 1 else torch.float32
    outs = tuple(part.new_empty(tile.split, *shape, dtype=dtype) for part, shape in zip(z, shapes, strict=True))
    tiles = [triton.cdiv(r, tile.rank) * triton.cdiv(w, tile.width) for r, w in zip(layer_ranks, widths, strict=True)]
    row, column = (2, 1) if scale else (1, 2)
    grad_weight_kernel[(sum(tiles), tile.split)](
        s,
        tuple(z),
        gates,
        trait_of_column(ranks, s.device),
        outs,
        offsets,
        widths,
        tokens,
        rank,
        tuple(part.stride(0) for part in z),
        tuple(part.stride(1) for part in z),
        tuple(out.stride(row) for out in outs),
        tuple(out.stride(column) for out in outs),
        *gates.stride(),
        LAYERS=len(z),
        SCALE=scale,
        SPLIT=tile.split,
        **blocks("grad_weight", tile),
    )
    return [out[0] if tile.split == 1 else out.sum(0).to(z[0].dtype) for out in outs]


def blocks(kernel: str, tile: Tile) -> dict[str, int]:
    """A tile as a kernel's keyword arguments."""
    edges = {"BLOCK_T": tile.tokens, "BLOCK_R": tile.rank, "BLOCK_W": tile.width}
    return edges | launch_options(kernel, tile, amd=torch.version.hip is not None)


def stack_rows(parts: Sequence[Tensor]) -> Tensor:
    """[R, in] from the siblings' a; a view where they already lie one after the other, otherwise a copy."""
    first = parts[0]
    if len(parts) == 1:
        return first.contiguous()
    at = first.data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != at or not _same_storage(part, first):
            return torch.cat(list(parts))
        at += part.numel() * part.element_size()
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (first.shape[1], 1))


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _unit_columns(y: Tensor) -> Tensor:
    return y if y.stride(1) == 1 else y.contiguous()


def offsets_of(ranks: Ranks, together: bool = False) -> tuple[int, ...]:
    """Where each layer's rank columns begin, and the total; together: all siblings' columns as one layer's."""
    offsets = tuple(accumulate((sum(r) for r in ranks), initial=0))
    return (0, offsets[-1]) if together else offsets


def widest(offsets: tuple[int, ...]) -> int:
    """The most rank columns that one layer has."""
    return max(end - begin for begin, end in pairwise(offsets))


@lru_cache(maxsize=256)
def trait_of_column(ranks: Ranks, device: torch.device) -> Tensor:
    """[R] int32: the trait of every rank column."""
    owners = [trait for layer in ranks for trait, rank in enumerate(layer) for _ in range(rank)]
    return torch.tensor(owners, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def starts_of_traits(ranks: Ranks, device: torch.device) -> Tensor:
    """[layers · traits + 1] int32: where the columns of every trait of every layer begin, then their total."""
    starts = list(accumulate((rank for layer in ranks for rank in layer), initial=0))
    return torch.tensor(starts, dtype=torch.int32, device=device)


def alignment(ranks: Ranks) -> int:
    """The largest power of two up to 16 that divides every rank."""
    return gcd(16, *(rank for layer in ranks for rank in layer))
