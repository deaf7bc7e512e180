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
PRIME = np.uint64(0x100000001B3)
SENTENCE = re.compile(r"(?<=[.!?…\n])\s+")


@dataclass(frozen=True)
class TextSettings:
    """What is read of a conversation.

    bits: 2 ** bits columns, shared by all n-grams. words: longest word n-gram. skeleton: longest n-gram of function
    words and endings. characters: shortest and longest character n-gram. vectors: whether single words have columns
    of their own, 2 ** bits more, which training fills from a base's word vectors.
    letters, earlier: of a longer turn, or a longer turn before it, only the beginning and the end are read.
    weight_*: length of each part of the feature vector.
    """

    bits: int = 18
    words: int = 2
    skeleton: int = 4
    characters: tuple[int, int] = (2, 5)
    vectors: bool = False
    letters: int = 4000
    earlier: int = 400
    weight_words: float = 1.0
    weight_characters: float = 1.0
    weight_openings: float = 0.7
    weight_last: float = 0.7
    weight_skeleton: float = 0.7
    weight_context: float = 0.5
    weight_shape: float = 0.5
    weight_vectors: float = 4.0

    @property
    def columns(self) -> int:
        """Length of the feature vector."""
        return self.first_vector + (2**self.bits if self.vectors else 0)

    @property
    def first_vector(self) -> int:
        """The column where single words begin."""
        return 2**self.bits + len(SHAPE)


@dataclass(frozen=True)
class TextWeights:
    """A linear function of text. weight: float32 [columns, traits - 1], relative to the last trait."""

    weight: np.ndarray
    settings: TextSettings

    def logits(self, conversations: Sequence[Sequence[Message]]) -> np.ndarray:
        """float64 [n, traits - 1], without a bias."""
        found = np.empty((len(conversations), self.weight.shape[1]))
        for row, messages in enumerate(conversations):
            columns, values = features(messages, self.settings)
            found[row] = values @ self.weight[columns]
        return found

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self.settings)

    @classmethod
    def from_parts(cls, weight: np.ndarray, settings: dict[str, Any], traits: Sequence[str]) -> TextWeights:
        """From what was saved; RouterError when the two do not fit."""
        made = TextSettings(**{**settings, "characters": tuple(settings["characters"])})
        return cls(check_array("weight", weight, (made.columns, len(traits) - 1)), made)


