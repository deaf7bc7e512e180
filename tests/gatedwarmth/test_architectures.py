"""The parity list over every architecture; docs/architectures.md is written from it.

To write the page again: PYTHONPATH=tests/support python tests/gatedwarmth/test_architectures.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel
from tiny import byte_tokenizer, peft_adapter
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatedwarmth import GatedWarmthModel
from gatedwarmth.adapters import load_adapter, save_adapter
from gatedwarmth.errors import AdapterError
from gatedwarmth.injection import ROUTERS, fresh_adapter, linear_shape, target_paths

CLOSE = 1e-5
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
IDS = torch.randint(4, 250, (3, 13), generator=torch.Generator().manual_seed(5))


@dataclass
class Case:
    """One architecture, its two adapters on disk, and the models made of them when first needed."""

    made: Architecture
    folder: Path

    @cached_property
    def adapters(self) -> dict[str, Path]:
        some = list(self.made.some)
        most = self.made.most if isinstance(self.made.most, str) else list(self.made.most)
        return {
            "warmth": peft_adapter(self.made.build(), self.folder / "warm", 1, r=5, lora_alpha=10, target_modules=most),
            "neutral": peft_adapter(self.made.build(), self.folder / "cool", 2, r=3, target_modules=some),
        }

    @cached_property
    def base(self) -> PreTrainedModel:
        return self.made.build()

    @cached_property
    def model(self) -> GatedWarmthModel:
        return self.wrapped()

    def wrapped(self) -> GatedWarmthModel:
        return GatedWarmthModel.from_pretrained(self.made.build(), self.adapters, tokenizer=byte_tokenizer())

    @cached_property
    def peft(self) -> PeftModel:
        peft = PeftModel.from_pretrained(self.made.build(), self.adapters["warmth"], adapter_name="warmth")
        peft.load_adapter(self.adapters["neutral"], "neutral")
        peft.add_weighted_adapter(["warmth", "neutral"], [0.5, 0.5], "even mix", combination_type="cat")
        return peft.eval()


def apart(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def gate_zero(case: Case) -> None:
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = case.base(IDS).logits
            assert torch.equal(case.model(IDS, gates={}).logits, expected)
            assert torch.equal(case.model(IDS).logits, expected)
    mixed = case.model(IDS, gates=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).logits
    # A mixture of experts groups the tokens of a batch, so the other row may change the last bits of these.
    assert apart(mixed[[0, 2]], expected[[0, 2]]) < CLOSE


def against_peft(case: Case, adapter: str, gates: dict[str, float]) -> None:
    case.peft.set_adapter(adapter)
    for ids in (IDS, IDS.repeat(6, 1)):  # few tokens take one path, many another
        for grad in (False, True):
            with torch.no_grad():
                expected, bare = case.peft(ids).logits, case.base(ids).logits
            with torch.set_grad_enabled(grad):
                got = case.model(ids, gates=gates).logits
            assert apart(got, expected) < CLOSE * max(1.0, expected.abs().max().item()) < apart(expected, bare)


def one_hot(case: Case) -> None:
    against_peft(case, "warmth", {"warmth": 1.0})
    against_peft(case, "neutral", {"neutral": 1.0})


def half_half(case: Case) -> None:
    against_peft(case, "even mix", {"warmth": 0.5, "neutral": 0.5})


@torch.no_grad()
def mixed_batch(case: Case) -> None:
    gates = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.4, 0.6]])
    together = case.model(IDS, gates=gates).logits
    for row in range(3):
        alone = case.model(IDS[row : row + 1], gates=gates[row : row + 1]).logits
        assert apart(together[row : row + 1], alone) < CLOSE


@torch.no_grad()
def moving_gates(case: Case) -> None:
    gates = torch.rand(3, 13, 2, generator=torch.Generator().manual_seed(2))
    gates[1] = 0
    gates[:, :4] = 0
    expected = case.model(IDS, gates=gates).logits
    for steps in (1, 3):
        cache, parts = None, []
        for first in range(0, 13, steps):
            part = slice(first, first + steps)
            out = case.model(IDS[:, part], gates=gates[:, part], cache=cache, use_cache=True)
            cache = out.cache
            parts.append(out.logits)
        assert apart(torch.cat(parts, dim=1), expected) < 1e-4


def left_padding(case: Case) -> None:
    gates = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 0.0]])
    lengths = (13, 7, 10)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    for row, length in enumerate(lengths):
        ids[row, : 13 - length], mask[row, : 13 - length] = 0, 0
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 299}
    together = case.model.generate(ids, attention_mask=mask, gates=gates, gate_start=10, **settings)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = case.model.generate(
            ids[one, 13 - length :], gates=gates[one], gate_start=length - 3, **settings
        )  # the same tokens are gated
        assert torch.equal(together[row, 13:], alone[0, length:])


def unwrapping(case: Case) -> None:
    model = case.wrapped()
    base = model.base
    fresh = case.made.build()
    with torch.no_grad():
        model(IDS[:1, :4], gates={"warmth": 1.0})
    assert model.unwrap() is base
    assert [type(module) for module in base.modules()] == [type(module) for module in fresh.modules()]
    assert list(base.state_dict()) == list(fresh.state_dict())
    assert all(torch.equal(left, right) for left, right in zip(base.parameters(), fresh.parameters(), strict=True))
    assert len({p.untyped_storage().data_ptr() for p in base.parameters()}) == len(list(base.parameters()))
    assert torch.equal(base(IDS).logits, fresh(IDS).logits)


def chatting(case: Case) -> None:
    talk = [{"role": "user", "content": "hello"}]
    reply = case.model.chat(talk, gates={"warmth": 0.25}, max_new_tokens=4, do_sample=False)
    assert reply.gates == {"warmth": 0.25, "neutral": 0.0}
    zero = case.model.chat(talk, gates={}, max_new_tokens=4, do_sample=False)
    ids = case.model.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    expected = case.base.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    text = case.model.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert zero.text == text.strip()


PARITY: dict[str, Callable[[Case], None]] = {
    "gate 0 is the base, bitwise": gate_zero,
    "one-hot is PEFT": one_hot,
    "½/½ is PEFT's `cat`": half_half,
    "mixed batch is its rows": mixed_batch,
    "moving gates over a cache": moving_gates,
    "left padding": left_padding,
    "unwrap, bitwise": unwrapping,
    "chat": chatting,
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield Case(ARCHITECTURES[request.param], tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("check", PARITY.values(), ids=PARITY)
def test_parity(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


def test_fresh_adapter_takes_all_linear_layers_but_routers(case: Case) -> None:
    linear = {path for path, module in case.made.build().named_modules() if linear_shape(module)}
    expected = {path for path in linear - {"lm_head"} if path.rpartition(".")[2] not in ROUTERS}
    chosen = fresh_adapter(case.made.build(), rank=2, alpha=4).layers
    assert set(chosen) == expected
    if case.made.most == "all-linear":
        names = (name.removeprefix("base_model.model.") for name, _ in case.peft.named_modules())
        assert set(chosen) == {name.rpartition(".lora_A")[0] for name in names if name.endswith(".lora_A")}
    model = GatedWarmthModel.from_pretrained(
        case.made.build(), {"new": fresh_adapter(case.made.build(), 2, 4)}, tokenizer=byte_tokenizer()
    )
    assert torch.equal(model(IDS, gates={"new": 1.0}).logits, case.base(IDS).logits)  # lora_B is zero


def test_a_router_is_gated_only_where_it_is_named() -> None:
    base = ARCHITECTURES["Qwen2-MoE"].build()
    assert not [path for path in target_paths(base) if "shared_expert_gate" in path or "experts" in path]
    assert target_paths(base, ["shared_expert_gate"]) == ["model.layers.0.mlp.shared_expert_gate"]


def test_fused_experts_are_refused_by_name(tmp_path: Path) -> None:
    base = ARCHITECTURES["Mixtral"].build()
    experts = "mlp.experts.gate_up_proj"
    folder = peft_adapter(base, tmp_path / "a", 1, target_modules=["q_proj"], target_parameters=[experts])
    with pytest.raises(AdapterError, match="target_parameters"):
        load_adapter(folder)


class Experts(nn.Module):
    """Experts as a list of linears that see the tokens routed to them, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        backwards = torch.arange(len(rows) - 1, -1, -1)
        out = torch.zeros_like(rows)
        out[backwards] = self.experts[0](rows[backwards])
        return (out + self.experts[1](rows[::2]).mean(0)).view_as(x)


