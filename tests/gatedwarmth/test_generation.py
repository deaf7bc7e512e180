"""Every way of generating gives what a plain reference gives: PEFT's exact blend, generating the same way."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import two_processes
from architectures import ARCHITECTURES
from peft import PeftModel
from safetensors.torch import load_file
from tiny import byte_tokenizer, peft_adapter, tiny_llama
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from gatedwarmth import GatedWarmthModel
from gatedwarmth.data import Message
from gatedwarmth.errors import GateError
from gatedwarmth.router.base import ReadHidden

MIX = {"warmth": 0.6, "neutral": 0.3}
IDS = torch.randint(4, 250, (3, 13), generator=torch.Generator().manual_seed(5))
PLAIN: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": 299, "pad_token_id": 0}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    some = ["q_proj", "v_proj", "down_proj"]
    return {
        "warmth": peft_adapter(tiny_llama(), folder / "warm", 1, r=6, lora_alpha=12),
        "neutral": peft_adapter(tiny_llama(), folder / "cool", 2, r=3, target_modules=some),
    }


def mixture(base: PreTrainedModel, adapters: dict[str, Path], gates: dict[str, float]) -> PeftModel:
    peft = PeftModel.from_pretrained(base, adapters["warmth"], adapter_name="warmth")
    peft.load_adapter(adapters["neutral"], "neutral")
    peft.add_weighted_adapter(list(gates), list(gates.values()), "mix", combination_type="cat")
    peft.set_adapter("mix")
    return peft.eval()


@pytest.fixture(scope="module")
def model(adapters: dict[str, Path]) -> GatedWarmthModel:
    return GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def peft(adapters: dict[str, Path]) -> PeftModel:
    return mixture(tiny_llama(), adapters, MIX)


def both(model: GatedWarmthModel, peft: PeftModel, ids: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The gated model's tokens and the blend's, from the same seed."""
    torch.manual_seed(11)
    expected = peft.generate(input_ids=ids, **{**PLAIN, **settings})
    torch.manual_seed(11)
    return model.generate(ids, gates=MIX, gate_start=0, **{**PLAIN, **settings}), expected


SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 40}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {**SAMPLING},
    "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0},
    "beams": {"num_beams": 3},
    "beams, several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "beams, sampled": {"num_beams": 3, **SAMPLING},
    "several sequences": {"num_return_sequences": 3, **SAMPLING},
    "no cache": {"use_cache": False},
    "beams, no cache": {"use_cache": False, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 2},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "repetition penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "early end": {"eos_token_id": list(range(4, 60))},
}


@pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
def test_generation_is_that_of_the_blend(model: GatedWarmthModel, peft: PeftModel, settings: dict[str, Any]) -> None:
    got, expected = both(model, peft, IDS, **settings)
    assert torch.equal(got, expected)
    assert not torch.equal(
        model.generate(IDS, gates={}, **PLAIN), model.generate(IDS, gates=MIX, gate_start=0, **PLAIN)
    )


