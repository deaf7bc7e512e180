"""The main job end to end: base, router, adapters, arms, report, and a conversation whose gate moves.

The quick plan shows that every part works, on data too small to carry a claim. The full plan trains on all pairs until
the warm arm is warmer than the base on held-out turns, or three settings have failed, and then compares the arms.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.chat import gate_bar
from gatedwarmth.data import Pair, load_pairs
from gatedwarmth.eval import EvalSettings, Results, evaluate, identify, print_table
from gatedwarmth.files import write_json_atomic
from gatedwarmth.hardware import faster_dtype
from gatedwarmth.router import load_router
from gatedwarmth.train.adapter import AdapterSettings, train_adapter
from gatedwarmth.train.router import train_router

log = logging.getLogger("gatedwarmth")
console = Console(stderr=True)

TALK = (
    "Hi! How's your evening? Mine is slow, it's raining on the roof and I like it.",
    "What is the boiling point of water at sea level, in degrees Celsius?",
    "My grandmother taught me to make tea. She died in March and I still buy her brand.",
    "If one box holds 24 tea bags and I drink 3 a day, how many days does it last?",
)


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    pairs: training pairs at most, the shortest ones; 0 for all. attempts: settings of the warmth adapter, tried in turn
    until the manipulation check passes. neutral: settings of the neutral adapter. check: the check's evaluation, None
    to take the first attempt as it is. eval: the comparison of arms. router: its kind; for a probe the base first
    has to read all turns, which takes longer than the quick plan has.
    """

    router: str
    pairs: int
    attempts: tuple[AdapterSettings, ...]
    neutral: AdapterSettings
    check: EvalSettings | None
    eval: EvalSettings


QUICK_ADAPTER = AdapterSettings("warm", rank=16, lr=1e-3, max_steps=14, batch_size=4, save_steps=7)
QUICK = Plan(
    router="text",
    pairs=80,
    attempts=(QUICK_ADAPTER,),
    neutral=dataclasses.replace(QUICK_ADAPTER, style="neutral"),
    check=None,
    eval=EvalSettings(
        contexts=("plain", "sad"),
        beliefs=("none", "wrong"),
        limit=3,
        limit_turns=4,
        batch_size=12,
        max_new_tokens=28,
        repetition_penalty=1.1,
    ),
)
FULL = Plan(
    router="probe",
    pairs=0,
    attempts=(
        AdapterSettings("warm", rank=16, lr=1e-3, epochs=1.0),
        AdapterSettings("warm", rank=32, alpha=64.0, lr=1e-3, epochs=3.0),
        AdapterSettings("warm", rank=32, alpha=64.0, lr=2e-3, epochs=3.0),
    ),
    neutral=AdapterSettings("neutral", rank=16, lr=1e-3, epochs=1.0),
    check=EvalSettings(
        arms=("base", "warm"),
        tasks=("warmth",),
        split="dev",
        limit_turns=40,
        batch_size=20,
        max_new_tokens=64,
    ),
    eval=EvalSettings(
        contexts=("plain", "sad"),
        beliefs=("none", "wrong"),
        limit=40,
        limit_turns=50,
        batch_size=20,
        max_new_tokens=48,
        repetition_penalty=1.1,
    ),
)


