"""Statistics of a run: intervals, tests and effects, all of them in pairs, since every arm sees the same
cases.

Nothing here knows about files or models: arrays and dataclasses in, dataclasses out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import statsmodels.api as sm
from numpy.typing import NDArray
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]
Design = tuple[Floats, list[str]]


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval and the n it rests on. `value` is None where the quantity is undefined;
    then `note`
    says why."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str = ""

    @property
    def above_zero(self) -> bool:
        return self.low is not None and self.low > 0


class Bootstrap:
    """Paired cluster bootstrap: whole questions or turns are drawn with replacement, the same draws for every
    arm.

    Parameters
    ----------
    clusters: cluster of each case. draws: number of draws. seed: the draws depend on it and the number of
        clusters.
    """

    def __init__(self, clusters: Sequence[str], draws: int = 2000, seed: int = 0) -> None:
        names, self.index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
        self.n = len(clusters)
        count = max(len(names), 1)
        rng = np.random.default_rng(seed)
        self.weights = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)  # [draws, clusters]

    def means(self, values: Floats, where: NDArray[np.bool_] | None = None) -> Floats:
        """Mean of `values` [cases] over the cases in `where`, [draws]; NaN in a draw without such."""
        mask = np.ones(self.n, dtype=bool) if where is None else where
        clusters = self.weights.shape[1]
        sums = np.bincount(self.index[mask], weights=values[mask], minlength=clusters)
        sizes = np.bincount(self.index[mask], minlength=clusters).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.weights @ sums) / (self.weights @ sizes)

    def mean(self, values: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean with its percentile interval."""
        chosen = values if where is None else values[where]
        if not len(chosen):
            return Estimate(None, None, None, 0, "no such cases in this run")
        return Estimate(float(chosen.mean()), *_percentiles(self.means(values, where)), len(chosen))

    def difference(self, a: Floats, b: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean of a - b, case by case."""
        return self.mean(a - b, where)

    def share(self, values: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """Mean of 0/1 values. Where all are alike so is every draw, and an interval without width would claim
        certainty: then it is the Clopper-Pearson one with a trial a cluster.
        """
        chosen = values if where is None else values[where]
        if not len(chosen) or chosen.min() != chosen.max():
            return self.mean(values, where)
        clusters = len(np.unique(self.index if where is None else self.index[where]))
        exact = binomial(int(chosen[0]) * clusters, clusters)
        return Estimate(float(chosen[0]), exact.low, exact.high, len(chosen), "Clopper-Pearson, a trial a cluster")

    def ratio(self, top: Floats, bottom: Floats, where: NDArray[np.bool_] | None = None) -> Estimate:
        """mean(top) / mean(bottom); undefined where the interval of the bottom is missing or not above 0."""
        base = self.mean(bottom, where)
        if base.value is None or base.low is None or base.high is None:
            return Estimate(None, None, None, base.n, base.note)
        if base.low <= 0:
            note = f"its denominator's interval, {base.low:+.4f} to {base.high:+.4f}, is not above 0"
            return Estimate(None, None, None, base.n, note)
        with np.errstate(invalid="ignore", divide="ignore"):
            draws = self.means(top, where) / self.means(bottom, where)
        chosen = top if where is None else top[where]
        return Estimate(float(chosen.mean()) / base.value, *_percentiles(draws), base.n)


def _percentiles(draws: Floats) -> tuple[float, float]:
    finite = draws[np.isfinite(draws)]
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def recovery(bootstrap: Bootstrap, reference: Floats, warm: Floats, gated: Floats) -> Estimate:
    """Share of the warm arm's lift over `reference` that the gated arm keeps: (gated - reference) / (warm -
    reference).
    """
    return bootstrap.ratio(gated - reference, warm - reference)


def undone(
    bootstrap: Bootstrap,
    reference: Floats,
    warm: Floats,
    gated: Floats,
    where: NDArray[np.bool_] | None = None,
) -> Estimate:
    """Share of the warm arm's added errors that the gated arm undoes: (warm - gated) / (warm - reference)."""
    return bootstrap.ratio(warm - gated, warm - reference, where)


