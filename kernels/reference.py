"""The gated-LoRA op in plain torch: the specification that every other path is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_lora_reference(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """Add several LoRAs to a linear layer's output, each weighed per token by its gate.

        y[t] = residual[t] + sum_e gates[t, e] * (x[t] @ A_e.T) @ B_e.T

    Parameters
    ----------
    x: [tokens, in], float32, bfloat16, float16 or float64.
    a: [R, in]; the rows of trait e are its lora_A, R = sum(ranks).
    b: [out, R]; the columns of trait e are its lora_B.
    gates: [tokens, traits], already times each trait's scaling (alpha / rank).
    ranks: the rank of each trait in order; 0 where a trait leaves this layer alone.
    residual: [tokens, out], the base layer's output, or None for zeros.

    Returns
    -------
    [tokens, out] in the dtype of x; sums are taken in float32 or wider. With all gates zero the residual, bitwise.

    Source: LoRA (arXiv:2106.09685), its sum over adapters written as one product of rank R.
    """
    if residual is not None and not gates.any():
        return residual
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape[0], b.shape[0], dtype=wide, device=x.device)
    if residual is not None:
        y = y + residual.to(wide)
    for trait, (a_e, b_e) in enumerate(zip(a.split(list(ranks)), b.split(list(ranks), dim=1), strict=True)):
        shrunk = x.to(wide) @ a_e.to(wide).T
        y = y + gates[:, trait, None].to(wide) * (shrunk @ b_e.to(wide).T)
    return y.to(x.dtype)