@pytest.mark.parametrize("window", ["Mistral", "Gemma 3"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_sliding_windows(window: str, cache: str | None, tmp_path: Path) -> None:
    made = ARCHITECTURES[window]  # windows of 8 tokens
    adapters = {
        "warmth": peft_adapter(made.build(), tmp_path / "warm", 1),
        "neutral": peft_adapter(made.build(), tmp_path / "cool", 2, target_modules=list(made.some)),
    }
    model = GatedWarmthModel.from_pretrained(made.build(), adapters, tokenizer=byte_tokenizer())
    settings = {"cache_implementation": cache} if cache else {}
    got, expected = both(model, mixture(made.build(), adapters, MIX), IDS, **settings)
    assert torch.equal(got, expected)


ASSISTED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "an assistant": {"assistant": 1},
    "a perfect assistant": {"assistant": 0},
    "an assistant, sampling": {"assistant": 0, **SAMPLING},
}


@pytest.mark.parametrize("settings", ASSISTED.values(), ids=ASSISTED)
def test_assisted_decoding(model: GatedWarmthModel, peft: PeftModel, settings: dict[str, Any]) -> None:
    """Rejected tokens are cropped from the cache, so a pass begins at any column."""
    settings = dict(settings)
    if "assistant" in settings:
        settings["assistant_model"] = tiny_llama(settings.pop("assistant"))
    ids = torch.cat([IDS[:1, :6], IDS[:1, :6], IDS[:1, :3]], dim=1)  # repeats, for the lookup
    got, expected = both(model, peft, ids, **settings, max_new_tokens=20)
    assert torch.equal(got, expected)
    if "do_sample" not in settings:
        assert torch.equal(got, both(model, peft, ids, max_new_tokens=20)[0])


def test_assisted_decoding_after_a_bare_prompt(model: GatedWarmthModel) -> None:
    plain = model.generate(IDS[:1], gates=MIX, gate_start=9, **PLAIN)
    lookup = model.generate(IDS[:1], gates=MIX, gate_start=9, prompt_lookup_num_tokens=4, **PLAIN)
    drafted = model.generate(IDS[:1], gates=MIX, gate_start=9, assistant_model=tiny_llama(), **PLAIN)
    assert torch.equal(plain, lookup) and torch.equal(plain, drafted)


def test_inputs_embeds(model: GatedWarmthModel, peft: PeftModel) -> None:
    embeds = model.base.get_input_embeddings()(IDS).detach()
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        expected = peft.generate(inputs_embeds=embeds, **{**PLAIN, **settings})
        got = model.generate(inputs_embeds=embeds, gates=MIX, gate_start=0, **{**PLAIN, **settings})
        assert torch.equal(got, expected)
    from_ids = model.generate(IDS, gates=MIX, **PLAIN)[:, 13:]
    assert torch.equal(model.generate(inputs_embeds=embeds, gates=MIX, **PLAIN), from_ids)
    with pytest.raises(GateError, match="have no text"):
        model.generate(inputs_embeds=embeds, **PLAIN)


def test_padding_on_either_side_changes_nothing(model: GatedWarmthModel, peft: PeftModel) -> None:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :5], mask[1, :5] = 0, 0
    got, expected = both(model, peft, ids, attention_mask=mask)
    assert torch.equal(got, expected)
    assert torch.equal(got[1, 13:], both(model, peft, IDS[1:2, 5:])[0][0, 8:])
    with torch.no_grad():
        right = model(IDS.roll(-5, 1)[1:2], attention_mask=mask.flip(1)[1:2], gates=MIX).logits[:, :8]
        assert (right - model(IDS[1:2, 5:], gates=MIX).logits).abs().max() < 1e-5


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class After(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_streamers_and_stopping_criteria(model: GatedWarmthModel) -> None:
    streamer, whole = Collected(), model.generate(IDS[:1], gates=MIX, **PLAIN)
    got = model.generate(IDS[:1], gates=MIX, streamer=streamer, **PLAIN)
    assert streamer.ended and streamer.tokens == got[0].tolist() == whole[0].tolist()
    stopped = model.generate(IDS[:1], gates=MIX, stopping_criteria=StoppingCriteriaList([After(17)]), **PLAIN)
    assert torch.equal(stopped, whole[:, :17])


def test_gates_of_each_row(model: GatedWarmthModel) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.0, 0.0]])
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"cache_implementation": "static"}):
        together = model.generate(IDS, gates=rows, gate_start=8, **{**PLAIN, **settings})
        alone = [
            model.generate(IDS[r : r + 1], gates=rows[r : r + 1], gate_start=8, **{**PLAIN, **settings})
            for r in range(3)
        ]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"prefill_chunk_size": 3}], ids=str)
def test_gates_of_each_token(model: GatedWarmthModel, settings: dict[str, Any]) -> None:
    given = torch.rand(3, 13, 2, generator=torch.Generator().manual_seed(3))
    given[:, :4] = 0
    got, ids = model.generate(IDS, gates=given, **PLAIN, **settings), IDS
    while ids.shape[1] < got.shape[1]:  # recompute everything for every token
        gates = torch.cat([given, given[:, -1:].expand(-1, ids.shape[1] - 13, -1)], dim=1)
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, gates=gates).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("per_token", [False, True])
def test_only_the_tokens_after_a_cache_are_given(model: GatedWarmthModel, per_token: bool) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.4, 0.0]])
    gates = rows
    if per_token:
        gates = rows[:, None].repeat(1, 13, 1)
        gates[:, :8] = 0
    whole = model.generate(IDS, gates=gates, **({} if per_token else {"gate_start": 8}), **PLAIN)
    with torch.no_grad():
        cache = model(IDS[:, :5], cache=DynamicCache(), use_cache=True).cache
    part = {"gates": gates[:, 5:]} if per_token else {"gates": rows, "gate_start": 3}
    rest = model.generate(IDS[:, 5:], attention_mask=torch.ones(3, 13), cache=cache, **part, **PLAIN)
    assert torch.equal(rest[:, 8:], whole[:, 13:])


