"""Held-out social turns; the reply is scored by SocioT Warmth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gatedwarmth.data import Item, Turn
from gatedwarmth.eval.contexts import Case, turn_case
from gatedwarmth.eval.judges import WarmthScorer


@dataclass(frozen=True)
class WarmthTask:
    """Score field: `warmth`, in nats per token."""

    turns: tuple[Turn, ...]
    scorer: WarmthScorer
    name: str = "warmth"

    @property
    def items(self) -> tuple[Item, ...]:
        return self.turns

    def cases(self) -> list[Case]:
        return [turn_case(turn, self.name) for turn in self.turns if turn.social]

    def score(self, cases: Sequence[Case], replies: Sequence[str]) -> list[dict[str, Any]]:
        return [{"warmth": score} for score in self.scorer.score(replies)]
