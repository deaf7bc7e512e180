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
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from gatedwarmth import bases
from gatedwarmth.data import Message, Turn, data_hash, load_turns
from gatedwarmth.errors import DataError, RouterError, TrainingError
from gatedwarmth.files import read_jsonl
from gatedwarmth.router import Card, ProbeRouter, Router, TextRouter, TextSettings, load_router
from gatedwarmth.router.calibration import fit_calibration, metrics, threshold_for_leak
from gatedwarmth.router.probe import hidden_states
from gatedwarmth.router.storage import DEFAULT_TRAITS, softmax_to_last
from gatedwarmth.router.text import columns_of, features

KINDS = ("text", "probe")
FOLDS = 5
TEXT_C = (3.0, 10.0, 30.0, 100.0)
PROBE_C = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
LAYERS_KEPT = 5  # layers for which every C is tried
RECIPE = 1  # part of the settings' hash: raise it when the training changes


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
        if "leak" in m:
            lines.append(m["leak"]["line"])
        return lines


@dataclass(frozen=True)
class LabelledTurns:
    """Turns and their classes: targets int64 [n], an index into the traits."""

    turns: tuple[Turn, ...]
    targets: np.ndarray

    def part(self, split: str) -> LabelledTurns:
        chosen = [index for index, turn in enumerate(self.turns) if turn.split == split]
        return LabelledTurns(tuple(self.turns[index] for index in chosen), self.targets[chosen])

    @property
    def conversations(self) -> list[list[Message]]:
        return [turn.messages for turn in self.turns]

    @property
    def folds(self) -> np.ndarray:
        """A fold per turn from its id alone, so that adding turns moves none."""
        return np.array([zlib.crc32(turn.id.encode()) % FOLDS for turn in self.turns])


@dataclass(frozen=True)
class Fit:
    """A linear model before calibration: weight [inputs, traits - 1], bias [traits - 1], and how it was chosen."""

    weight: np.ndarray
    bias: np.ndarray
    chosen: dict[str, Any]


def train_router(
    kind: str = "text",
    out: str | Path = "runs/router",
    base: str | Path | bases.Base | None = None,
    turns: str | Path | None = None,
    traits: Sequence[str] = DEFAULT_TRAITS,
    seed: int = 0,
) -> RouterReport:
    """Train a router and write its folder, whole or not at all.

    A finished folder of the same data and settings is kept.

    Parameters
    ----------
    kind: "text" or "probe". out: the router's folder. base: for a probe: name, folder or loaded base; the default
        base when None. turns: a JSON-lines file or folder; the packaged turns when None. traits: classes in the
        order of the router's columns. seed: kept with the router; the fit itself is deterministic.

    Raises
    ------
    TrainingError: an unknown kind, or too few turns of a trait. DataError: a broken turns file.
    """
    if kind not in KINDS:
        raise TrainingError(f"unknown router kind {kind!r}; the kinds are {', '.join(KINDS)}")
    data = read_turns(turns, tuple(traits))
    check_turns(data, traits)
    training = _training(kind, base, data, seed)
    kept = _finished(Path(out), training)
    if kept is not None:
        return RouterReport(Path(out), kind, True, kept.metrics, kept.training)
    card = Card(tuple(traits), data_hash(data.turns), {}, training)
    router, read = (_text if kind == "text" else _probe)(data, card, base)
    held = data.part("test")
    table = router.probabilities(held.conversations, read)
    card = dataclasses.replace(router.card, metrics=held_out_metrics(table, held))
    router.card = card
    router.save(out)
    return RouterReport(Path(out), kind, False, card.metrics, card.training)


def read_turns(path: str | Path | None, traits: tuple[str, ...]) -> LabelledTurns:
    """Turns and their classes. Labels are trait names, or "social" for the first and "reasoning" for the last trait."""
    turns = load_turns() if path is None else _own_turns(Path(path))
    index = {"social": 0, "reasoning": len(traits) - 1, **{trait: k for k, trait in enumerate(traits)}}
    for turn in turns:
        if turn.label not in index:
            problem = f"turn {turn.id} has label {turn.label!r}; use one of {', '.join(index)}"
            raise DataError(path or "gatedwarmth.data", 0, problem)
    return LabelledTurns(tuple(turns), np.array([index[turn.label] for turn in turns], dtype=np.int64))


def _own_turns(path: Path) -> list[Turn]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [_own_turn(file, number, value) for file in files for number, value in read_jsonl(file)]


