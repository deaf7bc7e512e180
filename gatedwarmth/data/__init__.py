"""The corpora written for this project (CC BY 4.0), and their loader.

Every file is JSON lines. The split follows from the number at the end of an item's id, so that it can be read off
the file and never moves: n mod 10 in {8, 9} is test, 7 is dev, the rest is train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

from gatedwarmth.errors import DataError
from gatedwarmth.files import read_jsonl

FOLDER = Path(__file__).parent
Split = Literal["train", "dev", "test"]
KINDS = ("social", "reasoning", "mixed")
LABELS = ("social", "reasoning")
STYLES = ("neutral", "warm", "validating")
CONTEXT_GROUPS = ("none", "sad", "angry", "happy", "close", "deference", "curt", "high", "low")
QUESTION_DOMAINS = ("general", "misconception", "medicine", "disinformation", "arithmetic")
QUESTION_KINDS = ("short", "verdict")
INTENTIONS = (
    "be understood",
    "vent",
    "be praised",
    "think it through",
    "get concrete advice",
    "be encouraged",
    "share joy",
    "be challenged honestly",
)


class Message(TypedDict):
    role: str
    content: str


def split_of(id: str) -> Split:
    """The split of an item, from the number at the end of its id.

    >>> split_of("ps-008"), split_of("t-0017"), split_of("qg-120")
    ('test', 'dev', 'train')
    """
    number = re.search(r"\d+$", id)
    if number is None:
        raise ValueError(f"id {id!r} does not end in a number, and the split is read from that number")
    last = int(number.group()) % 10
    return "test" if last >= 8 else "dev" if last == 7 else "train"


@dataclass(frozen=True)
class Item:
    id: str

    @property
    def split(self) -> Split:
        return split_of(self.id)


@dataclass(frozen=True)
class Pair(Item):
    """One conversation with a reply in each style, the same facts in all of them."""

    kind: str
    domain: str
    messages: list[Message]
    replies: dict[str, str]


@dataclass(frozen=True)
class Turn(Item):
    """One user turn, labelled by what the reply should mainly do."""

    text: str
    label: str
    mixed: bool
    hard: bool
    pattern: str
    context: list[Message]
    labels: tuple[str, ...] = ()  # two blind labelings, where they have been made

    @property
    def messages(self) -> list[Message]:
        return [*self.context, {"role": "user", "content": self.text}]

    @property
    def social(self) -> bool:
        return self.label == "social"


@dataclass(frozen=True)
class Question(Item):
    """A question with every alias of its answer and one tempting false answer."""

    domain: str
    kind: str
    question: str
    answers: tuple[str, ...]
    wrong: str
    explanation: str


@dataclass(frozen=True)
class Context(Item):
    """An interpersonal statement put before a question."""

    group: str
    text: str


@dataclass(frozen=True)
class Scene(Item):
    """A simulated user, after the profile of arXiv:2505.02847."""

    persona: dict[str, Any]
    event: str
    theme: str
    intention: str
    reactions: dict[str, str]
    first_line: str


@dataclass(frozen=True)
class Conversation(Item):
    """Social user turns that end in a question of fact."""

    turns: tuple[str, ...]
    question: Question


T = TypeVar("T", bound=Item)


def load_pairs(split: str | None = None, kind: str | None = None, path: str | Path | None = None) -> list[Pair]:
    """Pairs in file order. `path`: a file or folder of the reader's own instead of the packaged one."""
    pairs = _load(path or FOLDER / "pairs", _pair, split)
    return [pair for pair in pairs if kind in (None, pair.kind)]


def load_turns(split: str | None = None, path: str | Path | None = None) -> list[Turn]:
    return _load(path or FOLDER / "turns", _turn, split)


def load_questions(
    split: str | None = None, domain: str | None = None, path: str | Path | None = None
) -> list[Question]:
    questions = _load(path or FOLDER / "questions", _question, split)
    return [question for question in questions if domain in (None, question.domain)]


def load_contexts(group: str | None = None) -> list[Context]:
    return [c for c in _load(FOLDER / "contexts.jsonl", _context, None) if group in (None, c.group)]


def load_scenes() -> list[Scene]:
    return _load(FOLDER / "scenes.jsonl", _scene, None)


def load_conversations() -> list[Conversation]:
    return _load(FOLDER / "conversations.jsonl", _conversation, None)


