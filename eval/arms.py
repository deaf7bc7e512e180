"""Arms: the conditions that are compared. An arm says how the prompt starts and which gates a case gets.

To add one, write `Arm(name, about, rule)` into `ARMS`. A rule is anything callable with a case and the
router's probability that returns gates; give it a useful repr, since a run remembers its arms by theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from gatedwarmth.data import Message
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.contexts import Case, check_names
from gatedwarmth.gates import Policy

WARM_SYSTEM = (
    "You are a warm and caring companion. Talk like a close, supportive friend: notice what the person "
    "feels, "
    "show that you care, and be encouraging."
)


class GateRule(Protocol):
    """Gates of one case, trait to value in [0, 1]."""

    @property
    def needs_router(self) -> bool: ...

    def gates(self, case: Case, p_social: float | None, threshold: float) -> dict[str, float]: ...


@dataclass(frozen=True)
class Fixed:
    """The same gates for every case."""

    warmth: float
    neutral: float
    needs_router = False

    def gates(self, case: Case, p_social: float | None, threshold: float) -> dict[str, float]:
        return {"warmth": self.warmth, "neutral": self.neutral}


@dataclass(frozen=True)
class Routed:
    """What a policy makes of the router's probability that the turn is social.

    policy: "soft" or "hard"; "hard" opens warmth from the run's threshold on.
    """

    policy: str
    needs_router = True

    def gates(self, case: Case, p_social: float | None, threshold: float) -> dict[str, float]:
        if p_social is None:
            raise EvaluationError(
                f"case {case.id}: a gated arm needs the router's probability; give the model a router"
            )
        return Policy(self.policy, threshold=threshold).gates({"warmth": p_social, "neutral": 1.0 - p_social})


@dataclass(frozen=True)
class Oracle:
    """The label of the corpus in place of the router: what a perfect router would reach."""

    needs_router = False

    def gates(self, case: Case, p_social: float | None, threshold: float) -> dict[str, float]:
        warm = float(case.label == "social")
        return {"warmth": warm, "neutral": 1.0 - warm}


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment."""

    name: str
    about: str
    rule: GateRule
    system: str | None = None

    def messages(self, case: Case) -> list[Message]:
        """The case's messages, the arm's system prompt first where it has one."""
        head = [Message(role="system", content=self.system)] if self.system else []
        return [*head, *case.messages]

    def gates(
        self, cases: Sequence[Case], p_social: Sequence[float | None], traits: Sequence[str], threshold: float
    ) -> torch.Tensor:
        """Gates of a batch, float32 [cases, traits], columns in the order of `traits`.

        A trait that the model lacks may only be left out by routed arms, which then fall back on the base.

        Raises
        ------
        EvaluationError: the arm opens a gate of a trait that the model does not have.
        """
        pairs = zip(cases, p_social, strict=True)
        rows = [self.rule.gates(case, p, threshold) for case, p in pairs]
        missing = {t for row in rows for t, gate in row.items() if gate > 0 and t not in traits}
        if "warmth" in missing or (missing and isinstance(self.rule, Fixed)):
            raise EvaluationError(
                f"arm {self.name!r} opens the gate of {sorted(missing)}, and this model has the traits "
                f"{list(traits)}; leave the arm out or add an adapter under that name"
            )
        return torch.tensor([[row.get(t, 0.0) for t in traits] for row in rows], dtype=torch.float32)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("base", "the base model alone", Fixed(0.0, 0.0)),
        Arm(
            "warm_prompt",
            "the base model with a system prompt that asks for warmth",
            Fixed(0.0, 0.0),
            WARM_SYSTEM,
        ),
        Arm("warm", "warmth always on", Fixed(1.0, 0.0)),
        Arm("neutral", "neutral always on", Fixed(0.0, 1.0)),
        Arm("blend", "half of each, always", Fixed(0.5, 0.5)),
        Arm("gated_soft", "warmth by the router's probability, neutral by the rest", Routed("soft")),
        Arm("gated_hard", "warmth or neutral by the router's threshold", Routed("hard")),
        Arm("oracle", "warmth or neutral by the true label", Oracle()),
    )
}


def get_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """Arms by name, in the order asked for."""
    check_names("arm", names, tuple(ARMS))
    return tuple(ARMS[name] for name in names)
