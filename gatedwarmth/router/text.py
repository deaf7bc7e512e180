"""A router that reads text alone: hashed n-grams and logistic regression, for any base and for serving engines.

There is no vocabulary: a feature's column is a hash, the same in every process and on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gatedwarmth.data import Message
from gatedwarmth.router.base import ReadHidden
from gatedwarmth.router.features import TextSettings, features
from gatedwarmth.router.storage import Card, check_array, softmax_to_last, write_router


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
