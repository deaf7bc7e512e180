"""The fits of routers: scales that are put back, folds that do not leak, dense inputs beside a text."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from gatedwarmth.errors import TrainingError
from gatedwarmth.router.storage import softmax_to_last
from gatedwarmth.train.linear import (
    LENGTH,
    Labels,
    column_scale,
    fit_beside,
    fit_logistic,
    fit_sparse,
    log_loss,
    standardised,
)


def labels_of(targets: np.ndarray) -> Labels:
    return Labels(targets, np.arange(len(targets)) % 5, int(targets.max()) + 1)


def some_text(classes: int, rows: int = 120) -> tuple[csr_matrix, Labels]:
    """A telling column per class, one that all share, one of a single row, and noise."""
    rng = np.random.default_rng(0)
    targets = rng.integers(classes, size=rows)
    x = rng.random((rows, classes + 12)) * (rng.random((rows, classes + 12)) < 0.2)
    x[np.arange(rows), targets] += 1.0
    x[:, classes] = 1.0
    x[:, classes + 1] = 0.0
    x[3, classes + 1] = 1.0
    return csr_matrix(x), labels_of(targets)


def test_columns_that_tell_classes_apart_weigh_more_and_lone_ones_nothing() -> None:
    x, labels = some_text(2)
    scale = column_scale(x, labels)
    assert scale[:2].min() > 1.3 * np.median(scale[4:])
    assert scale[3] == 0.0  # one row alone
    assert scale[2] < 0.1 * scale[:2].min()  # in every row


@pytest.mark.parametrize("classes", [2, 3])
def test_a_sparse_fit_scores_raw_columns_and_holds_each_fold_out(classes: int) -> None:
    x, labels = some_text(classes)
    fit = fit_sparse(x, labels)
    assert fit.weight.shape == (x.shape[1], classes - 1)
    table = softmax_to_last(np.asarray(x @ fit.weight) + fit.bias)
    assert (table.argmax(axis=1) == labels.targets).mean() > 0.95
    # targets that no input tells: whoever saw a turn does well on it, so a leak between folds would show here
    noise = labels_of(np.random.default_rng(1).integers(classes, size=x.shape[0]))
    blind = fit_sparse(csr_matrix(np.random.default_rng(2).random((x.shape[0], 400)) < 0.1, dtype=float), noise)
    assert log_loss(softmax_to_last(blind.held_out), noise.targets) > 0.95 * np.log(classes)


@pytest.mark.parametrize("classes", [2, 3])
def test_beside_a_text_the_parts_add_up_on_raw_inputs(classes: int) -> None:
    """The formula of `Beside` gives what the fit on standardised inputs gave, and both inputs are used."""
    x, labels = some_text(classes)
    rng = np.random.default_rng(2)
    dense = 50 + 9 * np.eye(classes)[labels.targets] @ rng.normal(size=(classes, 7)) + rng.normal(size=(x.shape[0], 7))
    text = fit_sparse(x, labels)
    fit = fit_beside(text, dense, labels)
    logits = dense @ fit.weight + np.asarray(x @ text.weight) @ fit.of_text + fit.bias
    scaled, _, _ = standardised(dense)
    joint = np.hstack([scaled, text.held_out]).astype(np.float32)
    weight, bias = fit_logistic(joint, labels, fit.chosen["c"])
    given = np.hstack([scaled, np.asarray(x @ text.weight) + text.bias])
    assert np.allclose(logits, given @ weight + bias, atol=1e-3)
    assert np.abs(fit.of_text).max() > 0.01 and np.abs(weight[:7]).max() > 0.01
    assert (softmax_to_last(logits).argmax(axis=1) == labels.targets).mean() > 0.98


def test_standardised_rows_have_the_length_that_c_is_relative_to() -> None:
    x = np.random.default_rng(0).normal(3.0, 20.0, size=(400, 30))
    scaled, mean, deviation = standardised(x)
    assert np.isclose(np.sqrt((scaled**2).sum(axis=1).mean()), LENGTH, rtol=1e-3)
    assert np.allclose(scaled * deviation + mean, x)


def test_a_fold_without_a_trait_is_refused() -> None:
    with pytest.raises(TrainingError, match="2 of 3 traits"):
        fit_logistic(np.eye(4), Labels(np.array([0, 1, 0, 1]), np.arange(4), 3), 1.0)
