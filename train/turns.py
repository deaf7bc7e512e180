"""The turns that a router learns from and is measured on: the packaged ones or a reader's own."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatedwarmth.data import Message, Turn, load_pairs, load_questions, load_turns
from gatedwarmth.errors import DataError, TrainingError
from gatedwarmth.files import read_jsonl

FOLDS = 5
CHANGED_SUBJECT = "changed_subject"
CHANGED = 4  # one self-contained turn in so many is learnt a second time, after a change of subject
WORDS_ALONE = 4  # a shorter turn may need the messages before it to be understood


@dataclass(frozen=True)
class LabelledTurns:
    """Turns and their classes: targets int64 [n], an index into the traits."""

    turns: tuple[Turn, ...]
    targets: np.ndarray

    def rows(self, split: str) -> list[int]:
        return [index for index, turn in enumerate(self.turns) if turn.split == split]

    def part(self, split: str) -> LabelledTurns:
        return self.at(self.rows(split))

    def at(self, rows: Sequence[int]) -> LabelledTurns:
        return LabelledTurns(tuple(self.turns[index] for index in rows), self.targets[list(rows)])

    @property
    def conversations(self) -> list[list[Message]]:
        return [turn.messages for turn in self.turns]

    @property
    def folds(self) -> np.ndarray:
        """A fold per turn from its id alone, so that adding turns moves none."""
        return np.array([zlib.crc32(turn.id.encode()) % FOLDS for turn in self.turns])


def read_turns(path: str | Path | None, traits: tuple[str, ...]) -> LabelledTurns:
    """Turns of all splits and their classes; some training turns are there twice, see `changed_subject`."""
    turns = written_turns(path) + ([*pair_turns(), *question_turns("train")] if path is None else [])
    train = [turn for turn in turns if turn.split == "train"]
    exchanges = contexts_of(train) + (pair_exchanges("train") if path is None else [])
    return labelled([*turns, *changed_subject(train, exchanges, CHANGED)], traits, path)


def written_turns(path: str | Path | None) -> list[Turn]:
    """The turns of a JSON-lines file or folder, or the packaged ones when None."""
    return load_turns() if path is None else _own_turns(Path(path))


def labelled(turns: Sequence[Turn], traits: tuple[str, ...], path: str | Path | None = None) -> LabelledTurns:
    """Turns with their classes. Labels are trait names, or "social" for the first and "reasoning" for the last trait.

    Raises
    ------
    DataError: a label that is none of these; `path` says where the turns came from.
    """
    index = {"social": 0, "reasoning": len(traits) - 1, **{trait: k for k, trait in enumerate(traits)}}
    for turn in turns:
        if turn.label not in index:
            problem = f"turn {turn.id} has label {turn.label!r}; use one of {', '.join(index)}"
            raise DataError(path or "gatedwarmth.data", 0, problem)
    return LabelledTurns(tuple(turns), np.array([index[turn.label] for turn in turns], dtype=np.int64))


def question_turns(split: str) -> list[Turn]:
    """The packaged questions: plain and short, as few of the packaged turns are."""
    return [
        Turn(id=question.id, text=question.question, label="reasoning", mixed=False, hard=False, pattern="question",
             context=[])
        for question in load_questions(split)
    ]  # fmt: skip


def changed_subject(turns: Sequence[Turn], exchanges: Sequence[list[Message]], one_in: int = 1) -> list[Turn]:
    """Self-contained turns once more, each behind an exchange about something else, with the label they had.

    What a turn means that says all itself does not depend on what was talked of before, and few people who write turns
    write such changes. Which turns, and behind which exchange, follows from a turn's id. It keeps the id, and so its
    split and its fold.
    """
    if not exchanges:
        return []
    numbers = [(turn, zlib.crc32(f"{turn.id} later".encode())) for turn in turns if _self_contained(turn)]
    return [
        dataclasses.replace(turn, pattern=CHANGED_SUBJECT, context=list(exchanges[number // one_in % len(exchanges)]))
        for turn, number in numbers
        if number % one_in == 0
    ]


def _self_contained(turn: Turn) -> bool:
    return not turn.context and len(turn.text.split()) >= WORDS_ALONE


def contexts_of(turns: Sequence[Turn]) -> list[list[Message]]:
    """Exchanges that stand before turns and end with the assistant's words."""
    return [turn.context for turn in turns if turn.context and turn.context[-1]["role"] == "assistant"]


def pair_exchanges(split: str) -> list[list[Message]]:
    """The packaged pairs with the neutral and with the warm reply."""
    return [
        [*pair.messages, {"role": "assistant", "content": pair.replies[style]}]
        for pair, style in itertools.product(load_pairs(split), ("neutral", "warm"))
    ]


def pair_turns() -> list[Turn]:
    """The user turns of the packaged training pairs. A mixed pair asks something: reasoning."""
    return [
        Turn(
            id=pair.id,
            text=pair.messages[-1]["content"],
            label="social" if pair.kind == "social" else "reasoning",
            mixed=pair.kind == "mixed",
            hard=False,
            pattern="pair",
            context=pair.messages[:-1],
        )
        for pair in load_pairs("train")
    ]


def _own_turns(path: Path) -> list[Turn]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [_own_turn(file, number, value) for file in files for number, value in read_jsonl(file)]


def _own_turn(file: Path, number: int, value: dict[str, Any]) -> Turn:
    for key in ("id", "text", "label"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise DataError(file, number, f"{key!r} must be a text that is not empty, found {value.get(key)!r}")
    if not value["id"][-1].isdigit():
        raise DataError(file, number, f"id {value['id']!r} must end in a number, from which the split is read")
    return Turn(
        value["id"], value["text"], value["label"], bool(value.get("mixed", False)), bool(value.get("hard", False)),
        str(value.get("pattern", "plain")), list(value.get("context", [])),
    )  # fmt: skip


def check_turns(data: LabelledTurns, traits: Sequence[str]) -> None:
    """Every trait needs turns of its own in every split; one repeated after a change of subject counts once.

    Raises
    ------
    TrainingError: naming the trait and the split.
    """
    for split, least in (("train", 10), ("dev", 2), ("test", 2)):
        part = data.at([row for row in data.rows(split) if data.turns[row].pattern != CHANGED_SUBJECT])
        for k, trait in enumerate(traits):
            count = int((part.targets == k).sum())
            if count < least:
                raise TrainingError(
                    f"{count} turns of {trait!r} in the split {split}, at least {least} are needed; the split follows "
                    "from the last digit of an id: 8 and 9 test, 7 dev, the rest train"
                )
