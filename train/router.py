"""Train a router and say how good it is on turns that it never saw.

    python -m gatedwarmth.train.router text runs/router
    python -m gatedwarmth.train.router probe runs/probe --base HuggingFaceTB/SmolLM2-135M-Instruct
    python -m gatedwarmth.train.router text runs/router --turns my_turns.jsonl --traits humour,warmth,neutral

Weights come from the split train, where cross-validation also chooses every setting; the calibration comes from dev;
the figures come from test. A turns file has one JSON object a line: id (its number gives the split, see
gatedwarmth.data), text, label (a trait, or "social" for the first and "reasoning" for the last trait), and optionally
context, hard, mixed, pattern.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from scipy.sparse import csr_matrix

from gatedwarmth import bases
from gatedwarmth.data import Message, data_hash
from gatedwarmth.errors import RouterError, TrainingError
from gatedwarmth.hardware import faster_dtype
from gatedwarmth.router import Card, ProbeRouter, Router, TextRouter, TextSettings, TextWeights, load_router
from gatedwarmth.router.base import ReadHidden
from gatedwarmth.router.calibration import fit_calibration
from gatedwarmth.router.features import GROUPS, features, word_columns
from gatedwarmth.router.probe import console
from gatedwarmth.router.storage import DEFAULT_TRAITS, softmax_to_last
from gatedwarmth.train.held_out import HeldOut, read_held_out
from gatedwarmth.train.linear import Fit, Labels, fit_beside, fit_logistic, fit_sparse, log_loss, standardised
from gatedwarmth.train.states import kept_states
from gatedwarmth.train.turns import LabelledTurns, check_turns, read_turns
from gatedwarmth.train.words import word_vectors

Named = str | Path | bases.Base | None
KINDS = ("text", "probe")
LAYER_C = 1.0
LAYERS_KEPT, LAYERS_APART = 4, 3  # neighbouring layers say nearly the same
RECIPE = 14  # part of the settings' hash: raise it when the training changes


@dataclass(frozen=True)
class RouterReport:
    """What `train_router` did. metrics: held-out figures, see `gatedwarmth.router.calibration.metrics`."""

    folder: Path
    kind: str
    skipped: bool
    metrics: dict[str, Any]
    training: dict[str, Any]

    def lines(self) -> list[str]:
        """For a reader, one fact a line."""
        m = self.metrics
        split = self.training["evaluated_on"]
        lines = [
            f"{self.kind} router in {self.folder}"
            + (" (already there: same data and settings)" if self.skipped else "")
        ]
        lines.append(
            f"{split}: balanced accuracy {m['balanced_accuracy']:.3f}, Brier {m['brier']:.3f}, ECE {m['ece']:.3f}, "
            f"{m['turns']} turns"
        )
        if "hard_balanced_accuracy" in m:
            lines.append(f"hard part: balanced accuracy {m['hard_balanced_accuracy']:.3f}, {m['hard_turns']} turns")
        lines += [_away(name, rates) for name, rates in m["elsewhere"].items()]
        return [*lines, m["leak"]["line"]]


def _away(name: str, rates: dict[str, Any]) -> str:
    said = []
    if rates["reasoning"]:
        said.append(f"{rates['leak_rate']:.0%} of {rates['reasoning']} reasoning turns leak")
    if rates["social"]:
        said.append(f"{rates['shut_rate']:.0%} of {rates['social']} social turns find warmth shut")
    return f"{name}: {', '.join(said)}"


def train_router(
    kind: str = "text",
    out: str | Path = "runs/router",
    base: Named = None,
    turns: str | Path | None = None,
    traits: Sequence[str] = DEFAULT_TRAITS,
    seed: int = 0,
) -> RouterReport:
    """Train a router and write its folder, whole or not at all.

    A finished folder of the same data and settings is kept. The states that a probe reads are kept beside `out` until
    it is done, so that a killed run goes on from there.

    Parameters
    ----------
    kind: "text" or "probe". out: the router's folder. base: name, folder or loaded base. A probe reads its states, the
        default base's when None. A text router takes word vectors from it, in training alone, or does without.
    turns: a JSON-lines file or folder; the packaged turns when None. traits: classes in the order of the router's
        columns. seed: of a probe's network, and kept with the router; a text router's fit is deterministic.

    Raises
    ------
    TrainingError: an unknown kind, or too few turns of a trait. DataError: a broken turns file.
    """
    if kind not in KINDS:
        raise TrainingError(f"unknown router kind {kind!r}; the kinds are {', '.join(KINDS)}")
    data = read_turns(turns, tuple(traits))
    check_turns(data, traits)
    held = read_held_out(turns, tuple(traits))
    training = _training(kind, base, data, held, seed)
    kept = _finished(Path(out), training)
    if kept is not None:
        return RouterReport(Path(out), kind, True, kept.metrics, kept.training)
    card = Card(tuple(traits), data_hash(data.turns), {}, training)
    states = states_beside(Path(out))
    router, read = _text(data, card, base) if kind == "text" else _probe(data, held, card, base, states)
    card = dataclasses.replace(router.card, metrics=held.metrics(router.probabilities(held.conversations, read)))
    router.card = card
    router.save(out)
    shutil.rmtree(states, ignore_errors=True)
    return RouterReport(Path(out), kind, False, card.metrics, card.training)


# --- text


def _text(data: LabelledTurns, card: Card, base: Named) -> tuple[TextRouter, None]:
    train, dev = data.part("train"), data.part("dev")
    labels = Labels(train.targets, train.folds, len(card.traits))
    text = fit_sparse(text_matrix(train.conversations, TextSettings()), labels)
    weights, bias, chosen = TextWeights(text.weight, TextSettings()), text.bias, text.chosen
    if base:
        weights, bias, chosen = _with_vectors(text, train, labels, _loaded(base))
    scale, shift = fit_calibration(weights.logits(dev.conversations) + bias, dev.targets)
    return TextRouter(_scaled(weights, scale), (bias * scale + shift).astype(np.float32), _chosen(card, chosen)), None


def _scaled(weights: TextWeights, scale: float) -> TextWeights:
    return TextWeights((weights.weight * scale).astype(np.float32), weights.settings)


def _with_vectors(
    text: Fit, train: LabelledTurns, labels: Labels, base: bases.Base
) -> tuple[TextWeights, np.ndarray, dict[str, float]]:
    """The n-grams and, beside them, the mean word vectors of the content words.

    A linear function of a mean word vector is a number per word, so that no vector has to be kept.
    """
    settings = TextSettings(vectors=True)
    words, vectors = word_vectors(base, [turn.text for turn in train.turns])
    columns = word_columns(words, settings.word_bits)
    x = text_matrix(train.conversations, settings)
    groups = range(len(GROUPS))
    means = np.hstack([x[:, settings.first_word(group) + columns] @ vectors for group in groups])
    fit = fit_beside(text, means, labels)
    whole = np.zeros((settings.columns, labels.classes - 1))
    whole[: settings.first_word()] = text.weight @ fit.of_text
    for group, weight in zip(groups, np.split(fit.weight, len(GROUPS)), strict=True):
        np.add.at(whole, settings.first_word(group) + columns, vectors @ weight)
    return TextWeights(whole, settings), fit.bias, fit.chosen


def text_matrix(conversations: Sequence[Sequence[Message]], settings: TextSettings) -> csr_matrix:
    """float64 [n, columns]."""
    rows = [features(messages, settings) for messages in conversations]
    starts = np.cumsum([0] + [len(columns) for columns, _ in rows])
    columns = np.concatenate([columns for columns, _ in rows])
    values = np.concatenate([values for _, values in rows]).astype(np.float64)
    matrix = csr_matrix((values, columns, starts), shape=(len(rows), settings.columns))
    matrix.sum_duplicates()
    return matrix


# --- probe


def states_beside(out: Path) -> Path:
    return out.with_name(f".{out.name}.states")


def _probe(data: LabelledTurns, held: HeldOut, card: Card, base: Named, folder: Path) -> tuple[ProbeRouter, ReadHidden]:
    import torch

    from gatedwarmth.train.network import fit_network

    loaded = _loaded(base or bases.DEFAULT)
    train, dev = data.part("train"), data.part("dev")
    conversations = [train.conversations, dev.conversations, held.conversations]
    every = kept_states(loaded, [messages for part in conversations for messages in part], folder)
    of_train, of_dev, of_held = np.split(every, np.cumsum([len(part) for part in conversations])[:-1])
    labels = Labels(train.targets, train.folds, len(card.traits))
    text = fit_sparse(text_matrix(train.conversations, TextSettings()), labels)
    weights = TextWeights(text.weight.astype(np.float32), TextSettings())
    layers = best_layers(of_train, labels)
    # in training the text's logits come from models that did not see the turn's fold, as in `fit_beside`
    of_text = text.held_out - text.bias
    network = fit_network(np.hstack([_of_layers(of_train, layers), of_text]), labels, card.training["seed"])
    logits = network(np.hstack([_of_layers(of_dev, layers), weights.logits(dev.conversations)]))
    network = network.calibrated(*fit_calibration(logits, dev.targets))
    router = ProbeRouter(network, layers, loaded.name, _chosen(card, {"layers": list(layers)}), weights)
    return router, lambda wanted: torch.from_numpy(of_held[:, [layer - 1 for layer in wanted]])


def best_layers(states: np.ndarray, labels: Labels) -> tuple[int, ...]:
    """Layers, from 1, that do best alone and are not neighbours. states: [n, layers, 2, hidden]."""
    steps = track(range(1, states.shape[1] + 1), "Trying layers", console=console, transient=True)
    tried = {layer: _alone(states, layer, labels) for layer in steps}
    return spread(sorted(tried, key=lambda layer: tried[layer]))


def spread(ranked: Sequence[int]) -> tuple[int, ...]:
    """The first LAYERS_KEPT of `ranked` that are LAYERS_APART or more from each other, ascending.

    >>> spread([17, 18, 20, 16, 13])
    (13, 17, 20)
    """
    kept: list[int] = []
    for layer in ranked:
        if len(kept) < LAYERS_KEPT and all(abs(layer - other) >= LAYERS_APART for other in kept):
            kept.append(layer)
    return tuple(sorted(kept))


def _alone(states: np.ndarray, layer: int, labels: Labels) -> float:
    """Log loss of one layer on a fifth of the turns that its fit does not see: enough to rank layers."""
    inside = labels.folds != labels.folds.max()
    x = standardised(_of_layers(states, (layer,)))[0]
    weight, bias = fit_logistic(x[inside], labels[inside], LAYER_C)
    return log_loss(softmax_to_last(x[~inside] @ weight + bias), labels.targets[~inside])


def _of_layers(states: np.ndarray, layers: Sequence[int]) -> np.ndarray:
    """float64 [n, layers · 2 · hidden]."""
    return states[:, [layer - 1 for layer in layers]].reshape(len(states), -1).astype(np.float64)


def _chosen(card: Card, chosen: dict[str, Any]) -> Card:
    return dataclasses.replace(card, training={**card.training, **chosen})


def _training(kind: str, base: Named, data: LabelledTurns, held: HeldOut, seed: int) -> dict[str, Any]:
    """What a finished folder must agree with to be kept."""
    name = base.name if isinstance(base, bases.Base) else str(base or (bases.DEFAULT if kind == "probe" else ""))
    settings = dataclasses.asdict(TextSettings())
    asked = {
        "kind": kind,
        "base": name,
        "dtype": _dtype(base) if name else "",
        "seed": seed,
        "recipe": RECIPE,
        "settings": settings,
        "targets": data.targets.tolist(),
        "turns": data_hash(data.turns),
        "held_out": held.conversations,
    }
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return {
        "settings_hash": digest, "turns": len(data.part("train").turns), "calibrated_on": "dev",
        "evaluated_on": "test", "seed": seed, "base": name, "dtype": asked["dtype"],
    }  # fmt: skip


def _dtype(base: Named) -> str:
    """In which the base is read: states in bfloat16 are not those in float32."""
    return str(base.model.dtype if isinstance(base, bases.Base) else faster_dtype()).removeprefix("torch.")


def _loaded(base: str | Path | bases.Base) -> bases.Base:
    return base if isinstance(base, bases.Base) else bases.load(base, faster_dtype())


def _finished(out: Path, training: dict[str, Any]) -> Card | None:
    """The card of a folder that holds the router asked for."""
    try:
        router: Router = load_router(out)
    except RouterError:
        return None
    card: Card = router.card  # type: ignore[attr-defined]
    return card if card.training.get("settings_hash") == training["settings_hash"] and card.metrics else None


def main() -> None:
    import typer

    def command(
        kind: str = typer.Argument("text", help="text or probe"),
        out: Path = typer.Argument(Path("runs/router"), help="folder to write"),
        base: str = typer.Option("", help="base of a probe, or of a text router's word vectors"),
        turns: str = typer.Option("", help="turns of your own, JSON lines"),
        traits: str = typer.Option(",".join(DEFAULT_TRAITS), help="classes, separated by commas, neutral last"),
        seed: int = typer.Option(0),
    ) -> None:
        report = train_router(kind, out, base or None, turns or None, traits.split(","), seed)
        print("\n".join(report.lines()))

    typer.run(command)


if __name__ == "__main__":
    main()
