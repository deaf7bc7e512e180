"""A router that reads text alone: hashed n-grams and logistic regression, for any base and for serving engines.

There is no vocabulary: a feature's column is a hash of its letters (feature hashing, Weinberger et al.,
arXiv:0902.2206), the same in every process and on every machine.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatedwarmth.data import Message
from gatedwarmth.errors import RouterError
from gatedwarmth.router.base import ReadHidden
from gatedwarmth.router.storage import Card, check_array, softmax_to_last, write_router

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|[^\w\s]")
SHORTENED = 400  # letters of every earlier message that are read


@dataclass(frozen=True)
class TextSettings:
    """What is read of a conversation.

    bits: 2 ** bits columns for the last turn, as many again for the turns before it.
    words: longest word n-gram. characters: shortest and longest character n-gram.
    letters: of a longer turn only the first and last `letters` / 2 characters are read.
    weight_*: length of each part of the feature vector.
    """

    bits: int = 16
    words: int = 2
    characters: tuple[int, int] = (2, 5)
    letters: int = 4000
    weight_words: float = 1.0
    weight_characters: float = 1.0
    weight_shape: float = 0.5
    weight_context: float = 0.5


class TextRouter:
    """From the last user turn, and the turns before it, to a probability per trait.

    Parameters
    ----------
    weight: float32 [columns, traits - 1], relative to the last trait. bias: float32 [traits - 1]. Calibration is
        folded into both.
    """

    kind = "text"

    def __init__(self, weight: np.ndarray, bias: np.ndarray, settings: TextSettings, card: Card) -> None:
        self.settings, self.card = settings, card
        others = len(card.traits) - 1
        self.weight = check_array("weight", weight, (columns_of(settings), others))
        self.bias = check_array("bias", bias, (others,))

    @property
    def traits(self) -> tuple[str, ...]:
        return self.card.traits

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], read_hidden: ReadHidden | None = None
    ) -> np.ndarray:
        """[n, traits], rows sum to 1. `read_hidden` is not used."""
        logits = np.empty((len(conversations), len(self.traits) - 1))
        for row, messages in enumerate(conversations):
            columns, values = features(messages, self.settings)
            logits[row] = values @ self.weight[columns] + self.bias
        return softmax_to_last(logits)

    def save(self, folder: str | Path) -> None:
        tensors = {"weight": self.weight, "bias": self.bias}
        write_router(Path(folder), self.kind, self.card, dataclasses.asdict(self.settings), tensors)

    def describe(self) -> str:
        return self.card.line(self.kind)

    @classmethod
    def from_parts(cls, card: Card, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> TextRouter:
        fields = {**settings, "characters": tuple(settings["characters"])}
        return cls(tensors["weight"], tensors["bias"], TextSettings(**fields), card)


def columns_of(settings: TextSettings) -> int:
    """Length of the feature vector."""
    return 2 * 2**settings.bits + len(SHAPE)


def features(messages: Sequence[Message], settings: TextSettings) -> tuple[np.ndarray, np.ndarray]:
    """The feature vector of a conversation, as columns (int64) and values (float32), each column once.

    Raises
    ------
    RouterError: a conversation without messages.
    """
    if not messages:
        raise RouterError("the conversation is empty; give at least one user message")
    size = 2**settings.bits
    text = bounded(messages[-1]["content"], settings.letters)
    words = WORD.findall(text.lower())
    earlier = [m for m in messages[:-1] if m["role"] != "system"][-2:]
    before = "\n".join(bounded(m["content"], SHORTENED) for m in earlier)
    parts = [
        weighted(word_hashes(words, settings.words) % size, settings.weight_words),
        weighted(character_hashes(text.lower(), *settings.characters) % size, settings.weight_characters),
        (2 * size + np.arange(len(SHAPE)), settings.weight_shape * shape(text, words, bool(earlier))),
    ]
    if before:
        hashes = word_hashes(WORD.findall(before.lower()), settings.words) % size + size
        parts.append(weighted(hashes, settings.weight_context))
    columns = np.concatenate([part[0] for part in parts])
    values = np.concatenate([part[1] for part in parts])
    return columns, values.astype(np.float32)


def bounded(text: str, letters: int) -> str:
    """Beginning and end of a long text: a pasted file must not cost a router its speed."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2]} {text[-letters // 2 :]}"


def weighted(hashes: np.ndarray, length: float) -> tuple[np.ndarray, np.ndarray]:
    """Distinct columns and 1 + log(count), scaled to Euclidean `length`."""
    columns, counts = np.unique(hashes, return_counts=True)
    values = 1.0 + np.log(counts)
    norm = float(np.sqrt(values @ values))
    return columns.astype(np.int64), values * (length / norm if norm else 0.0)


def word_hashes(words: Sequence[str], longest: int) -> np.ndarray:
    """uint64 hashes of all word n-grams up to `longest`."""
    single = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
    return ngram_hashes(np.array(single, dtype=np.uint64), 1, longest, seed=1)


def character_hashes(text: str, shortest: int, longest: int) -> np.ndarray:
    """uint64 hashes of all character n-grams, runs of blanks counted as one."""
    joined = f" {' '.join(text.split())} "
    points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    return ngram_hashes(points, shortest, longest, seed=2)


def ngram_hashes(symbols: np.ndarray, shortest: int, longest: int, seed: int) -> np.ndarray:
    """uint64 hashes of every run of `shortest` to `longest` symbols: a polynomial, then the finaliser of splitmix64."""
    prime = np.uint64(0x100000001B3)
    state = np.full(len(symbols), seed, dtype=np.uint64)
    found = [state[:0]]
    for n in range(1, min(longest, len(symbols)) + 1):
        state = state[: len(symbols) - n + 1] * prime + symbols[n - 1 :] + np.uint64(1)
        if n >= shortest:
            found.append(mixed(state + np.uint64(n << 56)))
    return np.concatenate(found)


def mixed(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


SELF = frozenset(("i", "i'm", "i've", "i'd", "i'll", "me", "my", "mine", "myself", "we", "us", "our", "im", "ive"))
YOU = frozenset(("you", "your", "u", "you're"))
ASKING = frozenset(("what", "which", "how", "when", "where", "who", "whose", "why", "can", "could", "does", "do", "is"))
SHAPE = (
    "ends_asking",
    "asks",
    "opens_asking",
    "self",
    "you",
    "digits",
    "marks",
    "length",
    "short",
    "later",
    "quotes",
)


def shape(text: str, words: Sequence[str], later: bool) -> np.ndarray:
    """Cheap facts about a turn's form, one number in about [0, 1] each, in the order of SHAPE."""
    count = max(1, len(words))
    letters = max(1, len(text))
    return np.array(
        [
            text.rstrip().endswith("?"),
            min(1.0, text.count("?") / 2),
            bool(words) and words[0] in ASKING,
            min(1.0, 5 * sum(word in SELF for word in words) / count),
            min(1.0, 5 * sum(word in YOU for word in words) / count),
            min(1.0, 10 * sum(letter.isdigit() for letter in text) / letters),
            min(1.0, 10 * sum(letter in "=<>{}[]()/*+^_|;$%" for letter in text) / letters),
            min(1.0, np.log1p(len(words)) / 6),
            len(words) <= 4,
            later,
            any(mark in text for mark in "\"'“‘«"),
        ],
        dtype=np.float64,
    )