class Fixed:
    """A router that always says the same."""

    traits = ("warmth", "neutral")

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def probabilities(self, conversations: Sequence[Sequence[Message]], read_hidden: ReadHidden | None) -> np.ndarray:
        return np.tile([self.probability, 1 - self.probability], (len(conversations), 1))

    def save(self, folder: str | Path) -> None: ...

    def describe(self) -> str:
        return "fixed"


def test_the_router_gives_the_gates(adapters: dict[str, Path], model: GatedWarmthModel) -> None:
    routed = GatedWarmthModel.from_pretrained(tiny_llama(), adapters, router=Fixed(0.75), tokenizer=byte_tokenizer())
    expected = model.generate(IDS, gates={"warmth": 0.75, "neutral": 0.25}, **PLAIN)
    assert torch.equal(routed.generate(IDS, **PLAIN), expected)
    with routed.override(warmth=0.0, neutral=0.0):
        assert torch.equal(routed.generate(IDS, **PLAIN), model.generate(IDS, gates={}, **PLAIN))


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"num_return_sequences": 2, **SAMPLING}], ids=str)
def test_a_handoff_changes_only_later_tokens(adapters: dict[str, Path], settings: dict[str, Any]) -> None:
    made = GatedWarmthModel.from_pretrained(
        tiny_llama(), adapters, router=Fixed(1.0), policy="handoff", tokenizer=byte_tokenizer()
    )
    made.policy = type(made.policy)("handoff", tokens=4)
    torch.manual_seed(3)
    got = made.generate(IDS, **{**PLAIN, **settings})
    repeats = got.shape[0] // 3
    gates = torch.zeros(got.shape[0], got.shape[1], 2)
    gates[:, 12:17, 0] = 1.0
    gates[:, 17:, 1] = 1.0
    torch.manual_seed(3)
    ids = IDS.repeat_interleave(repeats, 0)
    with torch.no_grad():
        logits = made(got, gates=gates).logits
        if not settings.get("do_sample"):
            assert torch.equal(logits[:, 12:-1].argmax(-1), got[:, 13:])
        step = made.generate(ids, gates=gates[:, :13], **{**PLAIN, **settings, "num_return_sequences": 1})
    assert torch.equal(step[:, :17], got[:, :17])  # the opening, under the opening's gates


def test_threads_get_what_they_get_alone(model: GatedWarmthModel) -> None:
    wanted = [{"warmth": 1.0}, {"neutral": 1.0}, {}]
    alone = [model.generate(IDS, gates=gates, **PLAIN) for gates in wanted]
    found: dict[tuple[int, int], Tensor] = {}
    barrier = threading.Barrier(len(wanted))

    def work(index: int) -> None:
        barrier.wait()
        for turn in range(3):
            found[index, turn] = model.generate(IDS, gates=wanted[index], **PLAIN)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(alone[index], tokens) for (index, _), tokens in found.items())


def test_an_error_in_one_call_leaves_no_gates_behind(model: GatedWarmthModel) -> None:
    def fail(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyboardInterrupt

    before = model(IDS).logits
    with pytest.raises(KeyboardInterrupt):
        model.generate(IDS, gates=MIX, logits_processor=[fail], **PLAIN)
    assert torch.equal(model(IDS).logits, before)


# --- training


def trained(adapters: dict[str, Path]) -> GatedWarmthModel:
    model = GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=byte_tokenizer())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".a", ".b")))
    return model.train()


def test_checkpointed_passes_under_several_gates_share_a_backward_pass(adapters: dict[str, Path]) -> None:
    found = []
    for checkpointed in (False, True):
        model = trained(adapters)
        if checkpointed:
            model.gradient_checkpointing_enable()
        losses = [model(IDS, gates=gates, labels=IDS, use_cache=False).loss for gates in ({"warmth": 1.0}, MIX, None)]
        torch.stack(losses[:2]).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all((found[0][name] - found[1][name]).abs().max() < 1e-6 for name in found[0])
    assert max(gradient.abs().max() for gradient in found[0].values()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accelerate", "fsdp"])
def test_two_processes_get_the_gradients_of_one(way: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = two_processes.gated(str(adapters["warmth"]))
    two_processes.loss_of(model).backward()
    expected = dict(two_processes.gradients(model))
    script, target = Path(two_processes.__file__), tmp_path / "gradients.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    run = [*command, way, str(adapters["warmth"]), str(target)]
    # Not in the repository's root: `python -m` puts that on the path, where kernels/ shadows the package of that name.
    subprocess.run(run, cwd=tmp_path, env=environment, check=True, timeout=280)
    found = load_file(target)
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).abs().max() < 1e-6 for name in found)


