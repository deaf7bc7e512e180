"""What `bench model` compares: the base, the gated model, and the ways to mix LoRAs that PEFT offers today.

Every subject has a copy of the base of its own, so that none sees what another does to its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import Tensor, nn

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.adapters import Adapter, cast, save_adapter
from gatedwarmth.injection import fresh_adapter

Arguments = dict[str, Any]
TRAITS = ("warmth", "neutral")
HEADER = 4  # <|im_start|> assistant and a newline take 3 to 5 tokens
ONE_GATE = torch.tensor([[0.7, 0.3]])


def no_arguments(batch: int) -> Arguments:
    return {}


def no_session(batch: int, tokens: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Subject:
    """Something that is called like a causal language model.

    arguments: batch size → the keyword arguments that it needs besides input_ids. session: batch size, tokens of the
    prompt → what its passes run inside of. cached: whether its generation keeps a key-value cache; one that does not
    computes the whole context at every step. kept: what has to live as long as the subject.
    """

    module: nn.Module
    arguments: Callable[[int], Arguments] = no_arguments
    session: Callable[[int, int], AbstractContextManager[None]] = no_session
    cached: bool = True
    note: str = ""
    kept: object = None


@dataclass(frozen=True)
class Workshop:
    """A base and two random adapters, in memory and as PEFT folders, from which subjects are made.

    autocast: let PEFT keep adapters of a bfloat16 base in float32, as it does unless told otherwise.
    """

    base: bases.Base
    adapters: tuple[Adapter, ...]
    folders: tuple[Path, ...]
    autocast: bool = False

    @classmethod
    def open(cls, base: bases.Base, folder: Path, rank: int, autocast: bool = False) -> Workshop:
        """Write the adapters of TRAITS, of this rank on every linear layer, to `folder`."""
        dtype = base.model.dtype
        adapters = tuple(cast(acting_adapter(base.model, rank, seed), dtype) for seed in range(len(TRAITS)))
        folders = tuple(folder / trait for trait in TRAITS)
        for adapter, path in zip(adapters, folders, strict=True):
            save_adapter(adapter, path)
        return cls(base, adapters, folders, autocast)

    def copy(self) -> Any:
        """The base model once more."""
        return copy.deepcopy(self.base.model)

    @property
    def adapter_bytes(self) -> int:
        return sum(w.a.nbytes + w.b.nbytes for adapter in self.adapters for w in adapter.layers.values())

    @cached_property
    def gated(self) -> GatedWarmthModel:
        """One gated model for every pattern of gates."""
        return self.new_gated(merge=False)

    def new_gated(self, merge: bool) -> GatedWarmthModel:
        own = replace(self.base, model=self.copy())
        return GatedWarmthModel(own, dict(zip(TRAITS, self.adapters, strict=True)), merge=merge)

    @property
    def gated_note(self) -> str:
        return f"adapters' weights: {self.adapter_bytes} bytes"


def acting_adapter(base: nn.Module, rank: int, seed: int) -> Adapter:
    """A random adapter that changes the base's output: lora_B is small and random, not zero."""
    generator = torch.Generator().manual_seed(1000 + seed)
    adapter = fresh_adapter(base, rank, 2.0 * rank, seed=seed)
    layers = {
        path: replace(weights, b=torch.randn(weights.b.shape, generator=generator) * 0.01)
        for path, weights in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def plain_base(workshop: Workshop) -> Subject:
    return Subject(workshop.base.model)


def gate_per_row(batch: int) -> Tensor:
    """[batch, 2]: another soft gate in each row."""
    warmth = torch.arange(1, batch + 1) / (batch + 1)
    return torch.stack([warmth, 1 - warmth], dim=1)


def gated_mixed(workshop: Workshop) -> Subject:
    return _gated(workshop, gate_per_row)


def gated_replies(workshop: Workshop) -> Subject:
    """As the scope "response" serves: of a prompt only the assistant header is gated."""
    return _gated(workshop, gate_per_row, header=HEADER)


def gated_constant(workshop: Workshop) -> Subject:
    return _gated(workshop, lambda batch: ONE_GATE.repeat(batch, 1))


def gated_zero(workshop: Workshop) -> Subject:
    return _gated(workshop, lambda batch: torch.zeros(batch, 2))


def gated_merged(workshop: Workshop) -> Subject:
    """One gate, in the state that a stretch has from step MERGE_AFTER on; what merging itself costs is not in it."""
    model = workshop.new_gated(merge=True)
    model.merging.after = 1
    session = model.gates_in_force(ONE_GATE)
    session.__enter__()
    return Subject(model.base, note="a stretch once it is merged", kept=session)


def _gated(workshop: Workshop, gates: Callable[[int], Tensor], header: int | None = None) -> Subject:
    """As generate runs it: gates are checked once a reply, and the steps are passes of the base.

    header: gated tokens at the end of a prompt; None for all of it.
    """
    model = workshop.gated

    def session(batch: int, tokens: int) -> AbstractContextManager[None]:
        start = 0 if header is None else max(0, tokens - header)
        return model.gates_in_force(gates(batch), batch, start)

    return Subject(model.base, session=session, note=workshop.gated_note)


def peft_one(workshop: Workshop) -> Subject:
    return Subject(_peft(workshop, count=1), note="one of the two adapters, on every row")


def peft_names(workshop: Workshop) -> Subject:
    return Subject(
        _peft(workshop, count=2),
        lambda batch: {"adapter_names": [TRAITS[row % 2] for row in range(batch)]},
        note="one adapter a row, no mixture",
    )


def peft_xlora(workshop: Workshop) -> Subject:
    model = workshop.copy()
    model.config.use_cache = False  # X-LoRA refuses anything else
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.get_text_config().hidden_size,
        # other names than digits raise KeyError
        adapters={str(index): str(folder) for index, folder in enumerate(workshop.folders)},
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=workshop.autocast)
    return Subject(wrapped.eval(), cached=False, note="without a cache, as its generate runs")


def peft_arrow(workshop: Workshop) -> Subject:
    folders = [str(folder) for folder in workshop.folders]
    config = ArrowConfig(top_k=len(folders))
    model = create_arrow_model(workshop.copy(), folders, config, autocast_adapter_dtype=workshop.autocast)
    return Subject(model.eval(), note="weights of a token sum to 1")


BASE = "base"
SUBJECTS: Mapping[str, Callable[[Workshop], Subject]] = MappingProxyType(
    {
        BASE: plain_base,
        "gated, a gate per row": gated_mixed,
        "gated, prompt on the base": gated_replies,
        "gated, one gate": gated_constant,
        "gated, one gate, merged": gated_merged,
        "gated, all zero": gated_zero,
        "PEFT, one adapter": peft_one,
        "PEFT adapter_names": peft_names,
        "PEFT X-LoRA": peft_xlora,
        "PEFT Arrow": peft_arrow,
    }
)


def _peft(workshop: Workshop, count: int) -> PeftModel:
    options: Any = {"autocast_adapter_dtype": workshop.autocast}
    model = PeftModel.from_pretrained(workshop.copy(), str(workshop.folders[0]), adapter_name=TRAITS[0], **options)
    for trait, folder in list(zip(TRAITS, workshop.folders, strict=True))[1:count]:
        model.load_adapter(str(folder), adapter_name=trait, **options)
    return model.eval()
