"""Texts that share too much: near-duplicates by n-gram Jaccard, and runs of words shared with other texts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

WORD_GRAM = 3
CHARACTER_GRAM = 5
RUN = 13  # words; the length that GPT-3 used for contamination (arXiv:2005.14165, appendix C)
SHORTEST = 5  # words; under that, being the same as some public text means nothing

_PREFIX_MATCHES = 12  # fewer: more pairs to compare; more: longer lists to count. 12 is quickest here
_WORD = re.compile(r"\w+(?:'\w+)*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; typographic apostrophes count as plain ones.

    >>> words("It’s 5 o'clock, Ana!")
    ["it's", '5', "o'clock", 'ana']
    """
    return _WORD.findall(text.lower().replace("’", "'"))


def grams(items: Sequence[str], n: int) -> frozenset[str]:
    """Every run of `n` items, joined by blanks; a sequence shorter than that is one run."""
    if not items:
        return frozenset()
    return frozenset(" ".join(items[i : i + n]) for i in range(max(1, len(items) - n + 1)))


def character_grams(text: str, n: int = CHARACTER_GRAM) -> frozenset[str]:
    """Every run of `n` characters of the normalised text; a text shorter than that is one run."""
    flat = " ".join(words(text))
    if not flat:
        return frozenset()
    return frozenset(flat[i : i + n] for i in range(max(1, len(flat) - n + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a ∩ b| / |a ∪ b|; two empty sets share nothing: 0."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[tuple[int, int], float]:
    """Pairs (i, j), i < j, whose Jaccard of word 3-grams or of character 5-grams is above `threshold`.

    Exact: the prefix filter finds every pair that comparing all pairs would find. The value is the larger of the
    two Jaccards that are above the threshold.
    """
    found: dict[tuple[int, int], float] = {}
    for sets in (
        [grams(words(text), WORD_GRAM) for text in texts],
        [character_grams(text) for text in texts],
    ):
        for pair, value in similar_sets(sets, threshold):
            found[pair] = max(value, found.get(pair, 0.0))
    return found


def similar_sets(sets: Sequence[frozenset[str]], threshold: float) -> Iterator[tuple[tuple[int, int], float]]:
    """Every ((i, j), Jaccard) above `threshold`, by prefix filtering (Bayardo et al., WWW 2007; Wang et al.,
    SIGMOD 2012).

    Two sets of a Jaccard of at least t share at least ⌈t|x|⌉ elements. So, with all elements in one order, they
    share k of the first |x| - ⌈t|x|⌉ + k of each. In the order from rare to common few other pairs do.
    """
    frequency = Counter(element for elements in sets for element in elements)
    index: dict[str, list[int]] = {}
    needed = [min(_PREFIX_MATCHES, math.ceil(threshold * len(elements))) for elements in sets]
    for j in sorted(range(len(sets)), key=lambda k: len(sets[k])):
        size = len(sets[j])
        smallest = math.ceil(threshold * size)
        rare = sorted(sets[j], key=lambda element: (frequency[element], element))
        del rare[size - smallest + needed[j] :]
        met = Counter(chain.from_iterable(index.get(element, ()) for element in rare))
        for i, times in met.items():
            if times >= min(needed[i], needed[j]) and len(sets[i]) >= smallest:
                value = jaccard(sets[i], sets[j])
                if value > threshold:
                    yield (min(i, j), max(i, j)), value
        for element in rare:
            index.setdefault(element, []).append(j)


def shared_runs(texts: Sequence[str], others: Iterable[str], n: int = RUN) -> dict[int, tuple[int, str]]:
    """Of `texts`, those that share a run of `n` words with one of `others`.

    A text shorter than `n` words counts when it *is* one of the others, word for word. Maps the text's index to
    (index among `others`, the shared words), the first found. Texts under `SHORTEST` words are left alone.
    """
    runs: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        told = words(text)
        for run in grams(told, n) if len(told) >= SHORTEST else ():
            runs.setdefault(run, []).append(i)
    found: dict[int, tuple[int, str]] = {}
    for k, other in enumerate(others):
        for run in grams(words(other), n) & runs.keys():
            for i in runs[run]:
                found.setdefault(i, (k, run))
    return found
