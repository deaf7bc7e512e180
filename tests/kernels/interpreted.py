"""The Triton path in Triton's interpreter; `test_triton.py` runs this file in a process with TRITON_INTERPRET=1.

Triton decides when it is imported whether it interprets, so these cannot share a process with the tests that compile.
bfloat16 is left out: the interpreter's tl.dot multiplies bfloat16 as the integers that hold its bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from lora_cases import PATTERNS, RANKS, assert_matches_reference, make_inputs, run
from torch.utils._pytree import tree_leaves

from gatedwarmth.kernels import gated_lora, triton_ops
from gatedwarmth.kernels.tiles import KERNELS, Tile, load_table
from gatedwarmth.kernels.triton_ops import gated_lora_siblings_triton, stack_rows
from gatedwarmth.kernels.tune import timed_call

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_triton.py, or set TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def nan_buffers() -> Iterator[None]:
    """torch.empty gives NaN, so that an element which no kernel wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_siblings_forward_and_gradients(ranks: tuple[int, ...], pattern: str) -> None:
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(17, 65, (48, 70), ranks, pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_float16(pattern: str) -> None:
    inputs = make_inputs(3, 48, (65, 48), (16, 1, 6), pattern, torch.float16)
    assert_matches_reference(gated_lora_siblings_triton, inputs)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gates_without_gradient_let_closed_columns_be_skipped(pattern: str) -> None:
    inputs = make_inputs(17, 48, (65, 48), (16, 1, 6), pattern)
    assert_matches_reference(gated_lora_siblings_triton, inputs, gates_need_grad=False)


@pytest.mark.parametrize("tokens, width, out", [(1, 200, 65), (3, 48, 200), (63, 65, 48), (130, 48, 65)])
def test_odd_sizes(tokens: int, width: int, out: int) -> None:
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(tokens, width, (out,), (4, 7), "one-hot"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 3, 17, 63, 130, 300])
@pytest.mark.parametrize("width", [48, 65, 200])
def test_all_sizes(tokens: int, width: int, pattern: str, dtype: torch.dtype) -> None:
    for ranks in RANKS:
        for residual in (True, False):
            inputs = make_inputs(tokens, width, (65, 200, 48), ranks, pattern, dtype, residual)
            assert_matches_reference(gated_lora_siblings_triton, inputs)


def test_no_residual_and_no_tokens() -> None:
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(5, 48, (48,), (4, 7), residual=False))
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(0, 48, (48,), (4, 7)))
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(5, 48, (48,), (0, 0)))


