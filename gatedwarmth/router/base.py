"""What every router offers, and what it decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from gatedwarmth.data import Message

# Hands a router the base's hidden states after some layers (counted from 1), [n, layers, 2, hidden]: at the last token
# of each conversation's prompt, and their mean over the last user turn.
ReadHidden = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True)
class Decision:
    """What a router decided for one turn.

    p_social: calibrated probability of the first trait, which for the default traits is that the turn is social.
    gates: trait → gate in [0, 1], after the policy. why: one line for a reader.
    probabilities: trait → probability, before the policy.
    """

    p_social: float
    gates: dict[str, float]
    why: str
    probabilities: dict[str, float] = field(default_factory=dict)


class Router(Protocol):
    """From conversations to a probability per trait."""

    @property
    def traits(self) -> tuple[str, ...]: ...

    def probabilities(self, conversations: Sequence[Sequence[Message]], read_hidden: ReadHidden | None) -> np.ndarray:
        """[n, traits], rows sum to 1, columns in the order of `traits`.

        read_hidden: the base's hidden states for these conversations; None where no base is at hand, which routers
        that read text do not mind.
        """
        ...

    def save(self, folder: str | Path) -> None: ...

    def describe(self) -> str:
        """One line: kind, training data, held-out metrics."""
        ...
