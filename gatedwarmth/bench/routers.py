"""`bench router`: what a decision costs, alone and on top of the prefill that it rides on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.adapters import cast
from gatedwarmth.bench.rows import Row, dtype_of, row_of
from gatedwarmth.bench.subjects import TRAITS, acting_adapter
from gatedwarmth.data import Message, load_turns
from gatedwarmth.injection import decoder_layers
from gatedwarmth.kernels.bench import Clock, Contender, clock_for, measure
from gatedwarmth.router import Card, Network, ProbeRouter, Router, TextRouter, TextSettings, TextWeights
from gatedwarmth.templates import render
from gatedwarmth.train.network import NETWORKS, UNITS

NAME = "router"
ALONE = "no router"


@dataclass(frozen=True)
class RouterSettings:
    """turns: packaged turns that the text router decides about. lengths: prompt tokens, at least, of the chats."""

    base: str = bases.DEFAULT
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    runs: int = 9
    warmup: int = 2
    rank: int = 8
    turns: int = 64
    lengths: tuple[int, ...] = (64, 256)


def run_router(settings: RouterSettings) -> Iterator[Row]:
    """Rows of every dtype."""
    texts = [turn.text for turn in load_turns()[: settings.turns]]
    for dtype in settings.dtypes:
        base = bases.load(settings.base, dtype_of(dtype), settings.device)
        yield from measure_router(base, texts, settings, dtype)
        gc.collect()


def measure_router(
    base: bases.Base, texts: list[str], settings: RouterSettings, dtype: str, clock: Clock | None = None
) -> Iterator[Row]:
    """Rows of a base that is loaded already; `texts` are user turns."""
    clock = clock or clock_for(settings.device)
    text, probe = random_text_router(), random_probe(base)
    alone = [_decisions(text, probe, texts)]
    cases: list[tuple[str, list[Contender], str]] = [("one decision", group, "") for group in alone]
    adapters = {t: cast(acting_adapter(base.model, settings.rank, s), base.model.dtype) for s, t in enumerate(TRAITS)}
    model = GatedWarmthModel(base, adapters)
    try:
        for length in settings.lengths:
            conversation = conversation_of(base, texts, length)
            tokens = len(render(base.tokenizer, conversation))
            contenders = _chats(model, conversation, text, probe)
            cases.append((f"prefill and one token, prompt of {tokens} tokens", contenders, ALONE))
        for case, contenders, baseline in cases:
            for row in measure(case, contenders, baseline, settings.runs, clock, settings.warmup):
                yield row_of(NAME, row, base.name, dtype, settings.device)
    finally:
        model.unwrap()


def _decisions(text: TextRouter, probe: ProbeRouter, texts: list[str]) -> list[Contender]:
    """Both routers' own work; the probe is handed a hidden state."""
    conversations = [[_user(content)] for content in texts]
    states = torch.randn(1, len(probe.layers), 2, probe.hidden_size)

    def decide(router: Router) -> Callable[[], None]:
        def run() -> None:
            for conversation in conversations:
                router.probabilities([conversation], lambda layers: states)

        return run

    units = len(conversations)
    return [
        Contender("text", decide(text), units=units),
        Contender("probe", decide(probe), units=units, note="given the hidden states"),
    ]


def _chats(
    model: GatedWarmthModel, conversation: list[Message], text: TextRouter, probe: ProbeRouter
) -> list[Contender]:
    """The whole way from messages to the first token, with gates given, or decided by a router."""
    gates = dict.fromkeys(model.traits, 0.5)

    def contender(name: str, router: Router | None) -> Contender:
        given = gates if router is None else None

        def prepare() -> None:
            model.router = router

        return Contender(name, lambda: model.chat(conversation, given, max_new_tokens=1, do_sample=False), prepare)

    return [contender(ALONE, None), contender("text", text), contender("probe", probe)]


def random_text_router() -> TextRouter:
    """Weights do not change what a decision costs."""
    return TextRouter(_random_weights(TextSettings()), np.zeros(1, dtype=np.float32), Card(TRAITS))


def _random_weights(settings: TextSettings) -> TextWeights:
    return TextWeights(np.random.default_rng(0).normal(size=(settings.columns, 1)).astype(np.float32), settings)


def random_probe(base: bases.Base) -> ProbeRouter:
    """A probe of four layers around two thirds of the base's depth, and the text beside them, as training makes it."""
    hidden = int(base.model.config.get_text_config().hidden_size)
    depth = len(decoder_layers(base.model))
    layers = sorted({min(max(1, 2 * depth // 3 + step), depth) for step in (-3, 0, 3, 6)})
    network = _random_network(2 * len(layers) * hidden + 1, NETWORKS * UNITS)
    return ProbeRouter(network, layers, base.name, Card(TRAITS), _random_weights(TextSettings()))


def _random_network(inputs: int, units: int) -> Network:
    rng = np.random.default_rng(0)
    return Network(
        0.01 * rng.normal(size=(inputs, units)), np.zeros(units), 0.1 * rng.normal(size=(units, 1)), np.zeros(1)
    )


def conversation_of(base: bases.Base, texts: list[str], length: int) -> list[Message]:
    """One user turn, made of as many texts as a prompt of `length` tokens takes."""
    content = ""
    for text in texts:
        content = f"{content} {text}".strip()
        if len(render(base.tokenizer, [_user(content)])) >= length:
            break
    return [_user(content)]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
