"""Word vectors for a text router: what a base makes of a word alone, half way through its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

from gatedwarmth.bases import Base
from gatedwarmth.router.features import WORD
from gatedwarmth.router.probe import console

BATCH = 256
BEFORE = "the"  # a first token's state is an outlier in many models, so that no word stands first


def word_vectors(base: Base, texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Words and their unit vectors [words, hidden], float64, centred.

    The words are the tokenizer's own and those of the texts. They let a text router treat a word that no turn has shown
    it like the words that the base holds for similar. In a trial on 20,100 turns the cross-validated log loss was 0.185
    with states after 18 of 30 layers, 0.189 with input embeddings and 0.193 without vectors; in one on 21,600 turns
    0.186 after any layer that was tried from the 12th to the 24th, and 0.195 without.
    """
    own = {token[1:] for token in base.tokenizer.get_vocab() if token[:1] in ("\u0120", "\u2581")}
    shown = {word for text in texts for word in WORD.findall(text.lower())}
    words = sorted({word for word in own if word.isascii() and word.isalpha() and word.islower()} | shown)
    states = _states(base, [f"{BEFORE} {word}" for word in words])
    states -= states.mean(axis=0)
    return words, states / (np.linalg.norm(states, axis=1, keepdims=True) + 1e-6)


@torch.no_grad()
def _states(base: Base, texts: Sequence[str]) -> np.ndarray:
    """float64 [n, hidden]: at the last token, after half of the layers. Texts of one length go together, unpadded."""
    ids = base.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    layer = base.model.config.get_text_config().num_hidden_layers // 2
    found = np.empty((len(texts), base.model.config.get_text_config().hidden_size))
    for rows in track(_batches(ids), "Reading the base's words", console=console, transient=True):
        tokens = torch.tensor([ids[row] for row in rows], device=base.model.device)
        seen: Any = base.model.get_decoder()(input_ids=tokens, output_hidden_states=True, use_cache=False)
        found[rows] = seen.hidden_states[layer][:, -1].float().cpu().numpy()
    return found


def _batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Rows of equal length, at most BATCH together."""
    rows: dict[int, list[int]] = defaultdict(list)
    for row, tokens in enumerate(ids):
        rows[len(tokens)].append(row)
    return [same[start : start + BATCH] for same in rows.values() for start in range(0, len(same), BATCH)]
