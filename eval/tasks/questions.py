"""Free-form questions in contexts and with beliefs, scored against the aliases of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gatedwarmth.data import Context, Item, Question
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.contexts import Case, question_cases
from gatedwarmth.eval.judges import judge


@dataclass(frozen=True)
class QuestionsTask:
    """Score fields: `correct` (bool), `matched` (the phrase that decided, or null), `reason` (in words)."""

    questions: tuple[Question, ...]
    contexts: tuple[Context, ...]
    groups: tuple[str, ...]
    beliefs: tuple[str, ...]
    name: str = "questions"

    @property
    def items(self) -> tuple[Item, ...]:
        return (*self.questions, *self.contexts)

    def cases(self) -> list[Case]:
        return question_cases(self.questions, self.groups, self.beliefs, self.contexts)

    def score(self, cases: Sequence[Case], replies: Sequence[str]) -> list[dict[str, Any]]:
        return [_judged(case, reply) for case, reply in zip(cases, replies, strict=True)]


def _judged(case: Case, reply: str) -> dict[str, Any]:
    if case.question is None:
        raise EvaluationError(f"case {case.id} has no question to judge against; build it with question_cases")
    verdict = judge(case.question, reply)
    return {"correct": verdict.correct, "matched": verdict.matched, "reason": verdict.reason}
