"""Prove on start-up that a model folder does what it says: one line per proof, the first failure ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gatedwarmth import bases, folders
from gatedwarmth.data import load_turns
from gatedwarmth.errors import GatedWarmthError, ModelFolderError
from gatedwarmth.model import GatedWarmthModel
from gatedwarmth.templates import prompt_of

CACHE_TOLERANCE = 1e-4  # of logits, float32: the project's parity bar
ROUTER_FLOOR = 0.75  # balanced accuracy on held-out turns below which a router does not separate
ROUTER_TURNS = 60  # of each label


@dataclass(frozen=True)
class Proof:
    """One line of the check."""

    passed: bool
    line: str


def check(folder: str | Path, base: bases.Base | None = None) -> Iterator[Proof]:
    """Run the proofs on a model folder, in float32, and stop after the first that fails.

    base: a loaded base in place of the one that the folder names.
    """
    try:
        saved = folders.read(Path(folder))
        loaded = base or bases.load(saved.base, dtype=torch.float32)
        bare = _logits(loaded.model, _prompt(loaded))
        model = GatedWarmthModel.from_pretrained(loaded, dict(saved.adapters), saved.router, saved.policy, saved.scope)
    except (GatedWarmthError, OSError) as error:
        yield Proof(False, f"loads: {error}")
        return
    yield Proof(True, f"loads: base {saved.base} ({loaded.source}), traits {', '.join(model.traits)}")
    try:
        yield from _proofs(model, _prompt(loaded), bare)
    finally:
        model.unwrap()


def _proofs(model: GatedWarmthModel, ids: Tensor, bare: Tensor) -> Iterator[Proof]:
    steps: list[Callable[[], Proof]] = [lambda: _zero_is_base(model, ids, bare)]
    steps += [lambda trait=trait: _acts(model, ids, bare, trait) for trait in model.traits]  # type: ignore[misc]
    steps += [lambda: _cache_is_exact(model, ids)]
    if model.router is not None:
        steps += [lambda: _router_separates(model)]
    for step in steps:
        proof = step()
        yield proof
        if not proof.passed:
            return


def _zero_is_base(model: GatedWarmthModel, ids: Tensor, bare: Tensor) -> Proof:
    same = torch.equal(_logits(model, ids), bare)
    return Proof(same, f"gate 0 is the base: logits {'equal bit for bit' if same else 'differ'}")


def _acts(model: GatedWarmthModel, ids: Tensor, bare: Tensor, trait: str) -> Proof:
    with torch.no_grad():
        apart = float((model(ids, gates={trait: 1.0}).logits - bare).abs().max())
    return Proof(apart > 0, f"{trait} acts: gate 1 moves the logits by up to {apart:.3g}")


@torch.no_grad()
def _cache_is_exact(model: GatedWarmthModel, ids: Tensor) -> Proof:
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand(1, ids.shape[1], len(model.traits), generator=generator)
    whole = model(ids, gates=gates).logits
    cut = ids.shape[1] // 2
    first = model(ids[:, :cut], gates=gates[:, :cut], use_cache=True)
    second = model(ids[:, cut:], gates=gates[:, cut:], cache=first.cache, use_cache=True)
    apart = float((torch.cat([first.logits, second.logits], dim=1) - whole).abs().max())
    return Proof(
        apart < CACHE_TOLERANCE, f"cached equals recomputed: logits within {apart:.2g} (bar {CACHE_TOLERANCE:g})"
    )


def _router_separates(model: GatedWarmthModel) -> Proof:
    """On held-out packaged turns, which is what the packaged routers were kept from; other routers are only run."""
    router = model.require_router()
    if router.traits != ("warmth", "neutral"):
        decision = model.route([{"role": "user", "content": "hello"}])
        return Proof(True, f"router runs: {decision.why}")
    turns = load_turns("test")
    picked = [[turn for turn in turns if turn.social is social][:ROUTER_TURNS] for social in (True, False)]
    rates = []
    for social, group in zip((True, False), picked, strict=True):
        decisions = [model.route(turn.messages) for turn in group]
        rates.append(sum((d.p_social > 0.5) is social for d in decisions) / len(group))
    balanced = sum(rates) / 2
    count = sum(map(len, picked))
    line = f"router separates held-out turns: balanced accuracy {balanced:.3f} on {count} (floor {ROUTER_FLOOR})"
    return Proof(balanced >= ROUTER_FLOOR, line)


def _prompt(base: bases.Base) -> Tensor:
    prompt = prompt_of(base.tokenizer, [{"role": "user", "content": "My train is late again. How far is the Moon?"}])
    return torch.tensor([prompt.ids], device=base.model.device)


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def require(folder: str | Path) -> None:
    """Raise with the failing line if a proof fails: for servers that must not start on a broken model."""
    for proof in check(folder):
        if not proof.passed:
            raise ModelFolderError(f"{folder} failed its check: {proof.line}")
