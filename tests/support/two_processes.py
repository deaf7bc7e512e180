"""One backward pass of a gated model in each of several gloo processes; run by torch.distributed.run.

Arguments: way ("accelerate" or "fsdp"), a PEFT folder, a file to write the gradients of rank 0 to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny import byte_tokenizer, tiny_llama
from torch import Tensor

from gatedwarmth import GatedWarmthModel
from gatedwarmth.adapters import load_adapter
from gatedwarmth.injection import decoder_layers

IDS = torch.randint(4, 250, (4, 9), generator=torch.Generator().manual_seed(5))
GATES = torch.tensor([[1.0], [0.25], [0.0], [0.5]])


def gated(folder: str) -> GatedWarmthModel:
    """A tiny gated model of which only the adapter is trained."""
    model = GatedWarmthModel.from_pretrained(tiny_llama(), {"warmth": folder}, tokenizer=byte_tokenizer())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".a", ".b")))
    return model


def loss_of(model: torch.nn.Module, rank: int = 0, world: int = 1) -> Tensor:
    """The loss of this process's rows."""
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    return model(input_ids=IDS[rows], gates=GATES[rows], labels=IDS[rows]).loss


def gradients(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name.removeprefix("module."), parameter.grad


def with_accelerate(folder: str) -> dict[str, Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(gated(folder))
    accelerator.backward(loss_of(model, accelerator.process_index, accelerator.num_processes))
    return dict(gradients(model))


def with_fsdp(folder: str) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = gated(folder)
    for layer in decoder_layers(model.base):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    stacked = model.injection.layers["model.layers.0.mlp.down_proj"].a
    assert stacked.to_local().numel() * dist.get_world_size() == stacked.numel()
    read, kept = load_adapter(folder), model.adapter("warmth")
    assert all(torch.equal(read.layers[path].b, layer.b) for path, layer in kept.layers.items())
    loss_of(model, dist.get_rank(), dist.get_world_size()).backward()
    return {name: gradient.full_tensor() for name, gradient in gradients(model)}


if __name__ == "__main__":
    way, source, target = sys.argv[1:]
    found = {"accelerate": with_accelerate, "fsdp": with_fsdp}[way](source)
    if dist.get_rank() == 0:
        save_file({name: gradient.contiguous() for name, gradient in found.items()}, target)
    dist.destroy_process_group()
