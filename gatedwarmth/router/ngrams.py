"""Hashed n-grams: a feature's column is a hash of its letters (feature hashing, Weinberger et al., arXiv:0902.2206)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

PRIME = np.uint64(0x100000001B3)


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


def columns_of(symbols: np.ndarray, bits: int) -> np.ndarray:
    """int64: the column of each number, below 2 ** bits."""
    return (mixed(symbols) & np.uint64(2**bits - 1)).astype(np.int64)
