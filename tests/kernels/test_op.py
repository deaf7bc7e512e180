"""Dense and the custom op against the reference, dispatch, and torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cases import (
    PATTERNS,
    RANKS,
    Inputs,
    assert_close,
    assert_matches_reference,
    exact,
    make_inputs,
    reference,
    run,
)
from torch import Tensor

from gatedwarmth import kernels
from gatedwarmth.kernels import gated_lora, gated_lora_reference, gated_lora_siblings
from gatedwarmth.kernels.dense import gated_lora_siblings_dense
from gatedwarmth.kernels.op import chosen_path

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_dense_is_the_reference(ranks: tuple[int, ...], pattern: str, dtype: torch.dtype) -> None:
    for tokens, width, outs in ((1, 200, (65,)), (17, 65, (48, 200)), (130, 48, (48, 65, 33))):
        assert_matches_reference(gated_lora_siblings_dense, make_inputs(tokens, width, outs, ranks, pattern, dtype))


@pytest.mark.parametrize("path", [reference, gated_lora_siblings_dense, gated_lora_siblings])
@pytest.mark.parametrize("pattern", ["one-hot", "soft"])
def test_gradcheck(path, pattern: str) -> None:  # type: ignore[no-untyped-def]
    inputs = exact(make_inputs(4, 5, (3, 6), (2, 0, 1), pattern))
    tensors = [inputs.x, inputs.gates, *inputs.a, *inputs.b, *inputs.residuals]

    def flat(x: Tensor, gates: Tensor, a0: Tensor, a1: Tensor, b0: Tensor, b1: Tensor, *ys: Tensor):  # type: ignore[no-untyped-def]
        return path(x, [a0, a1], [b0, b1], gates, inputs.ranks, list(ys))

    assert torch.autograd.gradcheck(flat, [t.requires_grad_() for t in tensors if t is not None])


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 70),
    outs=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    pattern=st.sampled_from(PATTERNS),
    residual=st.booleans(),
)
def test_any_shape(tokens, width, outs, ranks, pattern, residual) -> None:  # type: ignore[no-untyped-def]
    inputs = make_inputs(tokens, width, tuple(outs), tuple(ranks), pattern, residual=residual)
    assert_matches_reference(gated_lora_siblings, inputs)


def test_closed_gates_give_back_the_residual_itself() -> None:
    inputs = make_inputs(5, 48, (65,), (4, 7), "zero")
    y = gated_lora(inputs.x, inputs.a[0], inputs.b[0], inputs.gates, (4, 7), inputs.residuals[0])
    assert y is inputs.residuals[0]
    bare = gated_lora(inputs.x, inputs.a[0], inputs.b[0], inputs.gates, (4, 7))
    assert torch.equal(bare, torch.zeros(5, 65))


def test_misfit_shapes_are_named() -> None:
    inputs = make_inputs(5, 48, (65,), (4, 7))
    x, a, b, gates = inputs.x, inputs.a[0], inputs.b[0], inputs.gates
    with pytest.raises(ValueError, match=r"a \[12, in\].*found x \[5, 48\], a \[11, 48\]"):
        gated_lora(x, a, b, gates, (4, 8))
    with pytest.raises(ValueError, match=r"gates must be \[tokens, traits\] = \[5, 2\], found \[4, 2\]"):
        gated_lora(x, a, b, gates[:4], (4, 7))
    with pytest.raises(ValueError, match=r"residual must be \[5, 65\], found \[5, 64\]"):
        gated_lora(x, a, b, gates, (4, 7), torch.zeros(5, 64))


def test_the_variable_forces_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(5, 48, (65,), (4, 7))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GATEDWARMTH_KERNEL", raising=False)
    assert chosen_path(inputs.x) == "dense"
    monkeypatch.setenv("GATEDWARMTH_KERNEL", "reference")
    y = gated_lora(inputs.x, inputs.a[0], inputs.b[0], inputs.gates, (4, 7))
    assert torch.equal(y, gated_lora_reference(inputs.x, inputs.a[0], inputs.b[0], inputs.gates, (4, 7)))
    monkeypatch.setenv("GATEDWARMTH_KERNEL", "fast")
    with pytest.raises(ValueError, match="'fast'; set it to one of"):
        chosen_path(inputs.x)
    monkeypatch.setenv("GATEDWARMTH_KERNEL", "triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1|not installed"):
        chosen_path(inputs.x)


def test_the_rule_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only device, dtype and tokens are read, so a meta tensor that claims a device stands in for a GPU's."""

    class OnGpu:
        device = torch.device("cuda")

        def __init__(self, tokens: int, dtype: torch.dtype) -> None:
            self.shape, self.dtype = (tokens, 64), dtype

    monkeypatch.delenv("GATEDWARMTH_KERNEL", raising=False)
    monkeypatch.setattr("gatedwarmth.kernels.op.triton_installed", lambda: True)
    found = {(t, d): chosen_path(OnGpu(t, d)) for t in (1, 256, 257) for d in (*DTYPES, torch.float64)}  # type: ignore[arg-type]
    half = {(t, d): "triton" for t in (1, 256, 257) for d in DTYPES[1:]}
    other = {(t, torch.float64): "dense" for t in (1, 256, 257)}
    single = {(1, torch.float32): "triton", (256, torch.float32): "triton", (257, torch.float32): "dense"}
    assert found == half | other | single
    monkeypatch.setattr("gatedwarmth.kernels.op.triton_installed", lambda: False)
    assert chosen_path(OnGpu(1, torch.float16)) == "dense"  # type: ignore[arg-type]


