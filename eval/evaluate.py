"""The whole of an evaluation in one call: run, analyse, report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from gatedwarmth import bases
from gatedwarmth.eval.arms import get_arms
from gatedwarmth.eval.judges import SocioTWarmth, WarmthScorer
from gatedwarmth.eval.report import write_report
from gatedwarmth.eval.results import Results, analyse
from gatedwarmth.eval.runner import EvaluatedModel, run
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.tasks import build_tasks


class ScoringModel(EvaluatedModel, Protocol):
    """A model whose own base can score warmth."""

    @property
    def base(self) -> torch.nn.Module: ...

    @property
    def tokenizer(self) -> object: ...


def evaluate(
    model: ScoringModel,
    out: str | Path,
    settings: EvalSettings | None = None,
    identity: Mapping[str, str] | None = None,
    scorer: WarmthScorer | None = None,
) -> Results:
    """Run the arms on the tasks, analyse, and leave results.json, report.md, report.html and samples/ in
    `out`.

    Called again after an interruption it goes on where it was; called again after the end it only rewrites
    the report.

    Parameters
    ----------
    identity: what tells this model from another, best `identify(folder)` of its saved folder. Without it a
        resumed run cannot notice that the adapters have changed.
    scorer: a scorer in place of the one that `settings.scorer` names; its name must be `settings.scorer`'s.

    Raises
    ------
    EvaluationError: unknown names in `settings`, or `out` holds another run.
    """
    settings = settings or EvalSettings()
    arms = get_arms(settings.arms)
    if scorer is None and "warmth" in settings.tasks:
        scorer = scorer_for(model, settings.scorer)
    run(model, arms, build_tasks(settings, scorer), out, settings, identity, command_line())
    results = analyse(out)
    write_report(results, out)
    return results


def scorer_for(model: ScoringModel, name: str) -> SocioTWarmth:
    """SocioT Warmth with the model's own base ("base"), or with a causal LM loaded in float32."""
    if name == "base":
        return SocioTWarmth(model.base, model.tokenizer, name)
    base = bases.load(name, dtype=torch.float32)
    return SocioTWarmth(base.model, base.tokenizer, name)


def command_line() -> str:
    """The command of this process, its program by its bare name."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv and sys.argv[0] else ""
