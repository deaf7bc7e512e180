"""A router on disk: router.json for what a person reads, router.safetensors for its numbers. Nothing is pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gatedwarmth.errors import RouterError
from gatedwarmth.files import write_folder_atomic, write_json_atomic

SCHEMA = 4
FILE, TENSORS = "router.json", "router.safetensors"
AGAIN = "train it again with `gatedwarmth train router`"
DEFAULT_TRAITS = ("warmth", "neutral")


@dataclass(frozen=True)
class Card:
    """What a router says of itself.

    traits: column k is the probability of trait k; the last one takes over where no other is called for.
    data_hash: SHA-256 of the turns that it was trained on. metrics: held-out figures. training: how it was made.
    """

    traits: tuple[str, ...] = DEFAULT_TRAITS
    data_hash: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.traits) < 2 or len(set(self.traits)) != len(self.traits):
            raise RouterError(f"a router needs two or more different traits, found {list(self.traits)}")

    def line(self, kind: str) -> str:
        """One line for a reader."""
        seen = f"trained on {self.training['turns']} turns" if "turns" in self.training else "of unknown training"
        accuracy = self.metrics.get("balanced_accuracy")
        held = f", balanced accuracy {accuracy:.3f} on held-out turns" if accuracy is not None else ""
        return f"{kind} router, {seen}{held}"


@dataclass(frozen=True)
class SavedRouter:
    kind: str
    card: Card
    settings: dict[str, Any]
    tensors: dict[str, np.ndarray]


def write_router(folder: Path, kind: str, card: Card, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write a router's folder, whole or not at all."""

    def fill(target: Path) -> None:
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, target / TENSORS)
        value = {
            "schema": SCHEMA,
            "kind": kind,
            "traits": list(card.traits),
            "settings": settings,
            "data_hash": card.data_hash,
            "training": card.training,
            "metrics": card.metrics,
        }
        write_json_atomic(target / FILE, value)

    write_folder_atomic(folder, fill)


def read_router(folder: Path) -> SavedRouter:
    """Read what `write_router` wrote.

    Raises
    ------
    RouterError: a missing, broken or truncated file, or a schema of another version; it says what to do.
    """
    path = folder / FILE
    if not path.is_file():
        raise RouterError(
            f"{folder} is no router folder, it has no {FILE}; give the folder that training wrote, or {AGAIN}"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise RouterError(f"{path} has schema {value['schema']!r}, this version reads {SCHEMA}; upgrade or {AGAIN}")
        card = Card(tuple(value["traits"]), value["data_hash"], value["metrics"], value["training"])
        saved = SavedRouter(value["kind"], card, value["settings"], read_tensors(folder / TENSORS))
    except (ValueError, KeyError, TypeError) as error:
        raise RouterError(f"{path} is broken ({type(error).__name__}: {error}); {AGAIN}") from error
    return saved


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RouterError(f"{path} is missing or truncated ({error}); copy it once more or {AGAIN}") from error


def check_array(name: str, array: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
    """The array as float32, if it has the shape and no NaN or infinity.

    Raises
    ------
    RouterError: another shape, or a value that is not finite.
    """
    if array.shape != wanted:
        raise RouterError(f"the router's {name} has shape {list(array.shape)}, expected {list(wanted)}; {AGAIN}")
    if not np.isfinite(array).all():
        raise RouterError(f"the router's {name} holds NaN or infinity; {AGAIN}")
    return np.asarray(array, dtype=np.float32)


def softmax_to_last(logits: np.ndarray) -> np.ndarray:
    """[n, traits - 1] logits relative to the last trait → [n, traits] probabilities in float64."""
    full = np.concatenate([logits, np.zeros((len(logits), 1))], axis=1)
    power = np.exp(full - full.max(axis=1, keepdims=True))
    return power / power.sum(axis=1, keepdims=True)