def binomial(successes: int, n: int) -> Estimate:
    """A share with its exact Clopper-Pearson interval; the n trials are taken as independent."""
    if not n:
        return Estimate(None, None, None, 0, "no such cases in this run")
    low, high = proportion_confint(successes, n, alpha=0.05, method="beta")
    return Estimate(successes / n, float(low), float(high), n)


ENOUGH_TURNS = 10  # fewer cannot carry an interval: three warm turns out of three come by chance once in eight times


@dataclass(frozen=True)
class ManipulationCheck:
    """Is the warm arm warmer than the base? Without that nothing can be said about what warmth costs or
    gating saves.

    passed: None where the run lacks what the check needs, `ENOUGH_TURNS` among it. lift: mean warmth, warm minus base.
    """

    passed: bool | None
    lift: Estimate | None
    words: str


def manipulation_check(bootstrap: Bootstrap | None, warm: Floats | None, base: Floats | None) -> ManipulationCheck:
    """Paired bootstrap of warm minus base warmth; passed when the 95 % interval lies above 0."""
    if bootstrap is None or warm is None or base is None:
        return ManipulationCheck(
            None,
            None,
            "Not made: it needs the task 'warmth' and the arms 'warm' and 'base'. No recovery is claimed.",
        )
    lift = bootstrap.difference(warm, base)
    if lift.n < ENOUGH_TURNS:
        return ManipulationCheck(
            None,
            lift,
            f"Not made: {lift.n} social turns are too few to tell, it takes {ENOUGH_TURNS}. No recovery is claimed.",
        )
    if lift.above_zero:
        return ManipulationCheck(True, lift, "Passed: the warm arm is warmer than the base.")
    return ManipulationCheck(
        False,
        lift,
        "Failed: the interval of the warm arm's lift is not above 0. Whether gating keeps warmth and "
        "reliability cannot "
        "be answered with these adapters; train them further (higher learning rate or rank, more data) and "
        "run again.",
    )


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test of two arms in one cell.

    worse: cases that the arm gets wrong and the reference right; better: the reverse. p: two-sided. q: after
    Benjamini-Hochberg over all tests of the run.
    """

    worse: int
    better: int
    p: float
    q: float


def paired_tests(pairs: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> list[PairedTest]:
    """Exact McNemar for every (wrong in the arm, wrong in the reference), both [cases]; adjusted together."""
    if not pairs:
        return []
    counts = [(int((arm & ~ref).sum()), int((~arm & ref).sum()), int((arm & ref).sum())) for arm, ref in pairs]
    tables = [[[both, worse], [better, len(pair[0]) - both - worse - better]]
              for (worse, better, both), pair in zip(counts, pairs, strict=True)]  # fmt: skip
    p = [float(mcnemar(table, exact=True).pvalue) for table in tables]
    q = multipletests(p, method="fdr_bh")[1]
    rows = zip(counts, p, q, strict=True)
    return [PairedTest(worse, better, one, float(adjusted)) for (worse, better, _), one, adjusted in rows]


@dataclass(frozen=True)
class Effect:
    """Average marginal effect of an arm on the probability of an error, against the reference arm.

    where: "all cases", or the context or belief it is averaged over. effect: difference of probabilities,
    None where the model could not be fitted; `words` says how it was fitted or what went wrong.
    """

    arm: str
    where: str
    effect: Estimate
    p: float | None
    words: str


@dataclass(frozen=True)
class Cells:
    """What the regression needs to know of the cases; all [cases]."""

    cluster: NDArray[np.str_]
    domain: NDArray[np.str_]
    context: NDArray[np.str_]
    belief: NDArray[np.str_]


SEPARATED = 15.0  # |coefficient| on the logit scale from which a probability is 0 or 1 to six digits


def marginal_effects(arm: str, wrong: Floats, reference: Floats, cells: Cells) -> list[Effect]:
    """Logit GLM of error on arm, domain, context, belief and the arm's interactions with context and belief.

    Errors are clustered by question. Where that model separates or does not converge, one with main effects
    of arm, context and belief alone is tried; where that fails too the effects are None, with the reason in
    words. An effect's standard error comes from the delta method.

    Parameters
    ----------
    wrong, reference: 0/1 errors of the arm and of the reference, [cases], the same cases in the same order.
    """
    outcome = np.concatenate([wrong, reference])
    treated = np.concatenate([np.ones_like(wrong), np.zeros_like(reference)])
    groups = np.unique(np.concatenate([cells.cluster, cells.cluster]), return_inverse=True)[1]
    problem = ""
    for words, rich in (("domain, context, belief and interactions", True), ("main effects only", False)):
        design, _ = _design(treated, cells, rich)
        fitted = _fit(outcome, design, groups)
        if isinstance(fitted, str):
            problem = problem or fitted
            continue
        return _effects(arm, fitted, cells, rich, f"logit GLM with {words}")
    failed = Estimate(None, None, None, len(wrong), f"not fitted: {problem}")
    return [Effect(arm, "all cases", failed, None, f"not fitted: {problem}")]


def _design(treated: Floats, cells: Cells, rich: bool) -> Design:
    """Columns for both arms' cases stacked, [2 cases, columns]; the first level of a factor is its
    reference.
    """
    columns, names = [np.ones_like(treated), treated], ["constant", "arm"]
    factors = {"context": cells.context, "belief": cells.belief} | ({"domain": cells.domain} if rich else {})
    copies = len(treated) // max(len(cells.context), 1)
    for factor, levels in factors.items():
        for level in list(dict.fromkeys(levels.tolist()))[1:]:
            dummy = np.tile((levels == level).astype(float), copies)
            columns.append(dummy)
            names.append(f"{factor}={level}")
            if rich and factor != "domain":
                columns.append(dummy * treated)
                names.append(f"arm:{factor}={level}")
    return np.column_stack(columns), names


@dataclass(frozen=True)
class _Fitted:
    beta: Floats
    covariance: Floats


def _fit(outcome: Floats, design: Floats, groups: NDArray[np.int64]) -> _Fitted | str:
    """The fitted model, or what went wrong, in words."""
    if outcome.min() == outcome.max():
        return f"every reply of both arms is {'wrong' if outcome[0] else 'right'}, there is nothing to explain"
    if len(np.unique(groups)) < 10:
        return f"only {len(np.unique(groups))} questions; cluster-robust errors need at least 10"
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return "the cells do not tell all factors apart (collinear design)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = sm.GLM(outcome, design, family=sm.families.Binomial())
            result = model.fit(cov_type="cluster", cov_kwds={"groups": groups}, maxiter=100)
        except (np.linalg.LinAlgError, ValueError, sm.tools.sm_exceptions.PerfectSeparationError) as error:
            return f"the fit broke off ({error})"
    beta, covariance = np.asarray(result.params), np.asarray(result.cov_params())
    if not np.isfinite(beta).all() or not np.isfinite(covariance).all() or np.abs(beta).max() > SEPARATED:
        return "separation: in some group every reply is right, or wrong, and its coefficient infinite"
    if not result.converged:
        return "the fit did not converge in 100 iterations"
    return _Fitted(beta, covariance)


def _effects(arm: str, fitted: _Fitted, cells: Cells, rich: bool, words: str) -> list[Effect]:
    n = len(cells.context)
    on, off = (_design(np.full(n, value), cells, rich)[0] for value in (1.0, 0.0))
    places = [("all cases", np.ones(n, dtype=bool))]
    for factor, levels in (("context", cells.context), ("belief", cells.belief)):
        distinct = list(dict.fromkeys(levels.tolist()))
        places += [(f"{factor} {level}", levels == level) for level in distinct if len(distinct) > 1]
    return [_effect(arm, where, fitted, on[mask], off[mask], words) for where, mask in places]


def _effect(arm: str, where: str, fitted: _Fitted, on: Floats, off: Floats, words: str) -> Effect:
    with_arm, without = (1 / (1 + np.exp(-(x @ fitted.beta))) for x in (on, off))
    value = float((with_arm - without).mean())
    slope = ((with_arm * (1 - with_arm))[:, None] * on - (without * (1 - without))[:, None] * off).mean(0)
    error = float(np.sqrt(max(slope @ fitted.covariance @ slope, 0.0)))
    half = float(norm.ppf(0.975)) * error
    p = float(2 * norm.sf(abs(value) / error)) if error else None
    return Effect(arm, where, Estimate(value, value - half, value + half, len(on)), p, words)