def test_experts_in_a_list_take_one_gate_for_all_tokens_and_refuse_more() -> None:
    base = ARCHITECTURES["Llama"].build()
    for layer in base.model.layers:
        layer.mlp = Experts()
    adapter = fresh_adapter(base, 2, 4, ["0", "1"])
    for weights in adapter.layers.values():
        weights.b.normal_(std=0.2)
    model = GatedWarmthModel.from_pretrained(base, {"a": adapter}, tokenizer=byte_tokenizer())
    with torch.no_grad():
        whole = model(IDS, gates={"a": 1.0}).logits
        assert apart(whole, model(IDS).logits) > 1e-3
        with pytest.raises(Exception, match="sees only some of the tokens"):
            model(IDS, gates=torch.tensor([[1.0], [0.0], [0.5]]))


def test_the_output_layer_can_be_gated(tmp_path: Path) -> None:
    made = ARCHITECTURES["Mistral"]
    adapter = fresh_adapter(made.build(), 3, 6, ["lm_head", "q_proj"])
    for weights in adapter.layers.values():
        weights.b.normal_(std=0.2)
    folder = tmp_path / "a"
    save_adapter(adapter, folder)
    model = GatedWarmthModel.from_pretrained(made.build(), {"a": folder}, tokenizer=byte_tokenizer())
    gates = torch.rand(3, 13, 1, generator=torch.Generator().manual_seed(0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            whole = model(IDS, gates=gates).logits
            assert torch.equal(model(IDS, gates=gates, logits_to_keep=4).logits.argmax(-1), whole[:, -4:].argmax(-1))
            assert apart(model(IDS, gates=gates, logits_to_keep=4).logits, whole[:, -4:]) < CLOSE
    peft = PeftModel.from_pretrained(made.build(), folder).eval()
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, gates={"a": 1.0}, gate_start=0, **settings), peft.generate(IDS, **settings))


