"""The texts of public evaluation sets, read from a local copy, to keep the corpora free of them.

None of these sets is part of the package. A local copy has one folder a set, each in its upstream format:
`truthfulqa/TruthfulQA.csv`, `gsm8k/test.jsonl` and so on.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gatedwarmth.errors import DataError

PUBLIC_SETS = {
    "truthfulqa": "sylinrl/TruthfulQA",
    "triviaqa": "mandarjoshi/trivia_qa",
    "medqa": "jind11/MedQA",
    "gsm8k": "openai/grade-school-math",
    "mmlu": "hendrycks/test",
    "empatheticdialogues": "facebookresearch/EmpatheticDialogues",
    "esconv": "thu-coai/Emotional-Support-Conversation",
    "goemotions": "google-research/goemotions",
    "sage": "Tencent/digitalhuman, SAGE/profile",
    "eq_bench": "EQ-bench/EQ-Bench",
    "mbti": "spcl/MBTI-in-Thoughts",
    "humt": "myracheng/humtdumt",
    "elephant": "myracheng/elephant",
}


@dataclass(frozen=True)
class PublicText:
    """One text of a public set. `source`: the set's folder and the file in it."""

    source: str
    text: str


def public_texts(data_dir: str | Path) -> list[PublicText]:
    """Every distinct text of the public sets that `data_dir` holds, in file order.

    Raises
    ------
    DataError: `data_dir` holds none of the sets, or a file of theirs cannot be read.
    """
    folder = Path(data_dir)
    present = [name for name in PUBLIC_SETS if (folder / name).is_dir()]
    if not present:
        raise DataError(folder, 0, f"no folder of a public set here; expected one or more of {list(PUBLIC_SETS)}")
    found: dict[PublicText, None] = {}
    for name in present:
        for path in sorted(p for p in (folder / name).rglob("*") if p.suffix in _READERS):
            source = f"{name}/{path.relative_to(folder / name).as_posix()}"
            found.update((PublicText(source, text), None) for text in _file_texts(path) if text.strip())
    return list(found)


def missing_sets(data_dir: str | Path) -> list[str]:
    """The names of the sets that `data_dir` has no folder of."""
    return [name for name in PUBLIC_SETS if not (Path(data_dir) / name).is_dir()]


def _file_texts(path: Path) -> Iterator[str]:
    try:
        raw = path.read_text(encoding="utf-8-sig")
        leaves = list(_READERS[path.suffix](raw))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(path, 0, f"cannot be read as {path.suffix[1:]} ({error}); fetch it again") from None
    for leaf in leaves:
        yield from _clean(leaf)


def _clean(text: str) -> list[str]:
    """Take out marks of the file formats that would hide a shared run of words."""
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K: calculator annotations
    parts = re.split(r"\bEOS\b", text)  # ESConv: one row a whole dialogue, "1.0 3 4 [Strategy] words"
    return [re.sub(r"^\s*\d\.0 \d+ \d+\s+(\[[^\]]*\]\s*)?", "", part) for part in parts]


def _separated(delimiter: str, quoting: Literal[0, 3]) -> Callable[[str], Iterator[str]]:
    # 0: fields may stand in quotes (csv.QUOTE_MINIMAL); 3: a quote is a character like others (csv.QUOTE_NONE)
    def read(raw: str) -> Iterator[str]:
        for row in csv.reader(io.StringIO(raw, newline=""), delimiter=delimiter, quoting=quoting):
            yield from row

    return read


def _json(raw: str) -> Iterator[str]:
    yield from strings(json.loads(raw))


def _json_lines(raw: str) -> Iterator[str]:
    for line in raw.split("\n"):
        if line.strip():
            yield from strings(json.loads(line))


def strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys of objects included (TruthfulQA keeps its answers there)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)


_READERS: dict[str, Callable[[str], Iterator[str]]] = {
    ".csv": _separated(",", 0),
    ".tsv": _separated("\t", 3),
    ".json": _json,
    ".jsonl": _json_lines,
}
