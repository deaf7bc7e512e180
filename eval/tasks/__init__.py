"""Tasks: cases to reply to, and a score for every reply. To add one, write a class like these and name it in
TASKS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from gatedwarmth.data import Item, Question, Turn, load_contexts, load_questions, load_turns
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.contexts import Case, check_names
from gatedwarmth.eval.judges import WarmthScorer
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.tasks.questions import QuestionsTask
from gatedwarmth.eval.tasks.warmth import WarmthTask


class Task(Protocol):
    """What the runner asks of a task. `items` is the data that the run's hash covers."""

    @property
    def name(self) -> str: ...

    @property
    def items(self) -> Sequence[Item]: ...

    def cases(self) -> list[Case]: ...

    def score(self, cases: Sequence[Case], replies: Sequence[str]) -> list[dict[str, Any]]:
        """JSON-ready score fields, one dict a reply. Must depend on nothing but its arguments."""
        ...


def pick_questions(questions: Iterable[Question], limit: int | None) -> list[Question]:
    """The first `limit` questions, taken from the domains in turn, so that a small run still sees all of
    them.
    """
    by_domain: dict[str, list[Question]] = {}
    for question in questions:
        by_domain.setdefault(question.domain, []).append(question)
    longest = max((len(items) for items in by_domain.values()), default=0)
    rounds = [items[i] for i in range(longest) for items in by_domain.values() if i < len(items)]
    return rounds[:limit]


def pick_turns(turns: Iterable[Turn], limit: int | None) -> list[Turn]:
    """`limit` turns in an order that their ids' hashes give: arbitrary, fixed, and a small pick lies in a
    larger one.
    """
    return sorted(turns, key=lambda turn: hashlib.sha256(turn.id.encode()).digest())[:limit]


def _questions(settings: EvalSettings, scorer: WarmthScorer | None) -> Task:
    questions = pick_questions(load_questions(split=settings.split), settings.limit)
    _not_empty("questions", settings, len(questions))
    return QuestionsTask(tuple(questions), tuple(load_contexts()), settings.contexts, settings.beliefs)


def _warmth(settings: EvalSettings, scorer: WarmthScorer | None) -> Task:
    if scorer is None:
        raise EvaluationError("task 'warmth' needs a scorer; name a causal LM as scorer or leave the task out")
    social = (turn for turn in load_turns(split=settings.split) if turn.social)
    turns = pick_turns(social, settings.limit_turns or settings.limit)
    _not_empty("social turns", settings, len(turns))
    return WarmthTask(tuple(turns), scorer)


def _not_empty(what: str, settings: EvalSettings, count: int) -> None:
    if not count:
        raise EvaluationError(f"split {settings.split!r} holds no {what}; use train, dev or test, and a limit above 0")


TASKS: dict[str, Callable[[EvalSettings, WarmthScorer | None], Task]] = {
    "questions": _questions,
    "warmth": _warmth,
}


def build_tasks(settings: EvalSettings, scorer: WarmthScorer | None) -> list[Task]:
    """The tasks that `settings` names, over the packaged corpora."""
    check_names("task", settings.tasks, tuple(TASKS))
    return [TASKS[name](settings, scorer) for name in settings.tasks]
