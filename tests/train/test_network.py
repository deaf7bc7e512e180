"""The probe's network: what a linear fit cannot learn, inputs of any scale, and the same again from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gatedwarmth.errors import RouterError
from gatedwarmth.router import Network
from gatedwarmth.router.storage import softmax_to_last
from gatedwarmth.train import network
from gatedwarmth.train.linear import Labels
from gatedwarmth.train.network import fit_network


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "STEPS", 100)


def quarters(classes: int, rows: int = 400) -> tuple[np.ndarray, Labels]:
    """Points of a plane and two more inputs; the class depends on the product of two signs, and on a third."""
    x = np.random.default_rng(0).normal(size=(rows, 4))
    targets = np.where(x[:, 0] * x[:, 1] > 0, 0, classes - 1)
    if classes == 3:
        targets = np.where(x[:, 2] > 0.5, 1, targets)
    return x, Labels(targets, np.arange(rows) % 5, classes)


def right(found: Network, x: np.ndarray, labels: Labels) -> float:
    return float((softmax_to_last(found(x)).argmax(axis=1) == labels.targets).mean())


@pytest.mark.parametrize("classes", [2, 3])
def test_it_learns_what_a_line_cannot_part(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "STEPS", 800)
    x, labels = quarters(classes)
    found = fit_network(x, labels)
    assert found(x).shape == (400, classes - 1)
    assert right(found, x, labels) > 0.8  # a line has a half right


def test_the_scale_of_an_input_does_not_matter() -> None:
    x, labels = quarters(2)
    scale, shift = 10.0 ** np.array([-4, -1, 2, 5]), np.arange(4.0) - 2
    plain, moved = fit_network(x, labels), fit_network(x * scale + shift, labels)
    assert np.allclose(moved(x * scale + shift), plain(x), atol=2e-2)


def test_a_seed_decides_and_the_global_generator_is_left_alone() -> None:
    x, labels = quarters(2)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = fit_network(x, labels, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert np.allclose(fit_network(x, labels, seed=0)(x), first(x), atol=1e-3)
    assert not np.allclose(fit_network(x, labels, seed=1)(x), first(x), atol=1e-2)


def test_side_by_side_they_are_one_network() -> None:
    several = network._SideBySide(inputs=7, outputs=2).eval()
    torch.nn.init.normal_(several.bias)
    x = torch.randn(5, 7)
    expected = several(x).mean(dim=1).detach().numpy()
    assert np.allclose(Network(**several.arrays())(x.numpy()), expected, atol=1e-5)


def test_arrays_that_do_not_fit_are_refused() -> None:
    good = {"in_weight": np.ones((4, 3)), "in_bias": np.ones(3), "out_weight": np.ones((3, 1)), "out_bias": np.ones(1)}
    assert Network.of(good, 4, 1)(np.ones((1, 4))) == pytest.approx(3 * 5 + 1)
    with pytest.raises(RouterError, match=r"in_weight has shape \[4, 3\], expected \[5, 3\]"):
        Network.of(good, 5, 1)
    with pytest.raises(RouterError, match="out_bias holds NaN"):
        Network.of({**good, "out_bias": np.array([np.nan])}, 4, 1)
