"""One tiny random model per architecture: no download, two or three layers, 32 wide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SPECIALS = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.1}
COMMON = {
    **SPECIALS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "sliding_window": None}
WINDOW = {"sliding_window": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Architecture:
    """How to configure it; `most` and `some` are the targets of the two traits; `why` it is on the list."""

    config: Callable[[], PretrainedConfig]
    some: tuple[str, ...]
    why: str
    most: str | tuple[str, ...] = "all-linear"

    def build(self, seed: int = 0) -> PreTrainedModel:
        """The same weights at every call with the same seed."""
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config()).eval()


# PEFT's "all-linear" would reach the fused experts, which cannot be gated.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QVD = ("q_proj", "v_proj", "down_proj")
ARCHITECTURES = {
    "Llama": Architecture(lambda: hf.LlamaConfig(**COMMON, tie_word_embeddings=True), QVD, "tied embeddings"),
    "Mistral": Architecture(lambda: hf.MistralConfig(**COMMON, **WINDOW), QVD, "sliding window"),
    "Qwen2": Architecture(lambda: hf.Qwen2Config(**COMMON), QVD, "biases on q, k, v"),
    "Qwen3": Architecture(lambda: hf.Qwen3Config(**COMMON, head_dim=8), QVD, "norms on q and k"),
    "Gemma 2": Architecture(
        lambda: hf.Gemma2Config(**COMMON, **WINDOW, head_dim=8, query_pre_attn_scalar=8), QVD, "soft caps, windows"
    ),
    "Gemma 3": Architecture(
        lambda: hf.Gemma3TextConfig(
            **COMMON, **WINDOW, head_dim=8, layer_types=["sliding_attention", "full_attention"]
        ),
        QVD,
        "a cache of two kinds of layers",
    ),
    "Phi-3": Architecture(lambda: hf.Phi3Config(**COMMON), ("qkv_proj", "down_proj"), "fused qkv and gate_up"),
    "GPT-2": Architecture(
        lambda: hf.GPT2Config(**SPECIALS, **GPT2, **NO_DROPOUT), ("c_attn", "c_fc"), "Conv1D, learned positions"
    ),
    "GPT-NeoX": Architecture(
        lambda: hf.GPTNeoXConfig(**{**COMMON, "num_key_value_heads": 4}),
        ("query_key_value", "dense_4h_to_h"),
        "fused qkv, attention and MLP in parallel",
    ),
    "Falcon": Architecture(
        lambda: hf.FalconConfig(
            **SPECIALS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_hidden_size=48,
            max_position_embeddings=256,
        ),
        ("query_key_value", "dense_4h_to_h"),
        "a linear class of its own, one key head",
    ),  # fmt: skip
    "OLMo 2": Architecture(lambda: hf.Olmo2Config(**COMMON), QVD, "norms after the blocks"),
    "Granite": Architecture(
        lambda: hf.GraniteConfig(
            **COMMON, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0
        ),
        QVD,
        "multipliers",
    ),
    "Mixtral": Architecture(
        lambda: hf.MixtralConfig(**COMMON, **MOE, num_local_experts=4),
        ("q_proj", "o_proj"),
        "mixture of experts",
        ATTENTION,
    ),
    "Qwen2-MoE": Architecture(
        lambda: hf.Qwen2MoeConfig(
            **{**COMMON, **MOE},
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
        ),
        ("q_proj", "down_proj"),
        "shared expert with its gate, dense and sparse layers",
        (*ATTENTION, "gate_proj", "up_proj", "down_proj"),
    ),  # fmt: skip
}
