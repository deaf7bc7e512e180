"""Training an adapter: it learns, PEFT loads the result, a finished run is kept and a killed one goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import byte_tokenizer, tiny_llama

from gatedwarmth import GatedWarmthModel
from gatedwarmth.bases import Base
from gatedwarmth.data import Pair
from gatedwarmth.errors import TrainingError
from gatedwarmth.train import adapter as training
from gatedwarmth.train.adapter import AdapterSettings, AdapterTrainer, Collator, example_of, train_adapter

SETTINGS = AdapterSettings("warm", rank=4, lr=2e-2, epochs=4, batch_size=2, save_steps=2, dropout=0.0)


def base() -> Base:
    return Base(tiny_llama(), byte_tokenizer(), "a test", "tiny")


def pairs() -> list[Pair]:
    texts = ["rain", "my cat", "tea", "night shift"]
    return [
        Pair(f"p-{i}", "social", "small", [{"role": "user", "content": t}], {"neutral": "ok.", "warm": f"oh, {t}!"})
        for i, t in enumerate(texts, start=1)
    ]


def test_learns_and_loads_in_peft_alone(tmp_path: Path) -> None:
    report = train_adapter(base(), pairs(), tmp_path / "warm", SETTINGS, dev=pairs())
    assert report["dev_loss_after"] < 0.97 * report["dev_loss_before"]
    ids = torch.randint(4, 250, (2, 9))
    gated = GatedWarmthModel.from_pretrained(tiny_llama(), {"warmth": tmp_path / "warm"}, tokenizer=byte_tokenizer())
    peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "warm").eval()
    with torch.no_grad():
        expected, got = peft(ids).logits, gated(ids, gates={"warmth": 1.0}).logits
    effect = (expected - tiny_llama()(ids).logits).abs().max()
    assert (got - expected).abs().max() < 5e-5 < 1e-2 * effect  # rounding: 1.3e-5 with AVX-512


def test_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train_adapter(base(), pairs(), tmp_path / "warm", SETTINGS)

    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "_run", never)
    assert train_adapter(base(), pairs(), tmp_path / "warm", SETTINGS) == first
    with pytest.raises(AssertionError, match="trained again"):
        train_adapter(base(), pairs(), tmp_path / "warm", dataclasses.replace(SETTINGS, lr=1e-2))


def test_killed_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_adapter(base(), pairs(), tmp_path / "whole", SETTINGS)
    steps: list[int] = []
    original = AdapterTrainer.compute_loss

    def counted(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        steps.append(int(self.state.global_step))
        if len(steps) == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "compute_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(base(), pairs(), tmp_path / "cut", SETTINGS)
    train_adapter(base(), pairs(), tmp_path / "cut", SETTINGS)
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]  # from the checkpoint of step 4 on
    saved = [training.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.allclose(saved[0][key], saved[1][key], atol=1e-5) for key in saved[0])


def test_prompt_without_gradient_gives_the_same_gradients(tmp_path: Path) -> None:
    loaded = base()
    examples = [example_of(loaded.tokenizer, pair, SETTINGS) for pair in pairs()]
    batch = Collator(0)(examples)
    adapter = training.fresh_adapter(loaded.model, 4, 8.0)
    gradients = []
    for split in (batch["split"], 0):
        model = GatedWarmthModel(base(), {"trait": adapter})
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        layer = model.injection.layers["model.layers.1.self_attn.v_proj"]
        layer.b.requires_grad_(True)
        loss = AdapterTrainer.compute_loss(None, model, {**batch, "split": split})  # type: ignore[arg-type]
        loss.backward()
        assert layer.b.grad is not None
        gradients.append(layer.b.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 < gradients[0].abs().max()


def test_missing_style_and_no_pairs_are_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="validating"):
        train_adapter(base(), pairs(), tmp_path / "x", dataclasses.replace(SETTINGS, style="validating"))
    with pytest.raises(TrainingError, match="no pair"):
        train_adapter(base(), [], tmp_path / "x", SETTINGS)
    assert not list(tmp_path.iterdir())
