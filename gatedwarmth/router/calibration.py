"""How good a router's probabilities are, and a gate threshold with a guarantee against leaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import beta, rankdata

from gatedwarmth.router.storage import softmax_to_last


@dataclass(frozen=True)
class LeakBound:
    """A threshold and what it promises: an open gate is one with probability ≥ threshold.

    threshold: None when no threshold could be certified. leaks: held-out reasoning turns with an open gate at the
    threshold. turns: held-out reasoning turns. bound: upper bound on the leak rate at confidence 1 - delta.
    needed: reasoning turns that a bound of alpha takes when none of them leaks.
    """

    threshold: float | None
    alpha: float
    delta: float
    leaks: int
    turns: int
    bound: float
    needed: int

    @property
    def certified(self) -> bool:
        return self.threshold is not None

    def line(self) -> str:
        """One line for a reader."""
        if self.threshold is not None:
            return (
                f"at threshold {self.threshold:.3f}, {self.leaks} of {self.turns} held-out reasoning turns leak; "
                f"on turns like these the rate is at most {self.bound:.1%} with confidence {1 - self.delta:.0%}"
            )
        if self.turns < self.needed:
            return (
                f"{self.turns} held-out reasoning turns are too few: {self.needed} without a leak are needed for a "
                f"leak rate of at most {self.alpha:.1%} with confidence {1 - self.delta:.0%}"
            )
        return (
            f"no threshold keeps the leak rate at or under {self.alpha:.1%} with confidence {1 - self.delta:.0%} on "
            f"{self.turns} held-out reasoning turns; at the strictest {self.leaks} leak"
        )


def binomial_upper(leaks: int, turns: int, delta: float) -> float:
    """Exact one-sided upper bound of a binomial rate at confidence 1 - delta (Clopper and Pearson 1934).

    >>> round(binomial_upper(0, 59, 0.05), 4)  # the rule of three: 1 - 0.05 ** (1 / 59)
    0.0495
    """
    return 1.0 if leaks >= turns else float(beta.ppf(1.0 - delta, leaks + 1, turns - leaks))


def threshold_for_leak(
    probabilities: np.ndarray, social: np.ndarray, alpha: float = 0.05, delta: float = 0.05, steps: int = 1000
) -> LeakBound:
    """The smallest threshold whose rate of leaks is certified to be at most `alpha` with confidence 1 - `delta`.

    Parameters
    ----------
    probabilities: float [n], of the gated trait, on turns that neither training nor calibration saw.
    social: bool [n]; the others are the reasoning turns, on which an open gate is a leak.
    steps: candidates are the `steps` + 1 thresholds 0, 1/steps, …, 1. They are fixed before the data is looked at and
        tested from the strictest to the loosest until one fails (fixed-sequence testing: Maurer, Hothorn and
        Lehmacher 1995; Angelopoulos et al., "Learn then Test", arXiv:2110.01052), so that all of them together are
        wrong with probability at most delta.

    Raises
    ------
    ValueError: alpha or delta outside (0, 1), or a probability that is not in [0, 1].
    """
    if not (0.0 < alpha < 1.0 and 0.0 < delta < 1.0):
        raise ValueError(f"alpha and delta must lie in (0, 1), found {alpha} and {delta}")
    values = np.asarray(probabilities, dtype=np.float64)
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError("probabilities must lie in [0, 1]")
    reasoning = np.sort(values[~np.asarray(social, dtype=bool)])
    turns = len(reasoning)
    needed = int(np.ceil(np.log(delta) / np.log1p(-alpha)))
    best: float | None = None
    leaks, bound = leaks_at(reasoning, 1.0), 1.0
    for step in range(steps, -1, -1):
        open_ = leaks_at(reasoning, step / steps)
        upper = bound if best is not None and open_ == leaks else binomial_upper(open_, turns, delta)
        if upper > alpha:
            bound = upper if best is None else bound
            break
        best, leaks, bound = step / steps, open_, upper
    return LeakBound(best, alpha, delta, leaks, turns, bound, needed)


def leaks_at(ascending: np.ndarray, threshold: float) -> int:
    """How many sorted probabilities open the gate."""
    return int(len(ascending) - np.searchsorted(ascending, threshold, side="left"))


def fit_calibration(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """(scale, shift [traits - 1]) such that softmax of scale · logits + shift is calibrated.

    The last trait's logit is 0 throughout. logits: [n, traits - 1]; targets: int [n]. Platt's scaling (1999) with his
    softened targets, for several classes temperature and bias (Guo et al., arXiv:1706.04599). Softened targets keep
    separable data from infinite scales.
    """
    count, others = logits.shape
    soft = np.zeros((count, others + 1))
    for k in range(others + 1):
        mine = targets == k
        soft[mine] = 1.0 / (mine.sum() + others + 1.0)
        soft[mine, k] = (mine.sum() + 1.0) / (mine.sum() + others + 1.0)

    def loss(parameters: np.ndarray) -> float:
        table = softmax_to_last(np.exp(parameters[0]) * logits + parameters[1:])
        return float(-(soft * np.log(np.clip(table, 1e-12, 1.0))).sum(axis=1).mean())

    found = minimize(loss, np.zeros(others + 1), method="L-BFGS-B", bounds=[(-6.0, 6.0)] + [(-20.0, 20.0)] * others)
    return float(np.exp(found.x[0])), found.x[1:]


def metrics(
    table: np.ndarray, targets: np.ndarray, hard: Sequence[bool] = (), patterns: Sequence[str] = ()
) -> dict[str, Any]:
    """Figures of probabilities [n, traits] against int targets [n]; hard and patterns describe the same turns."""
    guesses = table.argmax(axis=1)
    right = guesses == targets
    found: dict[str, Any] = {
        "turns": len(targets),
        "accuracy": float(right.mean()),
        "balanced_accuracy": balanced_accuracy(guesses, targets),
        "brier": float(((table - np.eye(table.shape[1])[targets]) ** 2).sum(axis=1).mean() / 2),
        "ece": expected_calibration_error(table.max(axis=1), right),
        "auroc": auroc(table[:, 0], targets == 0),
    }
    difficult = np.asarray(hard, dtype=bool)
    if difficult.any():
        found["hard_turns"] = int(difficult.sum())
        found["hard_accuracy"] = float(right[difficult].mean())
        found["hard_balanced_accuracy"] = balanced_accuracy(guesses[difficult], targets[difficult])
    found["patterns"] = {name: _share(right, patterns, name) for name in sorted(set(patterns))}
    return found


def _share(right: np.ndarray, patterns: Sequence[str], name: str) -> dict[str, Any]:
    mine = np.array([pattern == name for pattern in patterns])
    return {"turns": int(mine.sum()), "accuracy": float(right[mine].mean())}


def balanced_accuracy(guesses: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their turns that are guessed right."""
    return float(np.mean([(guesses[targets == k] == k).mean() for k in np.unique(targets)]))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None when one class is missing."""
    positive = np.asarray(positive, dtype=bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if not n or not m:
        return None
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """Mean gap of confidence and accuracy over `bins` equal bins of [0, 1], weighted by their turns (Guo et al.)."""
    index = np.minimum((np.asarray(confidence) * bins).astype(int), bins - 1)
    gaps = [
        (index == k).mean() * abs(confidence[index == k].mean() - right[index == k].mean()) for k in np.unique(index)
    ]
    return float(sum(gaps))
