"""A folder of corpora read line by line: what loads, where it stands, and every line that does not load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gatedwarmth import data
from gatedwarmth.data import Context, Conversation, Item, Pair, Question, Scene, Turn
from gatedwarmth.errors import DataError

NOTES = {"settled"}  # keys that tell a reader how an item came about, and that the loader leaves alone

T = TypeVar("T", bound=Item)


@dataclass(frozen=True, order=True)
class Problem:
    """One thing to mend. `line` counts from 1; 0 means the file or folder as a whole."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        path = self.path
        if path.is_absolute() and path.is_relative_to(Path.cwd()):
            path = path.relative_to(Path.cwd())
        return f"{path}:{self.line}: {self.what}" if self.line else f"{path}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What was found, and what was measured on the way (name → value with its limit, ready to print)."""

    problems: list[Problem]
    measured: dict[str, str]


def short(text: str, length: int = 60) -> str:
    """The text on one line, cut to `length` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"


@dataclass(frozen=True)
class Entry(Generic[T]):
    """An item and the line that it stands on."""

    path: Path
    line: int
    item: T

    @property
    def place(self) -> str:
        return f"{self.path.name}:{self.line}"

    def problem(self, what: str) -> Problem:
        return Problem(self.path, self.line, what)


@dataclass(frozen=True)
class Corpora:
    """All items of a folder, by corpus, and the problems met while reading them."""

    folder: Path
    pairs: list[Entry[Pair]]
    turns: list[Entry[Turn]]
    questions: list[Entry[Question]]
    contexts: list[Entry[Context]]
    scenes: list[Entry[Scene]]
    conversations: list[Entry[Conversation]]
    files: list[Path]
    problems: list[Problem]


def read_corpora(folder: str | Path | None = None) -> Corpora:
    """Read every corpus of `folder` (the packaged one by default); broken lines become problems.

    A corpus is a folder of JSON-lines files or one file: `pairs/*.jsonl` or `pairs.jsonl`. A folder of one's own
    may hold only some of the corpora.

    Raises
    ------
    DataError: `folder` holds no corpus at all.
    """
    root = Path(folder or data.FOLDER)
    reader = _Reader(root, files=[], problems=[])
    corpora = Corpora(
        folder=root,
        pairs=reader.read("pairs", data._pair, Pair),
        turns=reader.read("turns", data._turn, Turn),
        questions=reader.read("questions", data._question, Question),
        contexts=reader.read("contexts", data._context, Context),
        scenes=reader.read("scenes", data._scene, Scene),
        conversations=reader.read("conversations", data._conversation, Conversation),
        files=reader.files,
        problems=reader.problems,
    )
    if not corpora.files:
        raise DataError(root, 0, "no corpus here; expected pairs/*.jsonl, turns/*.jsonl, contexts.jsonl or the like")
    return corpora


@dataclass(frozen=True)
class _Reader:
    root: Path
    files: list[Path]
    problems: list[Problem]

    def read(self, name: str, build: Callable[[data._Line], T], kind: type[T]) -> list[Entry[T]]:
        single = self.root / f"{name}.jsonl"
        files = [*([single] if single.is_file() else []), *sorted((self.root / name).glob("*.jsonl"))]
        self.files.extend(files)
        known = {field.name for field in dataclasses.fields(kind)} | NOTES
        entries: dict[str, Entry[T]] = {}
        for path in files:
            for line, value in self._objects(path):
                try:
                    entry = Entry(path, line, build(data._Line(path, line, value)))
                except DataError as error:
                    self.problems.append(Problem(path, line, error.problem))
                    continue
                if value.keys() - known:
                    self._complain(entry, f"unknown keys {sorted(value.keys() - known)}; known are {sorted(known)}")
                if entry.item.id in entries:
                    first = entries[entry.item.id].place
                    self._complain(entry, f"id {entry.item.id!r} was used before, at {first}; give it a new one")
                entries.setdefault(entry.item.id, entry)
        return list(entries.values())

    def _complain(self, entry: Entry[T], what: str) -> None:
        self.problems.append(entry.problem(what))

    def _objects(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(Line number, object) of the lines that hold one; what is wrong with the others goes to the problems."""
        for line, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                what = f"not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
                self.problems.append(Problem(path, line, what))
            except json.JSONDecodeError as error:
                what = f"not JSON ({error.msg} at column {error.colno}); mend or delete it"
                self.problems.append(Problem(path, line, what))
            else:
                if isinstance(value, dict):
                    yield line, value
                else:
                    what = f"a JSON object is needed, found {type(value).__name__}"
                    self.problems.append(Problem(path, line, what))
