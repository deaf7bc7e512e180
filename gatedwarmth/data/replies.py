"""Checks of the replies: the styles must differ in warmth and in nothing else."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence

from gatedwarmth.data import STYLES, Pair
from gatedwarmth.data.corpus import Entry, Problem, Report
from gatedwarmth.data.overlap import words

LARGEST_MEDIAN_RATIO, LARGEST_RATIO = 1.35, 1.8  # characters of the warm reply over those of the neutral one
FRAME_WORDS, LARGEST_FRAME_SHARE = (
    4,
    0.02,
)  # an opening or closing of four words, in 2 % of the replies at most
STOCK_PHRASES = (
    "i hear you",
    "sorry to hear",
    "sorry you're going through",
    "sorry for your loss",
    "not alone",
    "that must be",
    "that must have been",
    "must be so hard",
    "sounds really hard",
    "sounds really tough",
    "sounds like you",
    "completely understandable",
    "totally understandable",
    "feelings are valid",
    "completely valid",
    "totally valid",
    "be gentle with yourself",
    "be kind to yourself",
    "take care of yourself",
    "here for you",
    "it's okay to feel",
    "you've got this",
    "sending you",
)
_NUMBER_WORDS = {
    **{"half": "1/2", "once": "1", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12"},
}

_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
# Not of code and not a factorial ("5! = 120").
_EXCLAMATION = re.compile(r"(?<![\d)])!(?!=)")
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


def reply_problems(entry: Entry[Pair]) -> Iterator[Problem]:
    """Problems of one pair: unknown styles, exclamation marks, lost numbers and code, stock phrases."""
    replies = entry.item.replies
    unknown = replies.keys() - set(STYLES)
    if unknown:
        yield entry.problem(f"replies of unknown styles {sorted(unknown)}; known are {list(STYLES)}")
    if _EXCLAMATION.search(_CODE.sub(" ", replies["neutral"])):
        yield entry.problem("exclamation mark in the neutral reply; end the sentence with a full stop")
    ratio = len(replies["warm"]) / len(replies["neutral"])
    if ratio > LARGEST_RATIO:
        yield entry.problem(
            f"the warm reply is {ratio:.2f} times as long as the neutral one, {LARGEST_RATIO} is the most; cut it"
        )
    yield from _lost(entry)
    told = f" {' '.join(words(replies['warm']))} "
    for phrase in STOCK_PHRASES:
        if f" {phrase} " in told:
            yield entry.problem(f"stock phrase {phrase!r} in the warm reply; speak of this situation instead")


def _lost(entry: Entry[Pair]) -> Iterator[Problem]:
    """Numbers and code lines of the neutral reply that the warm one dropped."""
    replies = entry.item.replies
    neutral, warm = replies["neutral"], replies["warm"]
    lines = {_squeezed(line) for line in _code_lines(warm)}
    for line in _code_lines(neutral):
        if _squeezed(line) not in lines:
            yield entry.problem(f"code line {line.strip()!r} of the neutral reply is not in the warm one; add it")
    missing = sorted(numbers(neutral) - numbers(warm, spelled=True))
    if missing:
        yield entry.problem(f"the warm reply lacks {', '.join(missing)}, which the neutral one has; add it")


def numbers(text: str, spelled: bool = False) -> set[str]:
    """The numbers written in digits, without commas for thousands; with `spelled`, those written as words too.

    >>> sorted(numbers("4 of 1,250 at 3.50"))
    ['1250', '3.5', '4']
    """
    found = {_plain(number) for number in _NUMBER.findall(text)}
    if spelled:
        found |= {_NUMBER_WORDS[word] for word in words(text) if word in _NUMBER_WORDS}
    return found


def _plain(number: str) -> str:
    number = re.sub(r",(?=\d{3}(?!\d))", "", number)
    return number.rstrip("0").rstrip(".") if "." in number else number


def _code_lines(text: str) -> list[str]:
    return [line for block in _FENCE.findall(text) for line in block.split("\n") if line.strip()]


def _squeezed(line: str) -> str:
    return "".join(line.split())


def ratios(pairs: Sequence[Entry[Pair]]) -> Report:
    """Median and largest ratio of lengths in characters, warm over neutral."""
    if not pairs:
        return Report([], {})
    values = [len(e.item.replies["warm"]) / len(e.item.replies["neutral"]) for e in pairs]
    median = statistics.median(values)
    measured = (
        f"median {median:.2f} (limit: under {LARGEST_MEDIAN_RATIO}), largest {max(values):.2f} (limit {LARGEST_RATIO})"
    )
    problems = []
    if median >= LARGEST_MEDIAN_RATIO:
        what = f"the median warm reply is {median:.2f} times as long as the neutral one"
        problems.append(
            Problem(pairs[0].path, 0, f"{what}, it must be under {LARGEST_MEDIAN_RATIO}; shorten the warm ones")
        )
    return Report(problems, {"length, warm : neutral": measured})


def frames(pairs: Sequence[Entry[Pair]]) -> list[Report]:
    """Openings and closings that too many replies of one style share."""
    return [
        _frame(pairs, style, name, cut)
        for style in STYLES
        for name, cut in (("opens", _opening), ("closes", _closing))
        if any(style in e.item.replies for e in pairs)
    ]


def _opening(reply: list[str]) -> str:
    return " ".join(reply[:FRAME_WORDS])


def _closing(reply: list[str]) -> str:
    return " ".join(reply[-FRAME_WORDS:])


def _frame(pairs: Sequence[Entry[Pair]], style: str, name: str, cut: Callable[[list[str]], str]) -> Report:
    users: dict[str, list[Entry[Pair]]] = {}
    total = 0
    for entry in pairs:
        if style in entry.item.replies:
            total += 1
            users.setdefault(cut(words(entry.item.replies[style])), []).append(entry)
    most = max(1, int(LARGEST_FRAME_SHARE * total))
    problems = [
        entry.problem(
            f"{frame!r} {name} {len(entries)} of {total} {style} replies, {most} is the most; "
            f"begin or end it otherwise (first used at {entries[0].place})"
        )
        for frame, entries in users.items()
        for entry in entries[most:]
    ]
    commonest = max(users, key=lambda frame: len(users[frame]))
    share = len(users[commonest]) / total
    measured = f"{commonest!r} {name} {share:.1%} of the {style} replies (limit {LARGEST_FRAME_SHARE:.0%})"
    return Report(problems, {f"{style} replies, {name}": measured})