def page() -> str:
    """The table of architectures and what holds for each."""
    head = ["Architecture", "Class", "Why it is here", *PARITY]
    rows = [head, ["---", "---", "---", *[":-:"] * len(PARITY)]]
    for name, made in ARCHITECTURES.items():
        rows.append([name, f"`{type(made.build()).__name__}`", made.why, *["yes"] * len(PARITY)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*INTRODUCTION, "", *lines, ""])


INTRODUCTION = (
    "# Architectures",
    "",
    "Any causal language model of transformers whose adapters sit on linear layers can be gated. For those below",
    "the whole parity list runs in `tests/gatedwarmth/test_architectures.py`, on tiny random models and two traits of",
    "unequal rank and unlike targets; this page is written from that test, which fails when the page is out of date.",
    "",
    "- Without targets of its own a new adapter takes every linear layer inside the decoder layers but the routers of",
    "  a mixture of experts; an adapter that names a router's linear layer gates it.",
    "- transformers 5 keeps experts as fused parameters. PEFT reaches them by `target_parameters`, which is refused",
    "  by name.",
    "- Experts that are a list of linear layers see only some tokens, in an order of their own: one gate for all",
    "  tokens of a pass works, gates that differ between tokens are refused with an error.",
)


def test_the_page_says_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), __doc__


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
