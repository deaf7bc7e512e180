"""The gated-LoRA op: several LoRAs added to one linear layer, each weighed per token by its gate."""

from gatedwarmth.kernels.op import gated_lora, gated_lora_siblings
from gatedwarmth.kernels.reference import gated_lora_reference

__all__ = ["gated_lora", "gated_lora_reference", "gated_lora_siblings"]