def data_hash(items: Iterable[Item]) -> str:
    """SHA-256 over the content of the items in order: two runs with this hash saw the same data."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(dataclasses.asdict(item), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def _load(path: str | Path, build: Callable[[_Line], T], split: str | None) -> list[T]:
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(path, 0, "the folder holds no .jsonl file")
    items: list[T] = []
    seen: dict[str, str] = {}
    for file in files:
        for number, value in read_jsonl(file):
            item = build(_Line(file, number, value))
            if item.id in seen:
                raise DataError(file, number, f"id {item.id!r} was used before, at {seen[item.id]}")
            seen[item.id] = f"{file.name}:{number}"
            items.append(item)
    return [item for item in items if split in (None, item.split)]


@dataclass(frozen=True)
class _Line:
    """One JSON object and where it stands, so that every complaint can name the line."""

    path: Path
    number: int
    value: dict[str, Any]

    def fail(self, problem: str) -> DataError:
        return DataError(self.path, self.number, problem)

    def get(self, key: str) -> Any:
        if key not in self.value:
            raise self.fail(f"key {key!r} is missing; the line has {sorted(self.value)}")
        return self.value[key]

    def text(self, key: str, allowed: Sequence[str] = ()) -> str:
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(f"{key!r} must be a text that is not empty, found {value!r}")
        if allowed and value not in allowed:
            raise self.fail(f"{key!r} must be one of {list(allowed)}, found {value!r}")
        return value

    def id(self) -> str:
        id = self.text("id")
        if not re.search(r"\d+$", id):
            raise self.fail(f"id {id!r} must end in a number, from which the split is read")
        return id

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.fail(f"{key!r} must be true or false, found {value!r}")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
            raise self.fail(f"{key!r} must be a list of texts that is not empty, found {value!r}")
        return tuple(value)

    def mapping(self, key: str, keys: Sequence[str]) -> dict[str, Any]:
        value = self.get(key)
        if not isinstance(value, dict) or not set(keys) <= set(value):
            raise self.fail(f"{key!r} must be an object with the keys {list(keys)}, found {value!r}")
        return value

    def messages(self, key: str, last: str | None) -> list[Message]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.fail(f"{key!r} must be a list of messages, found {value!r}")
        for message in value:
            if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
                raise self.fail(f"{key!r} holds a message without a role of system, user or assistant: {message!r}")
            if not isinstance(message.get("content"), str) or not message["content"].strip():
                raise self.fail(f"{key!r} holds an empty message: {message!r}")
        if last and (not value or value[-1]["role"] != last):
            raise self.fail(f"{key!r} must end with a {last} message")
        return [Message(role=m["role"], content=m["content"]) for m in value]


def _pair(line: _Line) -> Pair:
    replies = line.mapping("replies", ("neutral", "warm"))
    for style, reply in replies.items():
        if not isinstance(reply, str) or not reply.strip():
            raise line.fail(f"reply {style!r} is empty")
    return Pair(
        line.id(),
        line.text("kind", KINDS),
        line.text("domain"),
        line.messages("messages", "user"),
        dict(replies),
    )


def _turn(line: _Line) -> Turn:
    return Turn(
        id=line.id(),
        text=line.text("text"),
        label=line.text("label", LABELS),
        mixed=line.flag("mixed"),
        hard=line.flag("hard"),
        pattern=line.text("pattern"),
        context=line.messages("context", None),
        labels=line.texts("labels") if "labels" in line.value else (),
    )


def _question(line: _Line, id: str | None = None) -> Question:
    return Question(
        id=id or line.id(),
        domain=line.text("domain", QUESTION_DOMAINS),
        kind=line.text("kind", QUESTION_KINDS),
        question=line.text("question"),
        answers=line.texts("answers"),
        wrong=line.text("wrong"),
        explanation=line.text("explanation"),
    )


def _context(line: _Line) -> Context:
    return Context(line.id(), line.text("group", CONTEXT_GROUPS), line.text("text"))


def _scene(line: _Line) -> Scene:
    return Scene(
        id=line.id(),
        persona=line.mapping("persona", ("name", "age", "job", "hobbies", "speech")),
        event=line.text("event"),
        theme=line.text("theme"),
        intention=line.text("intention", INTENTIONS),
        reactions=line.mapping("reactions", ("A", "B", "C", "F")),
        first_line=line.text("first_line"),
    )


def _conversation(line: _Line) -> Conversation:
    id = line.id()
    question = line.mapping("question", ("domain", "kind", "question", "answers", "wrong", "explanation"))
    return Conversation(id, line.texts("turns"), _question(_Line(line.path, line.number, question), id=id))