def run_demo(out: Path, full: bool = False, base_name: str = bases.DEFAULT) -> Results:
    """Do the whole job into `out`; a killed run goes on where it was when called again.

    Leaves out/model (a folder that from_pretrained loads), results.json, samples/, report.html, report.md and pictures.
    """
    plan = FULL if full else QUICK
    work = out / "work"
    base = bases.load(base_name, dtype=torch.float32)
    _say(f"Base: {base.name} ({base.source})")
    _say(f"1. Router: {plan.router}, on the training turns")
    # by its name: the router then reads the base in the dtype that it will be served in, as `train router` does
    router = train_router(plan.router, work / "router", base_name if plan.router == "probe" else None)
    for line in router.lines():
        _say("   " + line)
    train, dev = load_pairs("train"), load_pairs("dev")
    if plan.pairs:
        train, dev = _shortest(train, plan.pairs), _shortest(dev, 4)
    _say(f"2. Warmth adapter on {_seen(plan.attempts[0], train)} pairs")
    warmth = _train_warmth(base, train, dev, plan, work)
    _say(f"3. Neutral adapter on {_seen(plan.neutral, train)} pairs")
    train_adapter(_training(base), train, work / "neutral", plan.neutral, dev)
    model = _assemble(base, warmth, work / "neutral", work / "router", out / "model")
    _say("4. Arms: " + ", ".join(plan.eval.arms))
    results = evaluate(model, out, plan.eval, _identity(out / "model", base))
    print_table(results)
    _say("5. One conversation; the gate moves turn by turn")
    talk(model)
    _say(f"Report: {out / 'report.html'} and {out / 'report.md'}; model: {out / 'model'}")
    return results


def talk(model: GatedWarmthModel, turns: tuple[str, ...] = TALK, max_new_tokens: int = 40) -> None:
    """Print a conversation with the gate of every turn."""
    table = Table("turn", "warmth gate", "reply", show_lines=True)
    messages: list[Any] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        reply = model.chat(messages, max_new_tokens=max_new_tokens, do_sample=False)
        messages.append({"role": "assistant", "content": reply.text or "…"})
        table.add_row(turn, gate_bar(reply.gates.get("warmth", 0.0)), reply.text)
    Console().print(table)


def _train_warmth(base: bases.Base, train: list[Pair], dev: list[Pair], plan: Plan, work: Path) -> Path:
    """Attempts in turn until one passes the manipulation check; the last one is kept whatever it shows."""
    history = []
    for number, settings in enumerate(plan.attempts, start=1):
        folder = work / f"warmth-{number}"
        report = train_adapter(_training(base), train, folder, settings, dev)
        if plan.check is None:
            return folder
        model = GatedWarmthModel.from_pretrained(_serving(base), {"warmth": folder}, merge=False)
        try:
            results = evaluate(model, work / f"check-{number}", plan.check, _identity(folder, base))
        finally:
            model.unwrap()
        check = results.manipulation
        history.append({"attempt": number, "dev_loss": report["dev_loss_after"], **dataclasses.asdict(check)})
        write_json_atomic(work / "manipulation.json", history)
        _say(f"   attempt {number}: {check.words}")
        if check.passed:
            return folder
    return folder


def _assemble(base: bases.Base, warmth: Path, neutral: Path, router: Path, out: Path) -> GatedWarmthModel:
    adapters = {"warmth": warmth, "neutral": neutral}
    model = GatedWarmthModel.from_pretrained(_serving(base), adapters, load_router(router), merge=False)
    model.save_pretrained(out)
    return model


def _training(base: bases.Base) -> bases.Base:
    base.model.to(torch.float32)  # type: ignore[arg-type]
    return base


def _serving(base: bases.Base) -> bases.Base:
    """The base in the dtype that this machine generates fastest in."""
    base.model.to(faster_dtype(base.model.device))  # type: ignore[arg-type]
    return base


def _identity(folder: Path, base: bases.Base) -> dict[str, str]:
    """What a report names, and what a run that goes on must have in common with its beginning."""
    return {**identify(folder), "base": base.name, "dtype": str(base.model.dtype).removeprefix("torch.")}


def _seen(settings: AdapterSettings, pairs: list[Pair]) -> str:
    """How many of the pairs the training gets to see.

    >>> _seen(QUICK_ADAPTER, [None] * 80)
    '56 of 80'
    """
    most = settings.max_steps * settings.batch_size
    return f"{most} of {len(pairs)}" if 0 < most < len(pairs) else str(len(pairs))


def _shortest(pairs: list[Pair], count: int) -> list[Pair]:
    lengths = {p.id: sum(len(m["content"]) for m in p.messages) + len(p.replies["warm"]) for p in pairs}
    return sorted(pairs, key=lambda pair: (lengths[pair.id], pair.id))[:count]


def _say(text: str) -> None:
    console.print(text, style="bold", highlight=False)
