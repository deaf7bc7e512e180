"""From a router's probabilities to gates: one turn's decision, with or without a model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gatedwarmth.data import Message
from gatedwarmth.gates import Policy, policy_from_name
from gatedwarmth.router import load_router
from gatedwarmth.router.base import Decision, Router


def decision_of(
    probabilities: Mapping[str, float], policy: Policy, router: str = "", previous: Mapping[str, float] | None = None
) -> Decision:
    """A policy's decision on one turn's probabilities. previous: the turn before's, for hysteresis."""
    if policy.holds(probabilities, previous) and previous is not None:
        probabilities = previous
    gates = policy.gates(probabilities)
    first = next(iter(probabilities))
    shown = ", ".join(f"{trait} {p:.2f}" for trait, p in probabilities.items())
    return Decision(probabilities[first], gates, f"{shown} → {policy.kind}; {router}".rstrip("; "), dict(probabilities))


def decide(router: str | Path | Router, messages: Sequence[Message], policy: str | Policy = "soft") -> Decision:
    """A text router's decision without any base, as a serving engine or a web page needs it.

    Raises
    ------
    RouterError: the router reads hidden states, so it needs the model.
    """
    made = load_router(router) if isinstance(router, (str, Path)) else router
    row = made.probabilities([messages], None)[0]
    return decision_of(dict(zip(made.traits, map(float, row), strict=True)), policy_from_name(policy), made.describe())
