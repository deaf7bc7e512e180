"""The gated-LoRA op as two library products over the concatenated rank, for CPUs and for prefill.

`gated_lora_siblings` serves layers that read one input (q/k/v, gate/up): they shrink it once together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gate_columns(gates: Tensor, ranks: Sequence[int]) -> Tensor:
    """[..., traits] → [..., R]: every trait's gate once for each of its rank columns."""
    if len(ranks) == 1:
        return gates.expand(*gates.shape[:-1], ranks[0])
    counts = torch.tensor(ranks, device=gates.device)
    return gates.repeat_interleave(counts, dim=-1, output_size=sum(ranks))


def sum_columns(columns: Tensor, ranks: Sequence[int]) -> Tensor:
    """[tokens, R] → [tokens, traits]: the transpose of `gate_columns`."""
    return torch.stack([part.sum(-1) for part in columns.split(list(ranks), dim=-1)], dim=-1)


class GatedLoraSiblings(torch.autograd.Function):
    """Autograd of `gated_lora_siblings`; saves the unscaled shrink and no other intermediate.

    With S = x·Aᵀ and c the gate of each rank column: dS = dY·B, dgate = Σ_rank dS∘S, dA = (c∘dS)ᵀ·x,
    dB = dYᵀ·(c∘S), dx = (c∘dS)·A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, ranks: tuple[tuple[int, ...], ...], *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        count = len(ranks)
        a_parts, bs, residuals = layers[:count], layers[count : 2 * count], layers[2 * count :]
        a = torch.cat(a_parts) if count > 1 else a_parts[0]  # type: ignore[arg-type]
        columns = torch.cat([gate_columns(gates, r) for r in ranks], dim=-1).to(x.dtype)
        shrunk = x @ a.T  # type: ignore[union-attr]
        scaled = (shrunk * columns).split([sum(r) for r in ranks], dim=-1)
        ctx.save_for_backward(x, gates, shrunk, *a_parts, *bs)
        ctx.ranks, ctx.has_residual = ranks, [residual is not None for residual in residuals]
        return tuple(
            s @ b.T if residual is None else torch.addmm(residual, s, b.T)  # type: ignore[union-attr]
            for s, b, residual in zip(scaled, bs, residuals, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        x, gates, shrunk, *layers = ctx.saved_tensors
        ranks, count = ctx.ranks, len(ctx.ranks)
        a_parts, bs = layers[:count], layers[count:]
        widths = [sum(r) for r in ranks]
        columns = torch.cat([gate_columns(gates, r) for r in ranks], dim=-1).to(x.dtype)
        grad_shrunk = torch.cat([dy @ b for dy, b in zip(grad_outputs, bs, strict=True)], dim=-1)
        grad_gates = _grad_gates(grad_shrunk * shrunk, ranks, gates) if ctx.needs_input_grad[1] else None
        grad_scaled = grad_shrunk * columns
        need = ctx.needs_input_grad[3:]
        grad_x = grad_scaled @ torch.cat(a_parts) if ctx.needs_input_grad[0] else None
        grad_a: tuple[Any, ...] = (None,) * count
        if any(need[:count]):
            grad_a = (grad_scaled.T @ x).split(widths)
        grad_b: list[Any] = [None] * count
        if any(need[count : 2 * count]):
            scaled = (shrunk * columns).split(widths, dim=-1)
            grad_b = [dy.T @ s for dy, s in zip(grad_outputs, scaled, strict=True)]
        grad_residual = [
            dy if has and wanted else None
            for dy, has, wanted in zip(grad_outputs, ctx.has_residual, need[2 * count :], strict=True)
        ]
        return (grad_x, grad_gates, None, *grad_a, *grad_b, *grad_residual)


def _grad_gates(product: Tensor, ranks: tuple[tuple[int, ...], ...], gates: Tensor) -> Tensor:
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    parts = wide.split([sum(r) for r in ranks], dim=-1)
    return sum(sum_columns(part, r) for part, r in zip(parts, ranks, strict=True)).to(gates.dtype)  # type: ignore[union-attr]


def gated_lora_siblings_dense(
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    ranks: Sequence[Sequence[int]],
    residuals: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """`gated_lora` for layers that read one x: one shrink over all their ranks, one expand each.

    x [tokens, in]; a, b, ranks, residuals: one entry a layer, shaped as in `gated_lora_reference`; gates [tokens,
    traits], scaling included, shared by all layers. Returns one [tokens, out_i] a layer.
    """
    return GatedLoraSiblings.apply(x, gates, tuple(tuple(r) for r in ranks), *a, *b, *residuals)


def gated_lora_dense(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """`gated_lora_reference` by two products of rank R; same arguments, gradients for x, a, b, gates, residual."""
    return gated_lora_siblings_dense(x, [a], [b], gates, [ranks], [residual])[0]