class TextRouter:
    """From the last user turn, and the turns before it, to a probability per trait.

    Parameters
    ----------
    text: the weights. bias: float32 [traits - 1]. Calibration is folded into both.
    """

    kind = "text"

    def __init__(self, text: TextWeights, bias: np.ndarray, card: Card) -> None:
        others = len(card.traits) - 1
        check_array("weight", text.weight, (text.settings.columns, others))
        self.text, self.card = text, card
        self.bias = check_array("bias", bias, (others,))

    @property
    def traits(self) -> tuple[str, ...]:
        return self.card.traits

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], read_hidden: ReadHidden | None = None
    ) -> np.ndarray:
        """[n, traits], rows sum to 1. `read_hidden` is not used."""
        return softmax_to_last(self.text.logits(conversations) + self.bias)

    def save(self, folder: str | Path) -> None:
        tensors = {"weight": self.text.weight, "bias": self.bias}
        write_router(Path(folder), self.kind, self.card, self.text.to_json(), tensors)

    def describe(self) -> str:
        return self.card.line(self.kind)

    @classmethod
    def from_parts(cls, card: Card, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> TextRouter:
        return cls(TextWeights.from_parts(tensors["weight"], settings, card.traits), tensors["bias"], card)


def features(messages: Sequence[Message], settings: TextSettings) -> tuple[np.ndarray, np.ndarray]:
    """The feature vector of a conversation, as columns (int64) and values (float32). Values of one column add up.

    Raises
    ------
    RouterError: a conversation without messages.
    """
    if not messages:
        raise RouterError("the conversation is empty; give at least one user message")
    text = bounded(messages[-1]["content"], settings.letters)
    lower = text.lower().strip()
    sentences = [WORD.findall(sentence) for sentence in SENTENCE.split(lower)]
    words = [word for sentence in sentences for word in sentence]
    earlier = [m for m in messages[:-1] if m["role"] != "system"][-2:]
    before = WORD.findall("\n".join(bounded(m["content"], settings.earlier) for m in earlier).lower())
    openings = [ngrams(word_symbols(["^", *sentence[:2]]), 1, 3, seed=3) for sentence in sentences]
    symbols = word_symbols(words)
    families = [
        (ngrams(symbols, 1, settings.words, seed=1), settings.weight_words),
        (ngrams(character_symbols(lower), *settings.characters, seed=2), settings.weight_characters),
        (np.concatenate(openings), settings.weight_openings),
        (ngrams(symbols[len(words) - len(sentences[-1]) :], 1, settings.words, seed=4), settings.weight_last),
        (ngrams(word_symbols(skeleton(words)), 1, settings.skeleton, seed=5), settings.weight_skeleton),
        (ngrams(word_symbols(before), 1, settings.words, seed=6), settings.weight_context),
    ]
    parts = [weighted(families, settings.bits)]
    size = 2**settings.bits
    parts.append((size + np.arange(len(SHAPE)), settings.weight_shape * shape(text, words, bool(earlier))))
    if settings.vectors and words:
        share = np.full(len(words), settings.weight_vectors / len(words))
        parts.append((settings.first_vector + _word_columns(symbols, settings.bits), share))
    columns = np.concatenate([part[0] for part in parts])
    values = np.concatenate([part[1] for part in parts])
    return columns, values.astype(np.float32)


def word_columns(words: Sequence[str], bits: int) -> np.ndarray:
    """int64 column of each word, counted from `first_vector`."""
    return _word_columns(word_symbols(words), bits)


def _word_columns(symbols: np.ndarray, bits: int) -> np.ndarray:
    return (mixed(symbols) & np.uint64(2**bits - 1)).astype(np.int64)


def skeleton(words: Sequence[str]) -> list[str]:
    """A turn without its topic: function words and marks stay, other words leave their ending.

    >>> skeleton(["my", "sister", "kept", "calling", "12", "times"])
    ['^', 'my', '~er', '~', '~ing', '#', '~s', '$']
    """
    return ["^", *(_bone(word) for word in words), "$"]


def _bone(word: str) -> str:
    if word.isdigit():
        return "#"
    if word in FUNCTION_WORDS or not word[0].isalpha():
        return word
    return next((f"~{ending}" for ending in ENDINGS if word.endswith(ending)), "~")


def bounded(text: str, letters: int) -> str:
    """Beginning and end of a long text: a pasted file must not cost a router its speed."""
    if len(text) <= letters:
        return text
    return f"{text[: letters // 2]} {text[-letters // 2 :]}"


def weighted(families: Sequence[tuple[np.ndarray, float]], bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and 1 + log(count) of the n-grams of several families, each family scaled to its Euclidean length.

    families: (n-grams, length) pairs. All of them go through one sort: the many small ones would cost more apart.
    """
    sizes = [len(grams) for grams, _ in families]
    family = np.repeat(np.arange(len(families), dtype=np.uint64), sizes)
    hashed = mixed(np.concatenate([grams for grams, _ in families])) & np.uint64(2**bits - 1)
    keys, counts = np.unique(hashed | (family << np.uint64(bits)), return_counts=True)
    values = 1.0 + np.log(counts)
    family = (keys >> np.uint64(bits)).astype(np.int64)
    norms = np.sqrt(np.bincount(family, values * values, minlength=len(families)))
    scale = np.array([length for _, length in families]) / np.maximum(norms, 1.0)
    return (keys & np.uint64(2**bits - 1)).astype(np.int64), values * scale[family]


def word_symbols(words: Sequence[str]) -> np.ndarray:
    """uint64 [words]: a number per word."""
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint64)


def character_symbols(text: str) -> np.ndarray:
    """uint64 [characters]: code points, runs of blanks counted as one."""
    joined = f" {' '.join(text.split())} "
    return np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)


def ngrams(symbols: np.ndarray, shortest: int, longest: int, seed: int) -> np.ndarray:
    """uint64: a polynomial of every run of `shortest` to `longest` symbols; another seed is another family."""
    state = np.full(len(symbols), seed, dtype=np.uint64)
    found = [state[:0]]
    for n in range(1, min(longest, len(symbols)) + 1):
        state = state[: len(symbols) - n + 1] * PRIME + symbols[n - 1 :]
        if n >= shortest:
            found.append(state)
    return np.concatenate(found)


def mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, so that the low bits depend on all."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


ENDINGS = ("ing", "ed", "ly", "s", "er", "tion")
_FUNCTION_WORDS = """
    a an the and or but if then so because as of at by for with about against between into through during before after
    above below to from up down in out on off over under again once here there when where why how all any both each few
    more most other some such no nor not only own same than too very can will just should now i me my we our us you
    your he him his she her it its they them their what which who whom this that these those am is are was were be been
    being have has had having do does did doing would could may might must need let get got it's i'm i've i'd don't
    doesn't didn't isn't wasn't can't won't that's what's please tell write give explain make compute calculate find
    list show translate fix check draft plan one two many much still even never always today yesterday back like want
    know think
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
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
