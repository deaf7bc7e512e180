"""What is read from PEFT folders equals PEFT's own outputs, and what cannot be gated exactly is refused by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, peft_adapter, tiny_llama
from torch import Tensor

from gatedwarmth import GatedWarmthModel
from gatedwarmth.adapters import Adapter, LoraWeights, load_adapter, save_adapter
from gatedwarmth.errors import AdapterError
from gatedwarmth.injection import fresh_adapter

CLOSE = 1e-5
IDS = torch.randint(4, 250, (2, 11), generator=torch.Generator().manual_seed(5))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def wrapped(*sources: Path | Adapter) -> GatedWarmthModel:
    named = {f"trait {index}": source for index, source in enumerate(sources)}
    return GatedWarmthModel.from_pretrained(tiny_llama(), named, tokenizer=byte_tokenizer())


def peft_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_llama(), folder).eval()(IDS).logits


def assert_equal_to_peft(folder: Path) -> None:
    with torch.no_grad():
        got = wrapped(folder)(IDS, gates={"trait 0": 1.0}).logits
    expected = peft_logits(folder)
    assert (got - expected).abs().max() < CLOSE < (expected - tiny_llama()(IDS).logits).abs().max()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {
        "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 7, "layers.0.self_attn.v_proj": 1}
    },
    "alpha_pattern": {"alpha_pattern": {"k_proj": 32, "layers.2.mlp.down_proj": 1}},
    "both patterns": {"rank_pattern": {"(q|k)_proj": 2}, "alpha_pattern": {"q_proj": 3, "o_proj": 20}},
    "rsLoRA": {"use_rslora": True},
    "rsLoRA, rank_pattern": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"down_proj": 5}},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "a regular expression": {"target_modules": r".*\.(1|2)\..*(q_proj|down_proj)"},
    "without some": {"exclude_modules": ["q_proj"]},
    "dropout": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_what_peft_writes_acts_as_in_peft_and_survives_saving(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = peft_adapter(tiny_llama(), tmp_path / "theirs", 1, **settings)
    assert_equal_to_peft(folder)
    wrapped(folder).save_pretrained(tmp_path / "model")
    ours = tmp_path / "model" / "adapters" / "trait 0"
    assert torch.allclose(peft_logits(ours), peft_logits(folder), atol=CLOSE)
    assert_equal_to_peft(ours)


def test_an_adapter_trained_by_peft_and_one_trained_here_are_equal_in_both(tmp_path: Path) -> None:
    theirs = get_peft_model(
        tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    theirs.save_pretrained(tmp_path / "start")
    ours = wrapped(tmp_path / "start")
    for model, settings in ((theirs.train(), {}), (ours, {"gates": {"trait 0": 1.0}})):
        trained = [p for name, p in model.named_parameters() if "lora_" in name or name.endswith((".a", ".b"))]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimiser = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS, **settings).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    theirs.eval().save_pretrained(tmp_path / "theirs")
    save_adapter(ours.adapter("trait 0"), tmp_path / "ours")
    assert (peft_logits(tmp_path / "ours") - peft_logits(tmp_path / "theirs")).abs().max() < CLOSE
    assert_equal_to_peft(tmp_path / "theirs")
    assert_equal_to_peft(tmp_path / "ours")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "LoRA bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on an embedding"),
    "output layer": ({"target_modules": ["q_proj", "lm_head"]}, "save_embedding_layers=False"),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}, "trainable_token"),
    "parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.down_proj.weight"]},
        "target_parameters",
    ),
    "PiSSA": ({"init_lora_weights": "pissa"}, "pissa.*changes the base"),
    "OLoRA": ({"init_lora_weights": "olora"}, "olora.*changes the base"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "aLoRA"),
}


@pytest.mark.parametrize(("settings", "match"), REFUSED.values(), ids=REFUSED)
def test_kinds_that_cannot_be_gated_are_refused_by_name(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder = peft_adapter(tiny_llama(), tmp_path / "a", 1, **settings)
    with pytest.raises(AdapterError, match=match):
        load_adapter(folder)


def test_weights_of_a_refused_kind_are_refused_even_when_the_config_hides_it(tmp_path: Path) -> None:
    folder = peft_adapter(tiny_llama(), tmp_path / "a", 1, use_dora=True)
    edit_config(folder, use_dora=False)
    with pytest.raises(AdapterError, match="lora_magnitude_vector.*DoRA"):
        load_adapter(folder)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def put_nan(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def put_infinity(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("inf")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "truncated or damaged"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "truncated or damaged"),
    "pickled": (to_pickle, "adapter_model.bin is pickled and never read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not JSON"),
    "another method": (lambda folder: edit_config(folder, peft_type="IA3"), "peft_type is 'IA3'"),
    "NaN": (lambda folder: edit_weights(folder, put_nan), "NaN or infinite"),
    "infinity": (lambda folder: edit_weights(folder, put_infinity), "NaN or infinite"),
    "half a layer": (lambda folder: edit_weights(folder, lambda t: t.pop(sorted(t)[0])), "lora_B only"),
    "nothing inside": (lambda folder: edit_weights(folder, dict.clear), "holds no LoRA weights"),
    "unlike ranks": (
        lambda folder: edit_weights(folder, lambda t: t.update({sorted(t)[0]: torch.zeros(2, 48)})),
        "do not fit",
    ),
}


@pytest.mark.parametrize(("damage", "match"), BROKEN.values(), ids=BROKEN)
def test_broken_folders_say_what_is_wrong(damage: Callable[[Path], object], match: str, tmp_path: Path) -> None:
    folder = peft_adapter(tiny_llama(), tmp_path / "a", 1, target_modules=["q_proj"])
    damage(folder)
    with pytest.raises(AdapterError, match=match):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "nothing"])
def test_a_folder_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(AdapterError, match=f"no adapter folder at '{name}'"):
        load_adapter(name)


def layer(n_in: int, n_out: int) -> LoraWeights:
    return LoraWeights(torch.zeros(2, n_in), torch.zeros(n_out, 2), 1.0)


def test_another_base_is_refused_before_anything_changes() -> None:
    base = tiny_llama()
    modules = [type(module) for module in base.modules()]
    fits = {"model.layers.0.self_attn.q_proj": layer(48, 48)}
    origin = {"base_model_name_or_path": "them/other-1B"}
    bad = {
        "is not in": {**fits, "model.layers.9.self_attn.q_proj": layer(48, 48)},
        "maps 64 to 48 features, this base's 48 to 48": {"model.layers.0.self_attn.q_proj": layer(64, 48)},
        "a LlamaRMSNorm; only linear": {"model.layers.0.input_layernorm": layer(48, 48)},
        "a Embedding; only linear": {"model.embed_tokens": layer(48, 48)},
    }
    for match, layers in bad.items():
        adapters = {"good": Adapter(fits), "bad": Adapter(layers, origin)}
        with pytest.raises(AdapterError, match=match.replace("is not in", "are not in")) as caught:
            GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer())
        assert "only linear" in match or "trained on them/other-1B: load that base" in str(caught.value)
        assert [type(module) for module in base.modules()] == modules


def test_a_base_of_another_name_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    adapter = Adapter({"model.layers.0.self_attn.q_proj": layer(48, 48)}, {"base_model_name_or_path": "them/other-1B"})
    base = tiny_llama()
    base.config._name_or_path = "us/this-1B"
    with caplog.at_level(logging.WARNING, "gatedwarmth"):
        GatedWarmthModel.from_pretrained(base, {"a": adapter}, tokenizer=byte_tokenizer())
    assert "was trained on 'them/other-1B'" in caplog.text


def test_gated_and_peft_models_are_not_wrapped_again(adapters: dict[str, Path]) -> None:
    model = wrapped(adapters["warmth"])
    with pytest.raises(AdapterError, match="already gated; unwrap"):
        GatedWarmthModel.from_pretrained(model.base, adapters, tokenizer=byte_tokenizer())
    peft = PeftModel.from_pretrained(tiny_llama(), adapters["warmth"])
    with pytest.raises(AdapterError, match="carries PEFT layers"):
        GatedWarmthModel.from_pretrained(peft.get_base_model(), adapters, tokenizer=byte_tokenizer())
    model.unwrap()
    again = GatedWarmthModel.from_pretrained(model.base, adapters, tokenizer=byte_tokenizer())
    with torch.no_grad():
        assert (again(IDS, gates={"warmth": 1.0}).logits - peft_logits(adapters["warmth"])).abs().max() < CLOSE


def test_traits_on_disjoint_layers_and_tied_embeddings(tmp_path: Path) -> None:
    one = peft_adapter(tiny_llama(), tmp_path / "one", 1, r=2, target_modules=["q_proj"])
    adapter = fresh_adapter(tiny_llama(), 5, 10, ["k_proj", "gate_proj", "lm_head"])
    for weights in adapter.layers.values():
        weights.b.normal_(std=0.2)
    two = tmp_path / "two"
    save_adapter(adapter, two)
    model = wrapped(one, two)
    embedding = model.base.get_input_embeddings().weight
    assert model.base.lm_head.weight is embedding
    with torch.no_grad():
        for trait, folder in (("trait 0", one), ("trait 1", two)):
            assert (model(IDS, gates={trait: 1.0}).logits - peft_logits(folder)).abs().max() < CLOSE
    base = model.unwrap()
    assert base.lm_head.weight is base.get_input_embeddings().weight is embedding
