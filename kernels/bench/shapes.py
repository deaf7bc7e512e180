"""The frozen list of shapes, shapes.json: what a figure is compared over from one version to the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("shapes.json")
PATTERNS = ("zero", "one-hot", "half", "soft")
QUICK = "quick"


@dataclass(frozen=True)
class OpShape:
    """One linear layer and its traits.

    width, out: features in and out. rank: of each of the `traits` traits. gates: a name of PATTERNS.
    """

    tokens: int
    width: int
    out: int
    rank: int
    traits: int
    gates: str

    @property
    def name(self) -> str:
        return f"{self.tokens}×{self.width}→{self.out} r{self.rank}×{self.traits} {self.gates}"


def load_shapes(quick: bool = False) -> tuple[OpShape, ...]:
    """Every shape once: those of the group "quick", small enough for a CPU, or those of all other groups."""
    frozen = json.loads(FILE.read_text(encoding="utf-8"))
    groups = [group for name, group in frozen["groups"].items() if (name == QUICK) == quick]
    found = (shape for group in groups for shape in _expanded(group, frozen["layers"]))
    return tuple(dict.fromkeys(found))


def _expanded(group: dict[str, Any], layers: dict[str, list[list[int]]]) -> Iterator[OpShape]:
    sizes = [tuple(size) for name in group["layers"] for size in layers[name]]
    for (width, out), tokens, rank, traits, gates in product(
        sizes, group["tokens"], group["ranks"], group["traits"], group["gates"]
    ):
        yield OpShape(tokens, width, out, rank, traits, gates)