@pytest.mark.parametrize("layout", ["rows apart", "transposed", "columns apart"])
def test_strided(layout: str) -> None:
    inputs = make_inputs(9, 48, (65,), (4, 7))
    outputs, _ = run(gated_lora_siblings_triton, inputs)

    def spread(t: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return t.T.contiguous().T
        wide = t.new_full((t.shape[0], 2 * t.shape[1]), float("nan"))
        view = wide[:, : t.shape[1]] if layout == "rows apart" else wide[:, ::2]
        return view.copy_(t)

    strided = replace(inputs, x=spread(inputs.x), gates=spread(inputs.gates), residuals=[spread(inputs.residuals[0])])
    got = gated_lora_siblings_triton(strided.x, strided.a, strided.b, strided.gates, strided.ranks, strided.residuals)
    torch.testing.assert_close(got[0], outputs[0], rtol=0, atol=0)
    tracked = strided.x.detach().requires_grad_()
    y = gated_lora_siblings_triton(tracked, strided.a, strided.b, strided.gates, strided.ranks, [None])
    y[0].sum().backward()  # an expanded upstream gradient, strides 0
    assert tracked.grad is not None and not tracked.grad.isnan().any()


def test_closed_gates_leave_the_residual_bitwise_and_load_nothing() -> None:
    """x, a and b are NaN: had anything been loaded for a closed gate, the output would show it."""
    inputs = make_inputs(20, 48, (65,), (4, 7), "zero", torch.float16)
    inputs.residuals[0][0, :4] = torch.tensor([-0.0, 6e-8, 65504.0, float("inf")])  # type: ignore[index]
    for t in (inputs.x, *inputs.a, *inputs.b):
        t.fill_(float("nan"))
    (y,) = gated_lora_siblings_triton(inputs.x, inputs.a, inputs.b, inputs.gates, inputs.ranks, inputs.residuals)
    assert torch.equal(y.view(torch.int16), inputs.residuals[0].view(torch.int16))  # type: ignore[union-attr]


def test_a_closed_trait_is_not_loaded() -> None:
    inputs = make_inputs(20, 48, (65,), (4, 7), "soft")
    inputs.gates[:, 1] = 0
    want, _ = run(gated_lora_siblings_triton, inputs, gates_need_grad=False)
    inputs.a[0][4:] = float("nan")
    inputs.b[0][:, 4:] = float("nan")
    got, grads = run(gated_lora_siblings_triton, inputs, gates_need_grad=False)
    assert torch.equal(got[0], want[0])
    assert not grads["x"].isnan().any()


def test_closed_gates_still_get_a_gradient() -> None:
    inputs = make_inputs(20, 48, (65,), (4, 7), "zero")
    _, grads = run(gated_lora_siblings_triton, inputs)
    assert grads["gates"].abs().min() > 0


def test_not_a_number_in_a_gate_shows() -> None:
    inputs = make_inputs(4, 48, (65,), (4, 7), "zero")
    inputs.gates[2, 0] = float("nan")
    (y,) = gated_lora_siblings_triton(inputs.x, inputs.a, inputs.b, inputs.gates, inputs.ranks, inputs.residuals)
    assert y[2].isnan().all()


def test_same_bits_every_time() -> None:
    inputs = make_inputs(17, 65, (48,), (4, 7))
    (one, one_grads), (two, two_grads) = (run(gated_lora_siblings_triton, inputs) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
    assert all(torch.equal(one_grads[name], two_grads[name]) for name in one_grads)


@pytest.mark.parametrize("split", [1, 8])
def test_any_tile(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that leave some parts empty, tiles larger and smaller than the sizes."""
    tile = Tile(tokens=16, rank=16, width=32, split=split, warps=4, stages=2)
    expand_tile = replace(tile, split=1)

    def fixed(kernel: str, *_: object) -> Tile:
        return tile if kernel in ("shrink", "grad_weight") else expand_tile

    monkeypatch.setattr(triton_ops, "tile_for", fixed)
    assert_matches_reference(gated_lora_siblings_triton, make_inputs(20, 65, (33,), (18, 1), "one-hot"))


def test_stacked_rows_are_not_copied() -> None:
    whole = torch.randn(7, 5)
    parts = [whole[:3], whole[3:]]
    assert stack_rows(parts).data_ptr() == whole.data_ptr()
    assert torch.equal(stack_rows(parts), whole)
    assert torch.equal(stack_rows(parts[::-1]), torch.cat(parts[::-1]))


def test_forced_on_cpu_while_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEDWARMTH_KERNEL", "triton")
    inputs = make_inputs(3, 48, (65,), (4, 7))
    y = gated_lora(inputs.x, inputs.a[0], inputs.b[0], inputs.gates, (4, 7), inputs.residuals[0])
    want = gated_lora_siblings_triton(inputs.x, inputs.a, inputs.b, inputs.gates, inputs.ranks, inputs.residuals)
    assert torch.equal(y, want[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_the_tuner_times_does_not_depend_on_the_tile(kernel: str) -> None:
    """Few tokens: there the table's shrink is split, and the expand after it is given the partial sums."""
    table, key = load_table(), "few/narrow/low/float32"
    call = timed_call(kernel, key, table, device="cpu")
    tile = table[kernel][key]
    own, other = (tree_leaves(call(each)) for each in (tile, replace(tile, width=2 * tile.width)))
    tensors = [(one, two) for one, two in zip(own, other, strict=True) if isinstance(one, torch.Tensor)]
    assert tensors
    for one, two in tensors:
        if kernel == "shrink":  # partial sums: their sum does not depend on the tile
            one, two = one.sum(0), two.sum(0)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