def _own_turn(file: Path, number: int, value: dict[str, Any]) -> Turn:
    for key in ("id", "text", "label"):
        if not isinstance(value.get(key), str) or not value[key].strip():
            raise DataError(file, number, f"{key!r} must be a text that is not empty, found {value.get(key)!r}")
    if not value["id"][-1].isdigit():
        raise DataError(file, number, f"id {value['id']!r} must end in a number, from which the split is read")
    return Turn(
        value["id"], value["text"], value["label"], bool(value.get("mixed", False)), bool(value.get("hard", False)),
        str(value.get("pattern", "plain")), list(value.get("context", [])),
    )  # fmt: skip


def check_turns(data: LabelledTurns, traits: Sequence[str]) -> None:
    """Every trait needs turns in every split, and in two folds of train.

    Raises
    ------
    TrainingError: naming the trait and the split.
    """
    for split, least in (("train", 10), ("dev", 2), ("test", 2)):
        part = data.part(split)
        for k, trait in enumerate(traits):
            count = int((part.targets == k).sum())
            if count < least:
                raise TrainingError(
                    f"{count} turns of {trait!r} in the split {split}, at least {least} are needed; the split follows "
                    "from the last digit of an id: 8 and 9 test, 7 dev, the rest train"
                )


def held_out_metrics(table: np.ndarray, held: LabelledTurns) -> dict[str, Any]:
    """Figures on held-out turns, with the leak bound of the first trait."""
    hard, patterns = [turn.hard for turn in held.turns], [turn.pattern for turn in held.turns]
    found = metrics(table, held.targets, hard, patterns)
    social = held.targets != table.shape[1] - 1
    bound = threshold_for_leak(1.0 - table[:, -1], social)
    found["leak_rate"] = float((table[~social, -1] <= 0.5).mean())
    found["leak"] = {**dataclasses.asdict(bound), "line": bound.line()}
    return found


# --- text


def _text(data: LabelledTurns, card: Card, base: object) -> tuple[TextRouter, None]:
    settings = TextSettings()
    train, dev = data.part("train"), data.part("dev")
    x = text_matrix(train.conversations, settings)
    coordinates = short_coordinates(x)
    classes = len(card.traits)
    losses = {c: cross_validated_loss(coordinates, train, c) for c in TEXT_C}
    c = min(losses, key=lambda key: losses[key])
    short, bias = fit_logistic(coordinates, train.targets, classes, c)
    weight = x.T @ solve_triangular(coordinates, short, lower=True, trans="T")
    fit = Fit(weight, bias, {"c": c, "cross_validated_log_loss": losses[c]})
    weight, bias = calibrated(fit, text_matrix(dev.conversations, settings), dev.targets)
    return TextRouter(weight, bias, settings, _chosen(card, fit)), None


def short_coordinates(x: csr_matrix) -> np.ndarray:
    """[n, n] lower triangular coordinates with the same inner products as the n rows of `x`.

    A regularised linear model is a combination of its training rows (representer theorem), so it can be fitted on n
    numbers a turn instead of a hundred thousand, with the same result: weight = x.T · coordinates⁻ᵀ · short weight.
    """
    gram = (x @ x.T).toarray()
    return np.asarray(cholesky(gram + 1e-8 * np.eye(len(gram)), lower=True))


def text_matrix(conversations: Sequence[Sequence[Message]], settings: TextSettings) -> csr_matrix:
    """float64 [n, columns]."""
    rows = [features(messages, settings) for messages in conversations]
    starts = np.cumsum([0] + [len(columns) for columns, _ in rows])
    columns = np.concatenate([columns for columns, _ in rows])
    values = np.concatenate([values for _, values in rows]).astype(np.float64)
    return csr_matrix((values, columns, starts), shape=(len(rows), columns_of(settings)))


# --- probe


def _probe(
    data: LabelledTurns, card: Card, base: str | Path | bases.Base | None
) -> tuple[ProbeRouter, Callable[[int], Any]]:
    import torch

    loaded = base if isinstance(base, bases.Base) else bases.load(base or bases.DEFAULT)
    parts = {split: data.part(split) for split in ("train", "dev", "test")}
    states = {s: hidden_states(loaded.model, loaded.tokenizer, part.conversations) for s, part in parts.items()}
    fit, layer = fit_probe(states["train"].astype(np.float64), parts["train"], len(card.traits))
    weight, bias = calibrated(fit, states["dev"][:, layer - 1].astype(np.float64), parts["dev"].targets)
    router = ProbeRouter(weight, bias, layer, loaded.name, _chosen(card, fit))
    return router, lambda wanted: torch.from_numpy(states["test"][:, wanted - 1])


