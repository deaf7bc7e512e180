"""Figures of the corpora: counts, balance, lengths, vocabulary, the warm : neutral length ratio, agreement."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gatedwarmth.data import STYLES, Conversation, Item, Pair, Question, Turn
from gatedwarmth.data.corpus import Corpora, read_corpora
from gatedwarmth.data.overlap import words

Figures = dict[str, Any]


def stats(folder: str | Path | None = None) -> Figures:
    """Figures of every corpus of `folder` (default: the packaged ones), ready for JSON.

    Items that do not load are left out; "problems" counts the complaints of the reader, and `check` names them.

    Raises
    ------
    DataError: `folder` holds no corpus.
    """
    corpora = read_corpora(folder)
    figures = {
        "pairs": _pairs([entry.item for entry in corpora.pairs]),
        "turns": _turns([entry.item for entry in corpora.turns]),
        "questions": _questions([entry.item for entry in corpora.questions]),
        **_scenery(corpora),
        "conversations": _conversations([entry.item for entry in corpora.conversations]),
    }
    return {
        "corpora": {name: part for name, part in figures.items() if part["count"]},
        "problems": len(corpora.problems),
    }


def cohens_kappa(labelings: Sequence[tuple[str, str]]) -> float | None:
    """Agreement of two labelings beyond chance, (p_o - p_e) / (1 - p_e); Cohen, 1960.

    None without labels, or where both gave one and the same label throughout (chance alone would agree).
    """
    if not labelings:
        return None
    n = len(labelings)
    observed = sum(a == b for a, b in labelings) / n
    first, second = Counter(a for a, _ in labelings), Counter(b for _, b in labelings)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def _pairs(pairs: Sequence[Pair]) -> Figures:
    texts = {"user": [m["content"] for p in pairs for m in p.messages if m["role"] == "user"]}
    texts |= {style: [p.replies[style] for p in pairs if style in p.replies] for style in STYLES}
    ratios = [len(p.replies["warm"]) / len(p.replies["neutral"]) for p in pairs]
    return {
        **_counted(pairs, {"kind": [p.kind for p in pairs], "domain": [p.domain for p in pairs]}),
        "user_turns": _tally(sum(m["role"] == "user" for m in p.messages) for p in pairs),
        **_lengths(texts),
        "warm_to_neutral": _quartiles(ratios),
    }


def _turns(turns: Sequence[Turn]) -> Figures:
    labelings = [(t.labels[0], t.labels[1]) for t in turns if len(t.labels) == 2]
    kappa = cohens_kappa(labelings)
    balance: dict[str, list[str]] = {
        "label": [t.label for t in turns],
        "label of the hard ones": [t.label for t in turns if t.hard],
        "pattern": [t.pattern for t in turns],
        "mixed": ["mixed" if t.mixed else "not mixed" for t in turns],
        "context": ["with context" if t.context else "without" for t in turns],
    }
    for label in ("social", "reasoning"):
        balance[f"split of {label}"] = [t.split for t in turns if t.label == label]
    return {
        **_counted(turns, balance),
        **_lengths({label: [t.text for t in turns if t.label == label] for label in ("social", "reasoning")}),
        "labeled_twice": len(labelings),
        "disagreements": sum(a != b for a, b in labelings),
        "cohens_kappa": None if kappa is None else round(kappa, 3),
    }


def _questions(questions: Sequence[Question]) -> Figures:
    balance = {"domain": [q.domain for q in questions], "kind": [q.kind for q in questions]}
    return {
        **_counted(questions, balance),
        **_lengths({"question": [q.question for q in questions]}),
        "aliases": _quartiles([float(len(q.answers)) for q in questions]),
    }


def _conversations(conversations: Sequence[Conversation]) -> Figures:
    return {
        **_counted(conversations, {"domain": [c.question.domain for c in conversations]}),
        "user_turns": _tally(len(c.turns) for c in conversations),
        **_lengths({"turn": [t for c in conversations for t in c.turns]}),
    }


def _scenery(corpora: Corpora) -> dict[str, Figures]:
    contexts = [entry.item for entry in corpora.contexts]
    scenes = [entry.item for entry in corpora.scenes]
    return {
        "contexts": {
            "count": len(contexts),
            "balance": {"group": _tally(c.group for c in contexts)},  # contexts have no splits
            **_lengths({"statement": [c.text for c in contexts]}),
        },
        "scenes": {
            **_counted(scenes, {"intention": [s.intention for s in scenes]}),
            **_lengths({"event": [s.event for s in scenes], "first line": [s.first_line for s in scenes]}),
        },
    }


def _counted(items: Sequence[Item], balance: Mapping[str, list[str]]) -> Figures:
    tallies = {"split": _tally(item.split for item in items)}
    return {"count": len(items), "balance": tallies | {name: _tally(values) for name, values in balance.items()}}


def _tally(values: Iterable[object]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items(), key=lambda pair: str(pair[0]))}


def _lengths(texts: Mapping[str, list[str]]) -> Figures:
    known = {word for several in texts.values() for text in several for word in words(text)}
    return {
        "vocabulary": len(known),
        "characters": {name: _quartiles([float(len(t)) for t in several]) for name, several in texts.items()},
        "words": {name: _quartiles([float(len(t.split())) for t in several]) for name, several in texts.items()},
    }


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles (inclusive method) and maximum, to three digits; empty for no values."""
    if not values:
        return {}
    middle = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    names = ("least", "quarter", "median", "three_quarters", "most")
    return {name: round(value, 3) for name, value in zip(names, (min(values), *middle, max(values)), strict=True)}


def table(figures: Figures) -> Table:
    """The figures of `stats` as one table with a section for each corpus."""
    shown = Table("corpus", "what", "figures")
    for name, part in figures["corpora"].items():
        for row, (what, value) in enumerate(_rows(part)):
            shown.add_row("" if row else name, what, value)
        shown.add_section()
    shown.add_row("all", "problems while reading", str(figures["problems"]))
    return shown


def _rows(part: Figures) -> Iterator[tuple[str, str]]:
    yield "items", str(part["count"])
    for what, tally in part["balance"].items():
        yield what, _listed(tally)
    if "user_turns" in part:
        yield "user turns each", _listed(part["user_turns"])
    yield "vocabulary", f"{part['vocabulary']} words"
    for unit in ("characters", "words"):
        for what, spread in part[unit].items():
            yield f"{what}, {unit}", _spread(spread)
    if "warm_to_neutral" in part:
        yield "warm : neutral, characters", _spread(part["warm_to_neutral"])
    if "aliases" in part:
        yield "answers a question", _spread(part["aliases"])
    if "labeled_twice" in part:
        kappa = "not known" if part["cohens_kappa"] is None else part["cohens_kappa"]
        twice = f"{part['labeled_twice']}, of these {part['disagreements']} differently; Cohen's κ {kappa}"
        yield "labeled twice, blind", twice


def _listed(tally: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in tally.items())


def _spread(spread: Mapping[str, float]) -> str:
    if not spread:
        return "none"
    least, quarter, median, three_quarters, most = (f"{value:g}" for value in spread.values())
    return f"median {median}, quartiles {quarter} to {three_quarters}, {least} to {most}"
