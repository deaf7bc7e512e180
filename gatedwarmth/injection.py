"""Put GatedLinear in the place of a base's target modules, and take it out again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gatedwarmth.adapters import Adapter, LoraWeights
from gatedwarmth.errors import AdapterError
from gatedwarmth.gates import GatesInForce
from gatedwarmth.layers import GatedLinear, Sees, Siblings

# Modules of one parent that read the same tensor, in the order in which transformers calls them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


# What transformers calls the linear layer that chooses a token's experts; adapters leave it alone unless they name it.
ROUTERS = {"gate", "router", "router_gate", "shared_expert_gate", "modality_router", "wg"}


@dataclass
class Injection:
    """The gated layers of one base: module path → GatedLinear, and what they replaced."""

    layers: dict[str, GatedLinear]
    in_force: GatesInForce

    def remove(self, base: nn.Module) -> None:
        """Put every original module back; the adapters keep storage of their own."""
        for path, layer in self.layers.items():
            layer.siblings.split()
            _set_module(base, path, layer.base)
        self.layers = {}

    def forget(self) -> None:
        """Drop what siblings hold for one another after a pass."""
        for layer in self.layers.values():
            layer.siblings.forget()

    def adapter(self, trait: int, config: dict[str, object]) -> Adapter:
        """The weights of one trait as they are now. Of a sharded model all processes have to ask together."""
        weights: dict[str, LoraWeights] = {}
        for path, layer in self.layers.items():
            if layer.ranks[trait]:
                a = whole(layer.a).split(layer.ranks)[trait]
                b = whole(layer.b).split(layer.ranks, dim=1)[trait]
                weights[path] = LoraWeights(a, b, layer.scalings[trait])
        return Adapter(weights, dict(config))


def whole(tensor: Tensor) -> Tensor:
    """The detached tensor, put together from all processes where FSDP has sharded it."""
    if not torch.distributed.is_available():
        return tensor.detach()
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def inject(base: nn.Module, adapters: Mapping[str, Adapter]) -> Injection:
    """Replace the modules that the adapters name. Checks everything before it changes anything.

    Raises
    ------
    AdapterError: a target module that this base lacks, of another size, or of a kind that has no linear output.
    """
    paths = _paths_in_model_order(base, adapters)
    for name, adapter in adapters.items():
        _check(base, name, adapter)
    in_force = GatesInForce()
    stacked = list(adapters.values())
    layers = {path: _gated(base.get_submodule(path), path, stacked, in_force, _sees(base, path)) for path in paths}
    for path, layer in layers.items():
        _set_module(base, path, layer)
    _group(layers)
    return Injection(layers, in_force)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that a LoRA can stand beside, None for any other.

    Quantised linears (torchao, bitsandbytes) are subclasses of nn.Linear or keep its in_features and out_features.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _check(base: nn.Module, name: str, adapter: Adapter) -> None:
    modules = dict(base.named_modules())
    if any(isinstance(module, GatedLinear) for module in modules.values()):
        raise AdapterError("this base is already gated; unwrap() the model around it first, or wrap a fresh base")
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise AdapterError("this model carries PEFT layers; merge_and_unload() or unload() them, then wrap the base")
    missing = [path for path in adapter.layers if path not in modules]
    if missing:
        raise AdapterError(
            f"adapter {name!r} targets {missing[0]!r} ({len(missing)} of its {len(adapter.layers)} modules are not in "
            f"this {type(base).__name__}); it was trained on {adapter.base_name or 'another base'}: load that base"
        )
    for path, layer in adapter.layers.items():
        shape = linear_shape(modules[path])
        if shape is None:
            raise AdapterError(
                f"adapter {name!r} targets {path!r}, a {type(modules[path]).__name__}; only linear layers can be gated"
            )
        if shape != (layer.a.shape[1], layer.b.shape[0]):
            raise AdapterError(
                f"adapter {name!r}: {path!r} maps {layer.a.shape[1]} to {layer.b.shape[0]} features, this base's "
                f"{shape[0]} to {shape[1]}; it was trained on {adapter.base_name or 'another base'}: load that base"
            )


def _paths_in_model_order(base: nn.Module, adapters: Mapping[str, Adapter]) -> list[str]:
    wanted = {path for adapter in adapters.values() for path in adapter.layers}
    return [path for path, _ in base.named_modules() if path in wanted]


def _gated(module: nn.Module, path: str, adapters: list[Adapter], in_force: GatesInForce, sees: Sees) -> GatedLinear:
    n_in, n_out = linear_shape(module) or (0, 0)
    device, dtype = _placement(module, path)
    parts = [adapter.layers.get(path) or _nothing(adapter, n_in, n_out) for adapter in adapters]
    a = torch.cat([part.a.to(device, dtype) for part in parts])
    b = torch.cat([part.b.to(device, dtype) for part in parts], dim=1)
    ranks = tuple(part.rank for part in parts)
    return GatedLinear(module, a, b, ranks, tuple(part.scaling for part in parts), in_force, sees)


def _sees(base: nn.Module, path: str) -> Sees:
    """The output layer sees what logits_to_keep leaves; a list of modules inside a decoder layer is one of experts."""
    if base.get_submodule(path) is base.get_output_embeddings():  # type: ignore[operator]
        return "last"
    names = path.split(".")
    lists = sum(isinstance(base.get_submodule(".".join(names[:n])), nn.ModuleList) for n in range(1, len(names)))
    return "some" if lists > 1 else "all"


def _placement(module: nn.Module, path: str) -> tuple[torch.device, torch.dtype]:
    """Adapters live where the base weight lives, in its dtype; beside a quantised weight in float32."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if weight.device.type == "meta":
        raise AdapterError(f"the weight of {path!r} is not in memory (offloaded); load the base without offloading")
    return weight.device, weight.dtype if plain else torch.float32


