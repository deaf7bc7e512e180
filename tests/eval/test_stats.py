from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binomtest, sem

from gatedwarmth.eval.stats import (
    Bootstrap,
    Cells,
    binomial,
    manipulation_check,
    marginal_effects,
    paired_tests,
    recovery,
    undone,
)


def test_bootstrap_interval_is_the_normal_one_for_many_clusters() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 400)
    got = Bootstrap([str(i) for i in range(400)], 4000, 1).mean(values)
    assert got.value == pytest.approx(values.mean()) and got.n == 400
    assert got.low == pytest.approx(values.mean() - 1.96 * sem(values), abs=0.02)
    assert got.high == pytest.approx(values.mean() + 1.96 * sem(values), abs=0.02)


def test_bootstrap_draws_whole_clusters() -> None:
    """Ten copies of each value carry no more information than one."""
    values = np.random.default_rng(0).normal(size=40)
    once = Bootstrap([str(i) for i in range(40)], 2000, 3).mean(values)
    often = Bootstrap([str(i) for i in range(40) for _ in range(10)], 2000, 3).mean(np.repeat(values, 10))
    assert (often.low, often.high) == pytest.approx((once.low, once.high))


def test_pairs_cancel_what_arms_share() -> None:
    values = np.random.default_rng(0).normal(0.0, 50.0, 30)
    got = Bootstrap([str(i) for i in range(30)]).difference(values + 1.0, values)
    assert (got.value, got.low, got.high) == pytest.approx((1.0, 1.0, 1.0))


def test_recoveries_and_when_they_are_undefined() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    boot = Bootstrap([str(i) for i in range(60)])
    assert recovery(boot, base, base + 2.0, base + 1.5).value == pytest.approx(0.75)
    assert undone(boot, base, base + 2.0, base + 1.5).value == pytest.approx(0.25)
    nothing = recovery(boot, base, base + rng.normal(size=60), base)
    assert nothing.value is None and "not above 0" in nothing.note
    assert undone(boot, base, base - 2.0, base).value is None  # fewer errors: nothing there to undo


def test_manipulation_check() -> None:
    base = np.random.default_rng(0).normal(size=50)
    boot = Bootstrap([str(i) for i in range(50)])
    assert manipulation_check(boot, base + 0.1, base).passed
    failed = manipulation_check(boot, base, base)
    assert failed.passed is False and "cannot be answered" in failed.words
    assert manipulation_check(None, None, None).passed is None


@pytest.mark.parametrize(("turns", "passed"), [(1, None), (9, None), (10, True)])
def test_a_few_warm_turns_pass_no_manipulation_check(turns: int, passed: bool | None) -> None:
    base = np.zeros(turns)
    check = manipulation_check(Bootstrap([str(i) for i in range(turns)]), base + 0.1, base)
    assert check.passed is passed and check.lift is not None and check.lift.n == turns
    assert passed or f"{turns} social turns are too few" in check.words


def test_clopper_pearson() -> None:
    got = binomial(3, 40)
    assert got.low == pytest.approx(beta.ppf(0.025, 3, 38)) and got.high == pytest.approx(beta.ppf(0.975, 4, 37))
    assert binomial(0, 40).low == 0.0 and binomial(0, 0).value is None


def test_a_share_without_variation_is_not_called_certain() -> None:
    boot = Bootstrap([f"q{i // 3}" for i in range(30)])
    got = boot.share(np.zeros(30))
    assert (got.value, got.low, got.n) == (0.0, 0.0, 30) and got.high == pytest.approx(binomial(0, 10).high)
    assert boot.share(np.ones(30)).low == pytest.approx(binomial(10, 10).low)


def test_mcnemar_is_the_binomial_test_of_discordant_pairs() -> None:
    arm = np.array([True] * 9 + [False] * 11)
    reference = np.array([True] * 1 + [False] * 17 + [True] * 2)
    tests = paired_tests([(arm, reference), (arm, arm)])
    assert (tests[0].worse, tests[0].better) == (8, 2)
    assert tests[0].p == pytest.approx(binomtest(2, 10).pvalue)
    assert tests[0].q == pytest.approx(2 * tests[0].p) and tests[1].q == 1.0


def cells(questions: int) -> Cells:
    rows = [(f"q{i}", "general", c, b) for i in range(questions) for c in ("plain", "sad") for b in ("none", "wrong")]
    return Cells(*(np.array(column) for column in zip(*rows, strict=True)))


def test_marginal_effect_is_the_difference_of_shares() -> None:
    """In a balanced saturated design the model's average effect is the raw difference, in every cell too."""
    where = cells(50)
    rng = np.random.default_rng(0)
    reference = (rng.random(200) < 0.3).astype(float)
    wrong = (rng.random(200) < 0.5 + 0.2 * (where.belief == "wrong")).astype(float)
    effects = {e.where: e for e in marginal_effects("warm", wrong, reference, where)}
    assert effects["all cases"].effect.value == pytest.approx(wrong.mean() - reference.mean(), abs=1e-6)
    belief = where.belief == "wrong"
    expected = wrong[belief].mean() - reference[belief].mean()
    assert effects["belief wrong"].effect.value == pytest.approx(expected, abs=1e-6)
    low, high = effects["all cases"].effect.low, effects["all cases"].effect.high
    assert low is not None and high is not None and 0.05 < (high - low) / 2 < 0.12


def test_separation_is_said_in_words() -> None:
    where = cells(20)
    (effect,) = marginal_effects("warm", np.ones(80), np.zeros(80), where)
    assert effect.effect.value is None and "separation" in effect.words
    (effect,) = marginal_effects("warm", np.ones(80), np.ones(80), where)
    assert effect.effect.value is None and "nothing to explain" in effect.words
