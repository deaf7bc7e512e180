"""Settings of a run, and what of them a resumed run must share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.arms import ARMS
from gatedwarmth.eval.contexts import BELIEFS, CONTEXTS

# Arms have files of their own, and draws touch the analysis alone: both may change between runs into one
# folder.
FREE = ("arms", "draws")


@dataclass(frozen=True)
class EvalSettings:
    """What to run.

    Parameters
    ----------
    limit: questions at most, None for all. limit_turns: social turns at most, None for the same as `limit`.
    batch_size: cases a batch. Part of the result: a row's last bits may depend on its batch.
    temperature: 0 is greedy; arXiv:2507.21919 samples at 0.8.
    repetition_penalty: as transformers' generate; 1 for none. Small models loop without one under greedy decoding.
    threshold: p_social from which `gated_hard` opens warmth, None for the model's own.
    scorer: "base", or the name or folder of a causal LM for SocioT Warmth.
    draws: bootstrap draws.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    tasks: tuple[str, ...] = ("questions", "warmth")
    contexts: tuple[str, ...] = CONTEXTS
    beliefs: tuple[str, ...] = BELIEFS
    split: str = "test"
    limit: int | None = None
    limit_turns: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 48
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    threshold: float | None = None
    scorer: str = "base"
    draws: int = 2000

    def __post_init__(self) -> None:
        for name in ("limit", "limit_turns", "batch_size", "max_new_tokens", "draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvaluationError(f"{name} is {value}; it must be 1 or more")
        if self.temperature < 0:
            raise EvaluationError(f"temperature is {self.temperature}; use 0 for greedy, or a value above 0")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise EvaluationError(f"threshold is {self.threshold}; it is a probability, from 0 to 1")

    def binding(self) -> dict[str, Any]:
        """The settings that samples depend on, JSON-ready."""
        return {k: v for k, v in self.to_dict().items() if k not in FREE}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvalSettings:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)
