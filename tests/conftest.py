"""Fixtures: a tiny random Llama, a byte tokenizer, and two adapters that PEFT wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import byte_tokenizer, peft_adapter, tiny_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two traits of unequal rank, one of them on the attention only."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "warmth": peft_adapter(tiny_llama(), folder / "warm", 1, r=6, lora_alpha=12),
        "neutral": peft_adapter(
            tiny_llama(), folder / "cool", 2, r=3, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    }
