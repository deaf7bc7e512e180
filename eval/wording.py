"""Wording made comparable: normalised words, clauses with their sentence, and runs of words within them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


def listed(words: str) -> tuple[str, ...]:
    """A list of words from a text."""
    return tuple(words.split())


_SMALL = listed(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
NUMBERS = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_BEFORE_PRONOUN = listed("no this that which each every any another right")
_UNITS = r"km|kg|g|m|cm|mm|c|f|l|ml|mg|s|min|mph|kmh|hz|am|pm|percent"
# Idioms whose "no" or "not" denies nothing.
_IDIOMS = re.compile(
    r"\b(?:no|without(?: a| any)?) (?:doubt|question|problem|wonder)\b|\bnot (?:only|just|surprisingly|to "
    r"worry)\b"
    r"|\bwhy not\b|\bno matter\b|\bnot a bad (?:guess|thought)\b|\bnone other than\b|\bno worries\b",
    re.IGNORECASE,
)
_CONTRACTIONS = (
    (r"\bcan't\b", "can not"),
    (r"\bcannot\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"\bain't\b", "is not"),
    (r"n't\b", " not"),
    (r"\b(it|that|there|he|she|what|who|here|this|where)'s\b", r"\1 is"),
    (r"\bi'm\b", "i am"),
    (r"'re\b", " are"),
    (r"'(?:s|ve|d|ll)\b", ""),
)
_SYMBOLS = (
    ("%", " percent "),
    ("°", " "),
    ("×", " * "),
    ("·", " * "),
    ("÷", " / "),
    ("−", "-"),
    ("&", " and "),
    ("=", " is "),
)
# Commas, stops and words that start a new statement. A comma within a number is gone by then.
_BREAK = re.compile(
    r"[,;()\[\]]+|:(?!\d)|(?<!\d)\s-+\s|\s-+\s(?!\d)|\s*[—–]\s*|\b(?=(?:but|however|although|though|while|whereas)\b)",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?…])[\"')*_]*\s+|\n+")
_CONTRAST = {"but", "however", "although", "though", "while", "whereas", "actually"}
# After these "it is X" continues the statement; elsewhere "it" starts one: "not Sydney it is Canberra".
_CARRIES_ON = listed("think believe say said sure that true case know if whether because guess suppose as and mean how")


@dataclass(frozen=True)
class Clause:
    """A stretch of a reply that says one thing.

    words: normalised. question: its sentence ends in a question mark. opens: the reply starts with it.
    contrast: a word such as "but" leads into it.
    """

    words: list[str]
    question: bool
    opens: bool
    contrast: bool

    @property
    def text(self) -> str:
        return " ".join(self.words)


def normalise(text: str) -> str:
    """Lower case, no accents, punctuation or articles, contractions written out, number words as digits.

    >>> normalise("The São-Paulo isn't twenty-one!"), normalise("1,000 kg; one hundred")
    ('sao paulo is not 21', '1000 kg 100')
    """
    words = _words(_flatten(text))
    return " ".join(words) or " ".join(_words(_flatten(text), articles=True))


def clauses(text: str, echo: str = "") -> list[Clause]:
    """The clauses of a reply in order. Words of `echo`, the question, are left out where a sentence repeats
    them.
    """
    text = _IDIOMS.sub(" ", _typography(text))
    text = re.sub(r"(?m)^\s*(?:\d{1,2}[.)]|[-*•#]+)\s+", "", text)
    echoed = _words(_flatten(echo))
    found: list[Clause] = []
    for sentence in _SENTENCE.split(text):
        asks = sentence.rstrip(" \"')*_").endswith("?")
        for piece in _BREAK.split(_numbers_joined(sentence)):
            for words in _split_at_it(_words(_flatten(piece))):
                words = _without(echoed, words)
                if words:
                    found.append(Clause(words, asks, not found, words[0] in _CONTRAST))
    return found


def find(needle: Sequence[str], words: Sequence[str]) -> list[tuple[int, int]]:
    """(start, end) of every place where the words of `needle` stand next to each other."""
    size = len(needle)
    if not size:
        return []
    return [(i, i + size) for i in range(len(words) - size + 1) if list(words[i : i + size]) == list(needle)]


def _typography(text: str) -> str:
    """One kind of quotation mark, space and dash; thousands joined while thin spaces can still be told from
    others.
    """
    text = re.sub(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))", "", text)
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"[\u2018\u2019\u02bc`´]", "'", re.sub(r"[\u201c\u201d«»]", '"', text))


def _numbers_joined(text: str) -> str:
    """1,000 and 1 000 as 1000; 3,50 as 3.50."""
    text = re.sub(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.]\d|\d)", lambda m: m.group().replace(" ", ""), text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"(?<![\d.,])(\d+),(\d{1,2})(?![\d,])", r"\1.\2", text)


def _flatten(text: str) -> str:
    """Plain letters with only articles' capitals left, contractions written out."""
    text = _numbers_joined(_typography(text))
    text = re.sub(r"\b(?:the|The|THE|an|An|AN|a)\s+(?=\S)|(?:^|(?<=[.!?] ))A\s+(?=[a-z])", " ", text)
    text = "".join(c for c in unicodedata.normalize("NFD", text.casefold()) if not unicodedata.combining(c))
    for symbol, words in _SYMBOLS:
        text = text.replace(symbol, words)
    for pattern, words in _CONTRACTIONS:
        text = re.sub(pattern, words, text)
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)|(?<=\d)\s*\+\s*(?=\d)", lambda m: f" {m.group().strip()} ", text)
    text = re.sub(r"(?<![\w-])-(?=\d)", "minus ", text)
    return re.sub(rf"(?<=\d)(?=(?:{_UNITS})\b)", " ", text)