def fit_probe(states: np.ndarray, train: LabelledTurns, classes: int) -> tuple[Fit, int]:
    """The layer and C with the least cross-validated loss. states: [n, layers, hidden]. Layers count from 1."""
    middle = PROBE_C[len(PROBE_C) // 2 - 1]
    scaled = [_standardised(states[:, index]) for index in range(states.shape[1])]
    first = [cross_validated_loss(x[0], train, middle) for x in scaled]
    kept = sorted(range(len(first)), key=lambda index: first[index])[:LAYERS_KEPT]
    losses = {(index, c): cross_validated_loss(scaled[index][0], train, c) for index in kept for c in PROBE_C}
    index, c = min(losses, key=lambda key: losses[key])
    x, mean, deviation = scaled[index]
    weight, bias = fit_logistic(x, train.targets, classes, c)
    weight = weight / deviation[:, None]
    chosen = {"layer": index + 1, "c": c, "cross_validated_log_loss": losses[index, c]}
    return Fit(weight, bias - mean @ weight, chosen), index + 1


def _standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, deviation = x.mean(axis=0), x.std(axis=0) + 1e-6
    return (x - mean) / deviation, mean, deviation


# --- both


def fit_logistic(x: Any, targets: np.ndarray, classes: int, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression, classes weighted alike.

    Returns weight [inputs, classes - 1] and bias [classes - 1], relative to the last class.
    """
    model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced", tol=1e-4).fit(x, targets)
    if len(model.classes_) != classes:
        raise TrainingError(f"a fold holds {len(model.classes_)} of {classes} traits; more turns of each are needed")
    if classes == 2:  # one row: the logit of class 1, which is the last
        return -model.coef_.T, -model.intercept_
    return (model.coef_[:-1] - model.coef_[-1]).T, model.intercept_[:-1] - model.intercept_[-1]


def cross_validated_loss(x: Any, train: LabelledTurns, c: float) -> float:
    """Mean log loss of out-of-fold predictions."""
    table = out_of_fold(x, train, c)
    return float(-np.log(np.clip(table[np.arange(len(table)), train.targets], 1e-12, 1.0)).mean())


def out_of_fold(x: Any, train: LabelledTurns, c: float) -> np.ndarray:
    """[n, classes]: each turn's probabilities by a model that did not see its fold."""
    classes = int(train.targets.max()) + 1
    table = np.zeros((len(train.targets), classes))
    for fold in np.unique(train.folds):
        inside = train.folds != fold
        weight, bias = fit_logistic(x[inside], train.targets[inside], classes, c)
        table[~inside] = softmax_to_last(np.asarray(x[~inside] @ weight) + bias)
    return table


def calibrated(fit: Fit, x: Any, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The fit's weight and bias with the calibration on (x, targets) folded in, float32."""
    scale, shift = fit_calibration(np.asarray(x @ fit.weight) + fit.bias, targets)
    return (fit.weight * scale).astype(np.float32), (fit.bias * scale + shift).astype(np.float32)


def _chosen(card: Card, fit: Fit) -> Card:
    return dataclasses.replace(card, training={**card.training, **fit.chosen})


def _training(kind: str, base: str | Path | bases.Base | None, data: LabelledTurns, seed: int) -> dict[str, Any]:
    """What a finished folder must agree with to be kept."""
    name = "" if kind == "text" else base.name if isinstance(base, bases.Base) else str(base or bases.DEFAULT)
    settings = dataclasses.asdict(TextSettings()) if kind == "text" else {}
    asked = {
        "kind": kind,
        "base": name,
        "seed": seed,
        "recipe": RECIPE,
        "settings": settings,
        "targets": data.targets.tolist(),
    }
    digest = hashlib.sha256((json.dumps(asked) + data_hash(data.turns)).encode()).hexdigest()
    return {
        "settings_hash": digest, "turns": len(data.part("train").turns), "calibrated_on": "dev",
        "evaluated_on": "test", "seed": seed, "base": name,
    }  # fmt: skip


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
        base: str = typer.Option("", help="base of a probe; the default base when empty"),
        turns: str = typer.Option("", help="turns of your own, JSON lines"),
        traits: str = typer.Option(",".join(DEFAULT_TRAITS), help="classes, separated by commas, neutral last"),
        seed: int = typer.Option(0),
    ) -> None:
        report = train_router(kind, out, base or None, turns or None, traits.split(","), seed)
        print("\n".join(report.lines()))

    typer.run(command)


if __name__ == "__main__":
    main()
