"""What the tests of the op share: sizes, gate patterns, inputs, and forward and gradients of any path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gatedwarmth.kernels import gated_lora_reference

RANKS = ((3,), (4, 7), (0, 5), (16, 1, 6))
PATTERNS = ("zero", "one-hot", "half", "soft")
# Largest error over the largest value: a few roundings of the dtype, float32 sums of up to 200 terms.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Siblings = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Inputs:
    """Arguments of `gated_lora_siblings`."""

    x: Tensor
    a: list[Tensor]
    b: list[Tensor]
    gates: Tensor
    ranks: list[tuple[int, ...]]
    residuals: list[Tensor | None]


def gates_of(pattern: str, tokens: int, traits: int, generator: torch.Generator) -> Tensor:
    """[tokens, traits] float32 in [0, 1]."""
    if pattern == "zero":
        return torch.zeros(tokens, traits)
    if pattern == "half":
        return torch.full((tokens, traits), 0.5)
    if pattern == "one-hot":
        return torch.eye(traits)[torch.randint(traits, (tokens,), generator=generator)]
    return torch.rand(tokens, traits, generator=generator)


def make_inputs(
    tokens: int,
    width: int,
    outs: tuple[int, ...],
    ranks: tuple[int, ...],
    pattern: str = "soft",
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
) -> Inputs:
    """Random inputs of one size; siblings after the first have their ranks in reverse order."""
    rng = torch.Generator().manual_seed(tokens * 1000 + width)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    layer_ranks = [ranks if i == 0 else ranks[::-1] for i in range(len(outs))]
    total = sum(ranks)
    return Inputs(
        x=random(tokens, width),
        a=[random(total, width, scale=width**-0.5) for _ in outs],
        b=[random(out, total, scale=max(total, 1) ** -0.5) for out in outs],
        gates=gates_of(pattern, tokens, len(ranks), rng).to(dtype),
        ranks=layer_ranks,
        residuals=[random(tokens, out) if residual else None for out in outs],
    )


def reference(x, a, b, gates, ranks, residuals) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """`gated_lora_reference` for siblings."""
    layers = zip(a, b, ranks, residuals, strict=True)
    return tuple(gated_lora_reference(x, a_i, b_i, gates, r, y) for a_i, b_i, r, y in layers)


def run(path: Siblings, inputs: Inputs, *, gates_need_grad: bool = True) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and every gradient of a path, under a fixed random upstream gradient."""
    leaves = {"x": inputs.x, "gates": inputs.gates}
    leaves |= {f"a{i}": t for i, t in enumerate(inputs.a)} | {f"b{i}": t for i, t in enumerate(inputs.b)}
    leaves |= {f"residual{i}": t for i, t in enumerate(inputs.residuals) if t is not None}
    leaves = {k: t.detach().clone().requires_grad_(gates_need_grad or k != "gates") for k, t in leaves.items()}
    count = len(inputs.a)
    outputs = path(
        leaves["x"],
        [leaves[f"a{i}"] for i in range(count)],
        [leaves[f"b{i}"] for i in range(count)],
        leaves["gates"],
        inputs.ranks,
        [leaves.get(f"residual{i}") for i in range(count)],
    )
    rng = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=rng).to(y.dtype) for y in outputs]
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    if not any(y.requires_grad for y in outputs):
        return [y.detach() for y in outputs], {k: torch.zeros_like(t) for k, t in wanted.items()}
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted.values(), strict=True)]
    return [y.detach() for y in outputs], dict(zip(wanted, filled, strict=True))


def exact(inputs: Inputs) -> Inputs:
    """The same values in float64, for a reference without roundings of its own."""

    def wide(tensors: list[Tensor]) -> list[Tensor]:
        return [t.double() for t in tensors]

    residuals = [None if t is None else t.double() for t in inputs.residuals]
    doubled = replace(inputs, x=inputs.x.double(), gates=inputs.gates.double(), residuals=residuals)
    return replace(doubled, a=wide(inputs.a), b=wide(inputs.b))


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    """The largest error is small against the largest value, as the dtype of `got` allows."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    assert not got.isnan().any(), f"{name} has NaN: an element that was never written, or an overflow"
    if not want.numel():
        return
    error = (got.double() - want.double()).abs().max()
    bound = TOLERANCE[got.dtype] * want.double().abs().max().clamp_min(1.0)
    assert error <= bound, f"{name}: error {error:.2e} above {bound:.2e}"


def assert_matches_reference(path: Siblings, inputs: Inputs, *, gates_need_grad: bool = True) -> None:
    """Forward and every gradient of a path against the float64 reference on the same values."""
    outputs, grads = run(path, inputs, gates_need_grad=gates_need_grad)
    # Without residuals the reference has no shortcut for closed gates, so its gradients are those of the formula.
    wide = exact(inputs)
    bare = replace(wide, residuals=[None] * len(wide.residuals))
    want, want_grads = run(reference, bare, gates_need_grad=gates_need_grad)
    for i, (y, expected, residual) in enumerate(zip(outputs, want, wide.residuals, strict=True)):
        assert_close(f"y{i}", y, expected if residual is None else expected + residual)
    for name, grad in want_grads.items():
        assert_close(f"gradient of {name}", grads[name], grad)