def op_arguments(inputs: Inputs, need: bool) -> tuple[object, ...]:
    flat = [r for layer in inputs.ranks for r in layer]
    present = [y for y in inputs.residuals if y is not None]
    has = [y is not None for y in inputs.residuals]
    return inputs.x, inputs.a, inputs.b, inputs.gates, flat, present, has, [need] * 4


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_opcheck(residual: bool, tracked: bool) -> None:
    inputs = make_inputs(6, 48, (33, 20), (4, 7))
    if not residual:
        inputs.residuals[0] = None
    for t in (inputs.x, inputs.gates, *inputs.a, *inputs.b, *(y for y in inputs.residuals if y is not None)):
        t.requires_grad_(tracked)
    torch.library.opcheck(torch.ops.gatedwarmth.gated_lora_siblings.default, op_arguments(inputs, tracked))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype: torch.dtype) -> None:
    inputs = make_inputs(6, 48, (33, 20), (4, 7), dtype=dtype)
    *_, shrunk = torch.ops.gatedwarmth.gated_lora_siblings(*op_arguments(inputs, True))
    dy = [torch.randn(6, out).to(dtype) for out in (33, 20)]
    flat = [r for layer in inputs.ranks for r in layer]
    for need in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        arguments = (dy, inputs.x, inputs.a, inputs.b, inputs.gates, shrunk, flat, need)
        torch.library.opcheck(torch.ops.gatedwarmth.gated_lora_siblings_backward.default, arguments)


def compiled(backend: str, dynamic: bool | None = None):  # type: ignore[no-untyped-def]
    torch._dynamo.reset()
    return torch.compile(gated_lora_siblings, fullgraph=True, backend=backend, dynamic=dynamic)


@pytest.mark.parametrize("pattern", ["zero", "soft"])
def test_compiles_without_a_graph_break(pattern: str) -> None:
    path = compiled("aot_eager")
    for residual in (True, False):
        for dtype in DTYPES:
            assert_matches_reference(path, make_inputs(7, 48, (33, 20), (4, 7), pattern, dtype, residual))
        assert_matches_reference(
            path, make_inputs(7, 48, (33, 20), (4, 7), pattern, residual=residual), gates_need_grad=False
        )


def test_compiled_for_any_number_of_tokens() -> None:
    path = compiled("aot_eager", dynamic=True)
    for tokens in (5, 9, 31):
        assert_matches_reference(path, make_inputs(tokens, 48, (33,), (4, 7)))


def test_compiled_saves_nothing_without_gradients() -> None:
    seen: list[list[bool]] = []

    def look(graph: torch.fx.GraphModule, _: object):  # type: ignore[no-untyped-def]
        seen.extend(n.args[-1] for n in graph.graph.nodes if "gated_lora_siblings" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    inputs = make_inputs(7, 48, (33,), (4, 7))
    inputs.a[0].requires_grad_()
    arguments = (inputs.x, inputs.a, inputs.b, inputs.gates, inputs.ranks, inputs.residuals)
    path = torch.compile(gated_lora_siblings, fullgraph=True, backend=look)
    with torch.no_grad():
        (y,) = path(*arguments)
    path(*arguments)
    assert seen == [[False] * 4, [False, False, True, False]]
    assert_close("y", y, reference(*(exact(inputs).__dict__.values()))[0])


def test_gates_that_need_no_gradient_get_none() -> None:
    inputs = make_inputs(5, 48, (65, 30), (4, 7))
    _, grads = run(gated_lora_siblings, inputs, gates_need_grad=False)
    assert "gates" not in grads
    assert_matches_reference(gated_lora_siblings, replace(inputs, residuals=[None, None]), gates_need_grad=False)


def test_public_names() -> None:
    assert sorted(kernels.__all__) == ["gated_lora", "gated_lora_reference", "gated_lora_siblings"]