def _nothing(adapter: Adapter, n_in: int, n_out: int) -> LoraWeights:
    """Rank 0, with the adapter's usual scaling: siblings share their work only when their scalings agree."""
    usual = next((layer.scaling for layer in adapter.layers.values()), 1.0)
    return LoraWeights(torch.zeros(0, n_in), torch.zeros(n_out, 0), usual)


def _group(layers: dict[str, GatedLinear]) -> None:
    """Siblings are linked when they share a parent, an input width, scalings and a place."""
    for path in layers:
        parent, _, name = path.rpartition(".")
        family = next((names for names in SIBLINGS if names[0] == name), ())
        members = [layers[f"{parent}.{n}"] for n in family if f"{parent}.{n}" in layers]
        alike = {(m.in_features, m.scalings, m.a.dtype, m.a.device) for m in members}
        if len(members) > 1 and len(alike) == 1:
            shared = Siblings(members)
            for member in members:
                member.siblings = shared


def _set_module(base: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    base.get_submodule(parent).register_module(name, module)


def fresh_adapter(base: nn.Module, rank: int, alpha: float, targets: Sequence[str] = (), seed: int = 0) -> Adapter:
    """A new adapter that acts as zero: lora_A random (Kaiming, as PEFT), lora_B zero, float32.

    targets: ends of module names such as "q_proj"; empty means every linear layer inside the decoder layers but the
        routers of a mixture of experts.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path in target_paths(base, targets):
        n_in, n_out = linear_shape(base.get_submodule(path)) or (0, 0)
        bound = 1 / math.sqrt(n_in)  # kaiming_uniform with a = sqrt(5)
        a = (torch.rand(rank, n_in, generator=generator) * 2 - 1) * bound
        layers[path] = LoraWeights(a, torch.zeros(n_out, rank), alpha / rank)
    names = sorted({path.rpartition(".")[2] for path in layers})
    return Adapter(layers, {"target_modules": names, "task_type": "CAUSAL_LM"})


def target_paths(base: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Paths of the linear layers that `targets` name, or of all inside the decoder layers but routers of experts.

    Raises
    ------
    AdapterError: a target that no linear layer of this base has.
    """
    stack = decoder_layers(base)
    prefix = next(path for path, module in base.named_modules() if module is stack) + "."
    linear = [path for path, module in base.named_modules() if linear_shape(module)]
    if not targets:
        inside = [path for path in linear if path.startswith(prefix)]
        return [path for path in inside if path.rpartition(".")[2] not in ROUTERS]
    for target in targets:
        if not any(_ends_with(path, target) for path in linear):
            names = sorted({path.rpartition(".")[2] for path in linear})
            raise AdapterError(f"no linear layer of this base is called {target!r}; it has {', '.join(names)}")
    return [path for path in linear if any(_ends_with(path, target) for target in targets)]


def decoder_layers(base: nn.Module) -> nn.ModuleList:
    """The base's stack of decoder layers: the first module list as long as the configuration says."""
    count = base.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    decoder: nn.Module = base.get_decoder()  # type: ignore[operator]
    for module in decoder.modules():  # not the base's: a vision tower may have a list of the same length
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise AdapterError(f"{type(base).__name__} has no list of {count} decoder layers; name the target modules yourself")


def _ends_with(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)
