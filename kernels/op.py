"""`gated_lora` and `gated_lora_siblings`: check the arguments, choose a path, differentiate.

The rule: `GATEDWARMTH_KERNEL=reference|dense` forces a path; otherwise dense, which is two library matrix products
and the fastest exact form on CPUs and for long prefills.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from gatedwarmth.kernels.dense import gated_lora_siblings_dense
from gatedwarmth.kernels.reference import gated_lora_reference

PATHS = ("reference", "dense")


def chosen_path() -> str:
    """The path named by GATEDWARMTH_KERNEL, or "dense"."""
    name = os.environ.get("GATEDWARMTH_KERNEL", "dense")
    if name not in PATHS:
        raise ValueError(f"GATEDWARMTH_KERNEL is {name!r}; set it to one of {PATHS} or leave it unset")
    return name


def gated_lora(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None = None
) -> Tensor:
    """Add several LoRAs to `residual`, each weighed per token by its gate. Differentiable in x, a, b, gates, residual.

    x [tokens, in]; a [R, in]; b [out, R]; gates [tokens, traits], already times each trait's scaling; ranks: the rank
    of each trait in order, R = sum(ranks); residual [tokens, out] or None. Returns [tokens, out] in the dtype of x.
    All gates zero: the residual, bitwise. `gated_lora_reference` is the specification.

    Raises
    ------
    ValueError: shapes that do not fit together.
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
    if chosen_path() == "reference":
        layers = zip(a, b, ranks, residuals, strict=True)
        return tuple(gated_lora_reference(x, a_i, b_i, gates, r, y) for a_i, b_i, r, y in layers)
    if gates.device.type == "cpu" and not gates.requires_grad and not gates.any():
        layers = zip(b, residuals, strict=True)
        return tuple(x.new_zeros(x.shape[0], b_i.shape[0]) if y is None else y for b_i, y in layers)
    return gated_lora_siblings_dense(x, a, b, gates, ranks, residuals)


def check_shapes(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor, ranks: Sequence[int], residual: Tensor | None
) -> None:
    """Refuse shapes that do not fit `gated_lora`, naming them."""
    total, tokens = sum(ranks), x.shape[0]
    if x.dim() != 2 or a.shape != (total, x.shape[1]) or b.dim() != 2 or b.shape[1] != total:
        raise ValueError(
            f"gated_lora needs x [tokens, in], a [{total}, in], b [out, {total}] for ranks {list(ranks)}; "
            f"found x {list(x.shape)}, a {list(a.shape)}, b {list(b.shape)}"
        )
    if gates.shape != (tokens, len(ranks)):
        raise ValueError(f"gates must be [tokens, traits] = [{tokens}, {len(ranks)}], found {list(gates.shape)}")
    if residual is not None and residual.shape != (tokens, b.shape[0]):
        raise ValueError(f"residual must be [{tokens}, {b.shape[0]}], found {list(residual.shape)}")
