"""PEFT adapter folders and their weights: read, check, write, blend. Adapters stay loadable by PEFT alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gatedwarmth.errors import AdapterError
from gatedwarmth.files import write_folder_atomic, write_json_atomic

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_KEY = re.compile(rf"^{re.escape(PREFIX)}(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Initialisations after which PEFT subtracts the adapter from the base: alone it means another function.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA (use_dora): its norm couples the base and the adapter, so gates cannot weigh it",
    "lora_embedding": "LoRA on an embedding: leave embeddings out of target_modules",
    "modules_to_save": "modules_to_save: whole modules replaced by trained copies cannot be gated",
    "lora_B.bias": "lora_bias: leave it off",
    "trainable_tokens": "trainable_token_indices: train without them",
    "base_layer.weight": "a copy of the base's embeddings: save it with save_embedding_layers=False",
    "embed_tokens.weight": "a copy of the base's embeddings: save it with save_embedding_layers=False",
    "base_layer": "trained base biases: train with bias='none'",
}


@dataclass(frozen=True)
class LoraWeights:
    """One layer of an adapter: a [rank, in], b [out, rank], delta W = scaling · b · a."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module path in the base → weights; `config` as in PEFT's adapter_config.json."""

    layers: dict[str, LoraWeights]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")


def load_adapter(source: str | Path) -> Adapter:
    """Read a PEFT LoRA folder, or fetch one from the hub by name.

    Raises
    ------
    AdapterError: a missing or truncated file, pickled weights, NaN, or a kind that cannot be gated exactly.
    """
    folder = _local_folder(source)
    config = _read_config(folder)
    tensors = _read_weights(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    refused = [key for key in tensors if not _KEY.match(key)]
    if refused:
        raise AdapterError(f"{folder}: {_why_refused(refused)}")
    for key, tensor in tensors.items():
        if match := _KEY.match(key):
            layers.setdefault(match["path"], {})[match["side"]] = tensor
    if not layers:
        raise AdapterError(f"{folder / WEIGHTS} holds no LoRA weights")
    return Adapter({path: _layer(folder, path, sides, config) for path, sides in layers.items()}, config)


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write a PEFT folder, whole or not at all."""

    def fill(target: Path) -> None:
        tensors: dict[str, Tensor] = {}
        for path, layer in adapter.layers.items():
            tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.a.detach().contiguous().cpu().clone()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.b.detach().contiguous().cpu().clone()
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        write_json_atomic(target / CONFIG, peft_config(adapter))

    write_folder_atomic(folder, fill)


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The adapter_config.json that makes PEFT rebuild every layer's rank and scaling."""
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    alphas = {path: layer.scaling * layer.rank for path, layer in adapter.layers.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        **adapter.config,
        "peft_type": "LORA",
        "task_type": adapter.config.get("task_type", "CAUSAL_LM"),
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": False,
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): _number(value) for path, value in alphas.items() if value != alpha},
        "target_modules": _targets(adapter),
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
        "bias": "none",
    }


