"""Gates: policies that turn a router's probabilities into gates, and the gates in force during a forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gatedwarmth.errors import GateError
from gatedwarmth.kernels.dense import gate_columns

Scope = Literal["response", "turn"]
SCOPES: tuple[Scope, ...] = ("response", "turn")


@dataclass(frozen=True)
class Policy:
    """From probabilities per trait to gates per trait.

    Parameters
    ----------
    kind: "soft": gate = probability. "hard": 1 from `threshold` on, the last trait takes the rest. "levels":
        rounded to `steps` equal steps. "handoff": the soft gates for an opening of `sentences` or `tokens`, then the
        last trait alone.
    threshold: for "hard": the probability from which a trait's gate opens.
    steps: for "levels": the number of steps between 0 and 1.
    sentences, tokens: for "handoff": length of the opening; `tokens` wins when both are given.
    floor, ceiling: bounds of every trait's gate but the last one, applied at the end.
    hysteresis: a new probability moves a gate only when it differs from the previous turn's by at least this much.
    """

    kind: str = "soft"
    threshold: float = 0.5
    steps: int = 4
    sentences: int = 1
    tokens: int = 0
    floor: float = 0.0
    ceiling: float = 1.0
    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in POLICIES:
            raise GateError(f"unknown policy {self.kind!r}; the policies are {', '.join(POLICIES)}")
        if not 0.0 <= self.floor <= self.ceiling <= 1.0:
            raise GateError(f"a policy needs 0 ≤ floor ≤ ceiling ≤ 1, found {self.floor} and {self.ceiling}")
        if self.steps < 1 or self.sentences < 0 or self.tokens < 0:
            raise GateError("a policy needs steps ≥ 1 and an opening of at least 0 sentences or tokens")

    def gates(
        self, probabilities: Mapping[str, float], previous: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Gates in the order of `probabilities`, whose last trait is the one that takes over (neutral).

        `previous`: the probabilities that set the previous turn's gates, for hysteresis.
        """
        if previous is not None and self.hysteresis:
            moved = max(abs(probabilities[t] - previous.get(t, 0.0)) for t in probabilities)
            if moved < self.hysteresis:
                probabilities = dict(previous)
        *leading, last = probabilities
        gates = {trait: self._bounded(self._gate(probabilities[trait])) for trait in leading}
        gates[last] = max(0.0, 1.0 - sum(gates.values())) if leading else self._gate(probabilities[last])
        return gates

    def _gate(self, probability: float) -> float:
        if self.kind == "hard":
            return 1.0 if probability >= self.threshold else 0.0
        if self.kind == "levels":
            return round(probability * self.steps) / self.steps
        return float(probability)

    def _bounded(self, gate: float) -> float:
        return min(self.ceiling, max(self.floor, gate))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


POLICIES = ("soft", "hard", "levels", "handoff")


def policy_from_name(name: str | Policy | Mapping[str, Any]) -> Policy:
    """A policy from its kind ("soft"), kind and number ("hard:0.7", "levels:5", "handoff:2"), or saved settings."""
    if isinstance(name, Policy):
        return name
    if isinstance(name, Mapping):
        return Policy(**name)
    kind, _, number = name.partition(":")
    if not number:
        return Policy(kind)
    field_of = {"hard": ("threshold", float), "levels": ("steps", int), "handoff": ("sentences", int)}
    if kind not in field_of:
        raise GateError(f"policy {name!r}: only {', '.join(field_of)} take a number")
    key, convert = field_of[kind]
    try:
        return Policy(kind, **{key: convert(number)})
    except ValueError:
        raise GateError(f"policy {name!r}: {number!r} is not a number that {kind} takes") from None


def gates_tensor(
    gates: Mapping[str, float] | Tensor, traits: Sequence[str], batch: int, tokens: int | None = None
) -> Tensor:
    """Checked gates as float32 [batch, traits] or [batch, tokens, traits].

    Raises
    ------
    GateError: an unknown trait, a wrong shape, NaN, or a value outside [0, 1].
    """
    if isinstance(gates, Mapping):
        unknown = [trait for trait in gates if trait not in traits]
        if unknown:
            raise GateError(f"unknown trait {unknown[0]!r}; this model has the traits {list(traits)}")
        gates = torch.tensor([[float(gates.get(trait, 0.0)) for trait in traits]]).expand(batch, -1)
    shapes = [[batch, len(traits)]] + ([[batch, tokens, len(traits)]] if tokens is not None else [])
    if list(gates.shape) not in shapes:
        wanted = " or ".join(str(shape) for shape in shapes)
        raise GateError(
            f"gates must be [batch, traits] or [batch, tokens, traits], here {wanted}; found {list(gates.shape)}"
        )
    gates = gates.float()
    bad = ~((gates >= 0) & (gates <= 1))
    if bad.any():
        raise GateError(f"gates must be numbers in [0, 1], found {gates[bad].flatten()[0].item()}")
    return gates


