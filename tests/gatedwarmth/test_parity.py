"""The parity list: what a gated model must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import byte_tokenizer, peft_adapter, tiny_llama
from torch import Tensor

from gatedwarmth import GatedWarmthModel, layers
from gatedwarmth.adapters import blend, load_adapter, save_adapter
from gatedwarmth.bench.model import weight_bytes

CLOSE = 1e-5


@pytest.fixture(autouse=True, params=["parts", "joined"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a group's outputs on a CPU, in float32, where a difference shows."""
    monkeypatch.setattr(layers, "JOINED", (torch.float32, torch.bfloat16) if request.param == "joined" else ())
    return str(request.param)


@pytest.fixture
def model(adapters: dict[str, Path]) -> GatedWarmthModel:
    return GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=byte_tokenizer())


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(4, 250, (3, 13), generator=torch.Generator().manual_seed(5))


def peft_logits(adapters: dict[str, Path], ids: Tensor, weights: dict[str, float]) -> Tensor:
    """PEFT's own output: one adapter, or their exact blend by concatenation."""
    first, *rest = weights
    peft = PeftModel.from_pretrained(tiny_llama(), adapters[first], adapter_name=first)
    for name in rest:
        peft.load_adapter(adapters[name], name)
    if rest:
        peft.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
        peft.set_adapter("mix")
    with torch.no_grad():
        return peft.eval()(ids).logits


def apart(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.mark.parametrize("grad", [False, True])
def test_gates_zero_are_the_base_bitwise(model: GatedWarmthModel, ids: Tensor, grad: bool) -> None:
    expected = tiny_llama()(ids).logits
    with torch.set_grad_enabled(grad):
        assert torch.equal(model(ids, gates={"warmth": 0.0, "neutral": 0.0}).logits, expected)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("repeats", [1, 9])  # few tokens take the fused path, many the other
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("gates", [{"warmth": 1.0}, {"neutral": 1.0}, {"warmth": 0.5, "neutral": 0.5}])
def test_fixed_gates_are_peft(
    model: GatedWarmthModel,
    adapters: dict[str, Path],
    ids: Tensor,
    gates: dict[str, float],
    grad: bool,
    repeats: int,
) -> None:
    ids = ids.repeat(repeats, 1)
    expected = peft_logits(adapters, ids, gates)
    with torch.set_grad_enabled(grad):
        got = model(ids, gates=gates).logits
    assert apart(got, expected) < CLOSE < apart(expected, tiny_llama()(ids).logits)


def test_blend_is_the_mixture_and_loads_in_peft(
    model: GatedWarmthModel, adapters: dict[str, Path], ids: Tensor, tmp_path: Path
) -> None:
    mixed = blend([load_adapter(folder) for folder in adapters.values()], [0.3, 0.6])
    save_adapter(mixed, tmp_path / "mixed")
    got = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed").eval()(ids).logits
    assert apart(got, model(ids, gates={"warmth": 0.3, "neutral": 0.6}).logits) < CLOSE


def test_saved_traits_load_in_peft(
    model: GatedWarmthModel, adapters: dict[str, Path], ids: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    for trait in model.traits:
        got = PeftModel.from_pretrained(tiny_llama(), tmp_path / "model" / "adapters" / trait).eval()(ids).logits
        assert apart(got, peft_logits(adapters, ids, {trait: 1.0})) < CLOSE


def test_rows_with_gates_of_their_own_equal_rows_alone(model: GatedWarmthModel, ids: Tensor) -> None:
    gates = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.6]])
    together = model(ids, gates=gates).logits
    for row in range(3):
        assert apart(together[row : row + 1], model(ids[row : row + 1], gates=gates[row : row + 1]).logits) < CLOSE


