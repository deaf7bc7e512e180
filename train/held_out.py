"""What a router is measured on: the test turns as they were written, and turns that are unlike them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatedwarmth.data import Conversation, Message, Turn, load_conversations
from gatedwarmth.router.calibration import metrics, threshold_for_leak
from gatedwarmth.train.turns import (
    LabelledTurns,
    changed_subject,
    contexts_of,
    labelled,
    pair_exchanges,
    question_turns,
    written_turns,
)

# A friendly assistant between the turns of a conversation, so that the figure does not depend on a model's replies.
REPLIES = (
    "I'm glad you told me. That sounds like a lot, and I'm here for it.",
    "Oh, lovely. Tell me more!",
    "What a day. How are you now?",
)


@dataclass(frozen=True)
class HeldOut:
    """as_written: the test turns. elsewhere: by name, turns of other kinds, of which training has no split."""

    as_written: LabelledTurns
    elsewhere: Mapping[str, LabelledTurns]

    @property
    def conversations(self) -> list[list[Message]]:
        """Of all sets, in the order of the rows that `metrics` takes."""
        return [messages for part in (self.as_written, *self.elsewhere.values()) for messages in part.conversations]

    def metrics(self, table: np.ndarray) -> dict[str, Any]:
        """Figures of probabilities [n, traits], with the leak bound of the first trait; rates under `elsewhere`."""
        sizes = [len(part.turns) for part in (self.as_written, *self.elsewhere.values())]
        own, *others = np.split(table, np.cumsum(sizes)[:-1])
        rates = zip(self.elsewhere.items(), others, strict=True)
        return {
            **_figures(own, self.as_written),
            "elsewhere": {name: _rates(part_table, part) for (name, part), part_table in rates},
        }


def read_held_out(path: str | Path | None, traits: tuple[str, ...]) -> HeldOut:
    """The test turns of `path`, or of the package when None, and what can be made of them.

    After another subject: every self-contained test turn behind an exchange about something else. Of the package also:
    the test questions, and the conversations turn by turn with a friendly reply after each.
    """
    written = [turn for turn in written_turns(path) if turn.split == "test"]
    sets = {"after another subject": changed_subject(written, contexts_of(written))}
    if path is None:
        exchanges = contexts_of(written) + pair_exchanges("test")
        talks = [turn for number, talk in enumerate(load_conversations()) for turn in _turns_of(talk, number)]
        sets = {
            "after another subject": changed_subject(written, exchanges),
            "questions alone": question_turns("test"),
            "conversations": talks,
        }
    elsewhere = {name: labelled(turns, traits, path) for name, turns in sets.items() if turns}
    return HeldOut(labelled(written, traits, path), elsewhere)


def _turns_of(talk: Conversation, number: int) -> Iterator[Turn]:
    """Its social turns and, at the end, its question of fact."""
    context: list[Message] = []
    for k, text in enumerate([*talk.turns, talk.question.question]):
        label = "social" if k < len(talk.turns) else "reasoning"
        yield Turn(f"{talk.id}-{k}", text, label, mixed=False, hard=False, pattern="conversation", context=context)
        reply = REPLIES[(number + k) % len(REPLIES)]
        context = [*context, {"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def _figures(table: np.ndarray, held: LabelledTurns) -> dict[str, Any]:
    hard, patterns = [turn.hard for turn in held.turns], [turn.pattern for turn in held.turns]
    bound = threshold_for_leak(1.0 - table[:, -1], held.targets != table.shape[1] - 1)
    leak = {**dataclasses.asdict(bound), "line": bound.line()}
    return {**metrics(table, held.targets, hard, patterns), "leak": leak}


def _rates(table: np.ndarray, held: LabelledTurns) -> dict[str, Any]:
    """How many reasoning turns open the gates of other traits, and how many social turns shut them: half is open."""
    reasoning = held.targets == table.shape[1] - 1
    opened = table[:, -1] <= 0.5
    return {
        "reasoning": int(reasoning.sum()),
        "leak_rate": _share(opened[reasoning]),
        "social": int((~reasoning).sum()),
        "shut_rate": _share(~opened[~reasoning]),
    }


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if len(flags) else None