def blend(adapters: Sequence[Adapter], gates: Sequence[float]) -> Adapter:
    """One adapter that is exactly the mixture at fixed gates: ranks concatenated, as PEFT's `cat` combination.

    Source: sum_e gate_e · scaling_e · B_e A_e = [.. gate_e scaling_e B_e ..] · [.. A_e ..].
    """
    paths = sorted({path for adapter in adapters for path in adapter.layers})
    layers = {}
    for path in paths:
        weighed = zip(adapters, gates, strict=True)
        parts = [(adapter.layers[path], gate) for adapter, gate in weighed if path in adapter.layers]
        a = torch.cat([layer.a for layer, _ in parts])
        b = torch.cat([layer.b * (gate * layer.scaling) for layer, gate in parts], dim=1)
        layers[path] = LoraWeights(a, b, 1.0)
    return Adapter(layers, {"base_model_name_or_path": adapters[0].base_name})


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter with weights of another dtype."""
    layers = {path: replace(w, a=w.a.to(dtype), b=w.b.to(dtype)) for path, w in adapter.layers.items()}
    return replace(adapter, layers=layers)


def _local_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise AdapterError(f"no adapter folder at {str(source)!r}; give a PEFT folder (with {CONFIG}) or a hub name")
    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub client's errors are many; the message is what helps
        raise AdapterError(
            f"{str(source)!r} is no local folder and the hub did not give it ({type(error).__name__}: {error}); "
            "check the name and the network, or give a local PEFT folder"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} has no {CONFIG}, so it is no PEFT adapter; `train adapter` writes one")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise AdapterError(f"{path} is not JSON: {error}; save the adapter again") from None
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA adapters can be gated")
    refused = {
        "use_dora": _OTHER_KINDS["lora_magnitude_vector"],
        "modules_to_save": _OTHER_KINDS["modules_to_save"],
        "lora_bias": _OTHER_KINDS["lora_B.bias"],
        "target_parameters": "target_parameters: LoRA on bare parameters, such as fused experts, cannot be gated",
        "trainable_token_indices": _OTHER_KINDS["trainable_tokens"],
        "layer_replication": "layer_replication: replicated layers share weights",
        "use_qalora": "QALoRA (use_qalora): it pools the layer's input",
        "use_bdlora": "BD-LoRA (use_bdlora): its blocks are no plain product",
        "monteclora_config": "MonteCLoRA (monteclora_config): its weights are drawn at random",
        "kasa_config": "KaSA (kasa_config): it changes the base's weights",
        "arrow_config": "Arrow (arrow_config): its own router would fight the gate",
        "alora_invocation_tokens": "aLoRA: its own switch would fight the gate; train a plain LoRA",
    }
    for key, why in refused.items():
        if config.get(key):
            raise AdapterError(f"{path}: the adapter uses {why}")
    started = str(config.get("init_lora_weights", True)).lower()
    if started.startswith(CHANGE_THE_BASE):
        raise AdapterError(
            f"{path}: init_lora_weights is {started!r}, which changes the base's weights as well; save it with "
            "path_initial_model_for_weight_conversion, as PEFT's documentation shows, to make it a plain LoRA"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias is {config['bias']!r}, and trained biases cannot be gated; use bias='none'")
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is pickled and never read, save with safe_serialization=True" if pickled else ""
        raise AdapterError(f"{folder} has no {WEIGHTS}{hint}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read ({error}); it is truncated or damaged, copy it again") from None


def _layer(folder: Path, path: str, sides: dict[str, Tensor], config: dict[str, Any]) -> LoraWeights:
    if set(sides) != {"A", "B"}:
        raise AdapterError(f"{folder}: layer {path!r} has lora_{'/'.join(sides)} only; the file is incomplete")
    a, b = sides["A"], sides["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise AdapterError(f"{folder}: layer {path!r}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterError(f"{folder}: layer {path!r} holds NaN or infinite weights; training diverged, lower lr")
    alpha = _matching(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", 8))
    rank = a.shape[0]
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraWeights(a, b, float(scaling))


def _matching(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module path, as a regular expression."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def _exactly(path: str) -> str:
    return "^" + re.escape(path)


def _why_refused(keys: Sequence[str]) -> str:
    """What the most telling of some weights is a part of."""
    for part, why in _OTHER_KINDS.items():
        for key in keys:
            if part in key:
                return f"weight {key!r} is of {why}"
    return f"weight {keys[0]!r} is not the lora_A or lora_B of a layer; only plain LoRA on linear layers can be gated"


def _commonest(values: Any) -> Any:
    values = list(values)
    return max(sorted(set(values)), key=values.count)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _targets(adapter: Adapter) -> list[str]:
    """The names that the adapter came with where they say just its layers, else every full path."""
    named = adapter.config.get("target_modules")
    names = set(named) if isinstance(named, list) and not adapter.config.get("layers_to_transform") else set()
    plain = all(path.rpartition(".")[2] in names for path in adapter.layers)
    return sorted(names) if plain else sorted(adapter.layers)