def test_gates_of_each_token_act_on_that_token_and_after(model: GatedWarmthModel, ids: Tensor) -> None:
    gates = torch.zeros(3, 13, 2)
    gates[:, 6:, 0] = 0.8
    got = model(ids, gates=gates).logits
    base = model(ids).logits
    assert torch.equal(got[:, :6], base[:, :6])
    assert apart(got[:, 6:], base[:, 6:]) > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_cache_with_moving_gates_equals_recompute(model: GatedWarmthModel, ids: Tensor, steps: int) -> None:
    gates = torch.rand(3, 13, 2, generator=torch.Generator().manual_seed(2))
    gates[1] = 0
    expected = model(ids, gates=gates).logits
    cache, parts = None, []
    for first in range(0, 13, steps):
        part = slice(first, first + steps)
        out = model(ids[:, part], gates=gates[:, part], cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert apart(torch.cat(parts, dim=1), expected) < 1e-4


def test_left_padding_changes_nothing(model: GatedWarmthModel) -> None:
    talks = [[{"role": "user", "content": text}] for text in ("hello", "a much longer message than that")]
    gates = torch.tensor([[1.0, 0.0], [0.3, 0.7]])
    together = model.chat_many(talks, gates=gates, max_new_tokens=12, do_sample=False)
    alone = [
        model.chat(talk, gates=gates[row : row + 1], max_new_tokens=12, do_sample=False)
        for row, talk in enumerate(talks)
    ]
    assert [reply.text for reply in together] == [reply.text for reply in alone]


def test_generate_equals_step_by_step_recompute(model: GatedWarmthModel, ids: Tensor) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.0, 0.0]])
    model.base.generation_config.eos_token_id = None
    got = model.generate(ids, gates=rows, gate_start=10, max_new_tokens=6, do_sample=False)
    for _ in range(6):
        gates = torch.zeros(3, ids.shape[1], 2)
        gates[:, 10:] = rows[:, None]
        ids = torch.cat([ids, model(ids, gates=gates).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


def test_response_scope_leaves_the_prompts_cache_the_bases(model: GatedWarmthModel, ids: Tensor) -> None:
    out = model.generate(ids, gates={"warmth": 1.0}, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    bare = tiny_llama()(ids, use_cache=True).cache
    for gated, base in zip(out.cache.layers, bare.layers, strict=True):
        assert torch.equal(gated.keys[:, :, :12], base.keys[:, :, :12])


def test_unwrap_gives_the_very_base_back(adapters: dict[str, Path], ids: Tensor) -> None:
    base = tiny_llama()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    model = GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer())
    with torch.no_grad():
        model(ids, gates={"warmth": 1.0})
    assert model.unwrap() is base
    assert [type(module) for module in base.modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    pointers = [tensor.untyped_storage().data_ptr() for name, tensor in base.named_parameters()]
    assert len(set(pointers)) == len(pointers)


def test_joined_weights_are_held_once(model: GatedWarmthModel, ids: Tensor, route: str) -> None:
    """All that joining adds to memory is the zeros between the blocks of B."""
    before = weight_bytes(model)
    with torch.no_grad():
        model(ids, gates={"warmth": 0.5, "neutral": 0.25})
    groups = {layer.siblings for layer in model.injection.layers.values()}
    members = [[(m.out_features, sum(m.ranks)) for m in group.members] for group in groups]
    zeros = sum(
        out * rank
        for group in members
        for k, (out, _) in enumerate(group)
        for j, (_, rank) in enumerate(group)
        if j != k
    )
    assert weight_bytes(model) - before == (4 * zeros if route == "joined" else 0)
    stored = {m.weight.untyped_storage().data_ptr() for group in groups for m in group.members}
    assert len(stored) == (len(groups) if route == "joined" else len(model.injection.layers))


def test_free_form_names_and_three_traits(adapters: dict[str, Path], ids: Tensor, tmp_path: Path) -> None:
    third = peft_adapter(tiny_llama(), tmp_path / "third", 3, r=2, target_modules=["k_proj", "up_proj", "o_proj"])
    named = {"very warm": adapters["warmth"], "0": adapters["neutral"], "café-style": third}
    model = GatedWarmthModel.from_pretrained(tiny_llama(), named, tokenizer=byte_tokenizer())
    gates = {"very warm": 0.5, "0": 0.25, "café-style": 1.0}
    model.save_pretrained(tmp_path / "model")
    again = blend([load_adapter(folder) for folder in named.values()], list(gates.values()))
    save_adapter(again, tmp_path / "mixed")
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed").eval()
    assert apart(model(ids, gates=gates).logits, peft(ids).logits) < CLOSE


def test_adapters_that_change_in_place_are_not_served_stale(model: GatedWarmthModel, ids: Tensor) -> None:
    with torch.no_grad():
        before = model(ids[:, :4], gates={"warmth": 1.0}).logits
        for layer in model.injection.layers.values():
            layer.b.mul_(2.0)
        after = model(ids[:, :4], gates={"warmth": 0.5}).logits
    assert apart(before, after) < CLOSE


def test_adapters_that_are_replaced_are_not_served_stale(model: GatedWarmthModel, ids: Tensor) -> None:
    """load_state_dict(assign=True) gives parameters new storage, which layers that share their shrink must notice."""
    gates = torch.tensor([[0.7, 0.3]] * 3)
    with torch.no_grad():
        before = model(input_ids=ids, gates=gates).logits
        state = {k: v * 1.5 if k.endswith(".a") else v for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        after = model(input_ids=ids, gates=gates).logits
    with_gradients = model(input_ids=ids, gates=gates).logits
    assert (after - before).abs().max() > 1e-3
    assert (after - with_gradients).abs().max() < 1e-4


@pytest.mark.parametrize("repeats", [1, 9])
def test_a_base_weight_that_is_replaced_or_hooked_is_not_served_stale(
    model: GatedWarmthModel, ids: Tensor, repeats: int
) -> None:
    gates, ids = torch.tensor([[0.7, 0.3]] * 3), ids.repeat(1, repeats)
    layer = model.injection.layers["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        before = model(input_ids=ids, gates=gates).logits
        layer.base.weight = torch.nn.Parameter(layer.weight * 1.5)
        after = model(input_ids=ids, gates=gates).logits
    assert (after - before).abs().max() > 1e-3
    assert apart(model(input_ids=ids, gates=gates).logits, after) < CLOSE
    called: list[bool] = []
    layer.base.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        assert apart(model(input_ids=ids, gates=gates).logits, after) < CLOSE
    assert called and not layer.siblings._routes, "a route outlived the weights that it was made from"


def test_a_scaling_that_changes_is_not_served_stale(model: GatedWarmthModel, ids: Tensor) -> None:
    gates = torch.tensor([[0.7, 0.3]] * 3)
    with torch.no_grad():
        model(input_ids=ids, gates=gates)
        for layer in model.injection.layers.values():
            layer.scalings = tuple(2 * scaling for scaling in layer.scalings)
        after = model(input_ids=ids, gates=gates).logits
    assert apart(model(input_ids=ids, gates=gates).logits, after) < CLOSE


def test_routes_are_kept_from_reply_to_reply(model: GatedWarmthModel, ids: Tensor) -> None:
    gates = torch.tensor([[0.7, 0.3]] * 3)
    siblings = model.injection.layers["model.layers.0.self_attn.q_proj"].siblings
    with torch.no_grad():
        model(input_ids=ids, gates=gates)
        few = siblings._routes[True]
        model(input_ids=ids.repeat(1, 9), gates=gates)
        model(input_ids=ids, gates=gates)
    assert set(siblings._routes) == {True, False} and siblings._routes[True] is few
    assert few.plan is None, "a plan and its gates were kept with it"


def test_moving_a_model_after_its_weights_were_stacked(model: GatedWarmthModel, ids: Tensor) -> None:
    gates = torch.tensor([[0.7, 0.3]] * 3)
    with torch.no_grad():
        before = model(input_ids=ids, gates=gates).logits
        there = model.double()(input_ids=ids, gates=gates).logits
        back = model.float()(input_ids=ids, gates=gates).logits
    assert (there - before).abs().max() < 1e-4 and torch.equal(back, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(adapters: dict[str, Path], ids: Tensor, dtype: torch.dtype) -> None:
    tokenizer = byte_tokenizer()
    full = GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=tokenizer)
    half = GatedWarmthModel.from_pretrained(tiny_llama().to(dtype), adapters, tokenizer=tokenizer)
    gates = {"warmth": 0.7, "neutral": 0.3}
    with torch.no_grad():
        expected, got = full(ids, gates=gates).logits, half(ids, gates=gates).logits.float()
    assert apart(got, expected) < 0.05 * expected.abs().max().item()


def test_gradient_checkpointing_gives_the_same_gradients(adapters: dict[str, Path], ids: Tensor) -> None:
    gradients = []
    for checkpointed in (False, True):
        base = tiny_llama()
        model = GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer())
        if checkpointed:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        layer = model.injection.layers["model.layers.0.mlp.down_proj"]
        layer.a.requires_grad_(True)
        model(ids, gates={"warmth": 1.0}, labels=ids, use_cache=False).loss.backward()
        assert layer.a.grad is not None
        gradients.append(layer.a.grad)
    assert apart(*gradients) < 1e-7 < gradients[0].abs().max().item()