def _words(flat: str, articles: bool = False) -> list[str]:
    words = re.findall(r"\d+(?:[.:/]\d+)*|[^\W\d_]+\d[\w]*|\d+\w+|[^\W\d_]+|(?<=\s)[-+*/](?=\s)", flat)
    return _digits([word for word in words if articles or word != "the"])


def _digits(words: list[str]) -> list[str]:
    """Number words as digits: twenty one -> 21, one hundred -> 100, two hundred and five -> 205."""
    out: list[str] = []
    i = 0
    while i < len(words):
        value, used = _number_at(words, i)
        out.append(str(value) if used else words[i])
        i += used or 1
    return out


def _number_at(words: list[str], i: int) -> tuple[int, int]:
    """(value, words used) of the number that starts at word i; (0, 0) for none."""
    if words[i] == "hundred":
        return 100, 1
    value, used = _below_hundred(words, i)
    if not used:
        return 0, 0
    if 0 < value < 10 and words[i + used : i + used + 1] == ["hundred"]:
        skip = used + 1 + (words[i + used + 1 : i + used + 2] == ["and"])
        rest, more = _below_hundred(words, i + skip) if i + skip < len(words) else (0, 0)
        return (100 * value + rest, skip + more) if more else (100 * value, used + 1)
    return value, used


def _below_hundred(words: list[str], i: int) -> tuple[int, int]:
    if words[i] not in NUMBERS or _pronoun(words, i):
        return 0, 0
    value = NUMBERS[words[i]]
    unit = NUMBERS.get(words[i + 1], 0) if i + 1 < len(words) else 0
    if value >= 20 and 0 < unit < 10:
        return value + unit, 2
    return value, 1


def _pronoun(words: list[str], i: int) -> bool:
    """Whether "one" stands for a thing: one of, no one, this one."""
    if words[i] != "one":
        return False
    before = words[i - 1] if i else ""
    return words[i + 1 : i + 2] == ["of"] or before in _BEFORE_PRONOUN


def _split_at_it(words: list[str]) -> list[list[str]]:
    """Cut before an "it" that starts a statement without a comma."""
    for i in range(1, len(words) - 1):
        starts = words[i] == "it" and words[i + 1] in ("is", "was") and words[i - 1] not in _CARRIES_ON
        if starts:
            return [words[:i], *_split_at_it(words[i:])]
    return [words]


def _without(echoed: list[str], words: list[str]) -> list[str]:
    """`words` less the whole question where the reply repeats it."""
    places = find(echoed, words)
    if not places:
        return words
    start, end = places[0]
    return words[:start] + words[end:]