# --- compiled, quantised, evaluated


@pytest.fixture
def no_recompiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decoding(model: GatedWarmthModel, backend: str, no_recompiling: None) -> None:
    config = CompileConfig(backend=backend, mode=None, fullgraph=False, dynamic=False)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    for gates in (MIX, {"neutral": 1.0}, torch.tensor([[1.0, 0.0], [0.2, 0.8], [0.0, 0.0]]), {}):
        plain = model.generate(IDS, gates=gates, gate_start=8, **PLAIN)
        assert torch.equal(model.generate(IDS, gates=gates, gate_start=8, **PLAIN, **compiled), plain)
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.generate(IDS, gates={"warmth": 0.9}, gate_start=8, **PLAIN, **compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen


@pytest.mark.slow
def test_a_compiled_forward_of_the_base(adapters: dict[str, Path], no_recompiling: None) -> None:
    base = tiny_llama()
    model = GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer())
    plain = model.generate(IDS, gates=MIX, **PLAIN)
    base.forward = torch.compile(base.forward, backend="aot_eager", dynamic=True)
    assert torch.equal(model.generate(IDS, gates=MIX, **PLAIN), plain)


def assert_gates_act_on(base: PreTrainedModel, adapters: dict[str, Path], device: str) -> None:
    """Gate 0 is the quantised base bitwise; an adapter adds to it what it adds to a plain one, nearly."""
    ids = IDS.to(device)
    with torch.no_grad():
        bare = base(ids).logits
        model = GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer())
        assert torch.equal(model(ids, gates={}).logits, bare)
        got = model(ids, gates=MIX).logits.float()
        plain = tiny_llama().to(device)
        full = GatedWarmthModel.from_pretrained(plain, adapters, tokenizer=byte_tokenizer())(ids, gates=MIX).logits
        few = model(ids[:1, :3], gates=MIX).logits.float()
    assert (got - full).abs().max() < 0.1 * full.abs().max() < (got - bare.float()).abs().max()
    assert (few - got[:1, :3]).abs().max() < 0.02 * full.abs().max()
    assert model.unwrap() is base


def test_an_int8_base_of_torchao(adapters: dict[str, Path]) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = tiny_llama()
    quantization.quantize_(base.model.layers, quantization.Int8WeightOnlyConfig())
    assert_gates_act_on(base, adapters, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' 4-bit layers need a GPU")
def test_a_4_bit_base_of_bitsandbytes(adapters: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cuda")
    assert_gates_act_on(base.eval(), adapters, "cuda")


def test_a_loop_of_ones_own_may_leave_the_prompt_on_the_base(model: GatedWarmthModel) -> None:
    rows = torch.tensor([[0.6, 0.3], [0.2, 0.9], [1.0, 0.0]])
    with torch.no_grad():
        with model.gates_in_force(rows, batch=3, start=8):
            own = model.base(input_ids=IDS, use_cache=False).logits
        gates = rows[:, None].repeat(1, IDS.shape[1], 1)
        gates[:, :8] = 0
        assert torch.equal(own[:, :8], model.base(input_ids=IDS, use_cache=False).logits[:, :8])
        assert not torch.allclose(own[:, 8], model.base(input_ids=IDS, use_cache=False).logits[:, 8], atol=1e-3)
        assert torch.allclose(own, model(input_ids=IDS, gates=gates, use_cache=False).logits, atol=1e-5)


@pytest.mark.slow
def test_lm_evaluation_harness_reads_the_same_from_gate_0_and_the_base(adapters: dict[str, Path]) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    words = ["warm", "cold", "a longer answer", "no", "five"]
    asked = [(f"Question {n}: is it {words[n % 5]}?", f" {words[(n + 1) % 5]}") for n in range(50)]
    requests = [instance("loglikelihood", {}, arguments=pair, idx=n) for n, pair in enumerate(asked)]
    model = GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=byte_tokenizer())
    with model.gates_in_force(dict.fromkeys(model.traits, 0.0)):
        gated = harness.HFLM(pretrained=model.base, tokenizer=model.tokenizer, device="cpu").loglikelihood(requests)
    base = harness.HFLM(pretrained=model.unwrap(), tokenizer=model.tokenizer, device="cpu").loglikelihood(requests)
    assert gated == base