@dataclass
class GatePlan:
    """The gates of the tokens of one forward pass.

    gates: [batch, tokens, traits] for the tokens from column `start` on; tokens may be 1 and then holds for all.
    batch, tokens: the shape of the pass, for layers that see their tokens flattened.
    """

    gates: Tensor
    batch: int
    tokens: int
    start: int = 0
    _columns: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def scaled(self, scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch, tokens or 1, traits] times each trait's scaling."""
        key = (scalings, like.device, like.dtype)
        if key not in self._columns:
            factor = torch.tensor(scalings, device=like.device, dtype=torch.float32)
            self._columns[key] = (self.gates.to(like.device) * factor).to(like.dtype)
        return self._columns[key]

    def columns(self, ranks: tuple[int, ...], scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch, tokens or 1, R]: the scaled gate of every rank column, made once for all layers of a pass."""
        key = (ranks, scalings, like.device, like.dtype)
        if key not in self._columns:
            self._columns[key] = gate_columns(self.scaled(scalings, like), ranks)
        return self._columns[key]

    def flat(self, scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch · tokens, traits] times scaling, zeros before `start`: what the kernels take."""
        key = ("flat", scalings, like.device, like.dtype)
        if key not in self._columns:
            part = self.scaled(scalings, like).expand(-1, self.tokens - self.start, -1)
            before = part.new_zeros(self.batch, self.start, part.shape[-1])
            self._columns[key] = torch.cat([before, part], dim=1).flatten(0, 1) if self.start else part.flatten(0, 1)
        return self._columns[key]


@dataclass
class GatesInForce:
    """What every GatedLinear of one model looks at: the plan of the pass under way, None for the bare base."""

    plan: GatePlan | None = None


@dataclass
class GateSchedule:
    """The gates of a whole call, from which each forward pass takes its plan.

    rows: [batch, traits], for every token from `start` on, generated ones included.
    start: column of the first gated token. prompt: [batch, tokens, traits] gates of given tokens instead.
    later, opening: for a handoff: the gates after the opening, and how many generated tokens it lasts; None while the
        end of the opening is not known.
    seen: columns already computed, cached ones included.
    """

    rows: Tensor
    start: int = 0
    prompt: Tensor | None = None
    later: Tensor | None = None
    switched: Tensor | None = None
    seen: int = 0

    def plan(self, batch: int, tokens: int) -> GatePlan | None:
        """The plan of the next pass over `tokens` columns, or None when none of its tokens is gated."""
        first, self.seen = self.seen, self.seen + tokens
        if self.prompt is not None and first < self.prompt.shape[1]:
            given = self.prompt[:, first : first + tokens]
            rest = tokens - given.shape[1]
            if rest:
                given = torch.cat([given, self.rows[:, None].expand(-1, rest, -1)], dim=1)
            return _plan_of(self._repeat(given, batch), batch, tokens)
        skipped = max(0, self.start - first)
        if skipped >= tokens:
            return None
        gates = self._repeat(self._current(), batch)[:, None]
        if not gates.any():
            return None
        return GatePlan(gates, batch, tokens, skipped)

    def _current(self) -> Tensor:
        if self.later is None or self.switched is None:
            return self.rows
        repeats = self.switched.shape[0] // self.rows.shape[0]
        rows = self.rows.repeat_interleave(repeats, dim=0)
        return torch.where(self.switched[:, None], self.later.repeat_interleave(repeats, dim=0), rows)

    @staticmethod
    def _repeat(gates: Tensor, batch: int) -> Tensor:
        """Beams and several sequences per prompt repeat each row of the batch next to itself."""
        if gates.shape[0] == batch:
            return gates
        if batch % gates.shape[0]:
            raise GateError(f"gates for {gates.shape[0]} rows cannot serve a pass of {batch} rows")
        return gates.repeat_interleave(batch // gates.shape[0], dim=0)


def _plan_of(gates: Tensor, batch: int, tokens: int) -> GatePlan | None:
    """A plan that skips the leading columns in which no row has an open gate."""
    if gates.requires_grad:
        return GatePlan(gates, batch, tokens)
    gated = gates.ne(0).any(-1).any(0).nonzero()
    if not len(gated):
        return None
    start = int(gated[0])
    return GatePlan(gates[:, start:], batch, tokens, start)


def sentence_ends(text: str) -> int:
    """How many sentences of `text` have ended: a mark of full stop, question or exclamation before a blank or the end.

    >>> sentence_ends("Oh no. That is a lot! And"), sentence_ends("It is 3.5 km")
    (2, 0)
    """
    ends = 0
    for index, letter in enumerate(text):
        after = text[index + 1 : index + 2]
        ends += letter in ".!?…" and after.isspace() or letter == "\n"
    return ends


def is_open(gate: float, threshold: float = 0.5) -> bool:
    """Whether a gate counts as open, for leak rates."""
    return not math.isnan(gate) and gate >= threshold
