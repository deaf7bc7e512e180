"""Gates: policies that turn a router's probabilities into gates, and the gates in force during a forward pass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
        if not 0.0 <= self.threshold <= 1.0:
            raise GateError(f"a policy's threshold is a probability, found {self.threshold}; give one in [0, 1]")
        if self.steps < 1 or self.sentences < 0 or self.tokens < 0:
            raise GateError("a policy needs steps ≥ 1 and an opening of at least 0 sentences or tokens")

    def gates(self, probabilities: Mapping[str, float]) -> dict[str, float]:
        """Gates in the order of `probabilities`, whose last trait is the one that takes over (neutral)."""
        *leading, last = probabilities
        gates = {trait: self._bounded(self._gate(probabilities[trait])) for trait in leading}
        gates[last] = max(0.0, 1.0 - sum(gates.values())) if leading else self._gate(probabilities[last])
        return gates

    def holds(self, probabilities: Mapping[str, float], previous: Mapping[str, float] | None) -> bool:
        """Whether hysteresis keeps the gates of the previous turn: nothing moved by as much as `hysteresis`."""
        if not previous or not self.hysteresis:
            return False
        return max(abs(probabilities[t] - previous.get(t, 0.0)) for t in probabilities) < self.hysteresis

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
        value = convert(number)
    except ValueError:
        raise GateError(f"policy {name!r}: {number!r} is not a number that {kind} takes") from None
    return Policy(kind, **{key: value})


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

        def make() -> Tensor:
            factor = torch.tensor(scalings, device=like.device, dtype=torch.float32)
            return (self.gates.to(like.device) * factor).to(like.dtype)

        return self._once((scalings, like.device, like.dtype), make)

    def columns(self, ranks: Sequence[tuple[int, ...]], scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch, tokens or 1, R of all]: the scaled gate of every rank column, made once for all layers of a pass.

        ranks: of one layer, or of several that share their work.
        """

        def make() -> Tensor:
            return gate_columns(
                self.scaled(scalings, like).repeat(1, 1, len(ranks)), [r for each in ranks for r in each]
            )

        return self._once((*ranks, scalings, like.device, like.dtype), make)

    def flat_columns(self, ranks: Sequence[tuple[int, ...]], scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch · tokens, R of all]: `columns` of a plan that starts at 0, one row a token."""

        def make() -> Tensor:
            return self.columns(ranks, scalings, like).expand(-1, self.tokens, -1).flatten(0, 1)

        return self._once(("flat", *ranks, scalings, like.device, like.dtype), make)

    def flat(self, scalings: tuple[float, ...], like: Tensor) -> Tensor:
        """[batch · tokens, traits] times scaling, zeros before `start`: what the kernels take."""

        def make() -> Tensor:
            part = self.scaled(scalings, like).expand(-1, self.tokens - self.start, -1)
            before = part.new_zeros(self.batch, self.start, part.shape[-1])
            return torch.cat([before, part], dim=1).flatten(0, 1) if self.start else part.flatten(0, 1)

        return self._once(("flat", scalings, like.device, like.dtype), make)

    def _once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():  # a store kept between calls would make the compiler start over
            return make()
        if key not in self._columns:
            self._columns[key] = make()
        return self._columns[key]


@dataclass
class GatesInForce:
    """What every GatedLinear of one model looks at: the plan of the pass under way, None for the bare base."""

    plan: GatePlan | None = None

    @contextmanager
    def holding(self, plan: GatePlan | None) -> Iterator[None]:
        """Inside the block `plan` is in force, whatever pass came last."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before


@dataclass
class PassGates:
    """The gates of a call that is a single forward pass: [batch, tokens or 1, traits]."""

    gates: Tensor

    def plan(self, batch: int, tokens: int, first: int = 0) -> GatePlan | None:
        return _plan_of(self.gates, batch, tokens)

    def needs_first(self) -> bool:
        return False


@dataclass
class GateSchedule:
    """The gates of a whole call of generate, from which each forward pass takes its plan.

    A column is a position in the whole sequence, cached tokens and padding included.

    rows: [batch, traits], for every token from `start` on, generated ones included.
    start: column of the first gated token. prompt: [batch, tokens, traits] gates of given tokens instead.
    offset: column of the first token given to the call, where only the tokens after a cache were given.
    later: [batch, traits], for a handoff: the gates after the opening. switched: int64 [rows], the column from which
        they hold in each row; NEVER while the end of the opening is not known.
    switch_at: row → number of generated tokens in its opening, once it is over.
    """

    rows: Tensor
    start: int = 0
    prompt: Tensor | None = None
    later: Tensor | None = None
    switched: Tensor | None = None
    switch_at: dict[int, int] = field(default_factory=dict)
    offset: int = 0

    def __post_init__(self) -> None:
        self._open = bool(self.rows.any()) or (self.later is not None and bool(self.later.any()))
        self._settled = False
        self._steady: dict[tuple[int, int], GatePlan | None] = {}

    def needs_first(self) -> bool:
        """Whether `plan` still has to know at which column a pass begins: reading a static cache's length is slow."""
        return not self._settled

    def plan(self, batch: int, tokens: int, first: int = 0) -> GatePlan | None:
        """The plan of a pass over the columns first, first + 1, …, or None when none of its tokens is gated."""
        if not self._settled and (self.later is not None or first < self._steady_from()):
            return self._changing(batch, tokens, first)
        # From here on every pass has the same gates: assisted decoding never crops into the prompt.
        self._settled = first > 0
        if (batch, tokens) not in self._steady:
            gates = _repeat(self.rows, batch)[:, None]
            self._steady[batch, tokens] = GatePlan(gates, batch, tokens) if self._open else None
        return self._steady[batch, tokens]

    def gates(self, first: int, tokens: int) -> Tensor:
        """[rows, tokens, traits]: the gates of the columns from `first` on."""
        columns = torch.arange(first, first + tokens, device=self.rows.device)
        gates = self.rows[:, None].expand(-1, tokens, -1)
        if self.later is not None and self.switched is not None:
            after = columns >= self.switched.to(columns.device)[:, None]  # [rows · sequences, tokens]
            gates, later = _repeat(gates, len(after)), _repeat(self.later, len(after))
            gates = torch.where(after[..., None], later[:, None], gates)
        if self.prompt is None:
            return gates * (columns >= self.start + self.offset)[:, None]
        given = self.prompt[:, max(0, first - self.offset) : max(0, first + tokens - self.offset)]
        before = given.new_zeros(given.shape[0], min(tokens, max(0, self.offset - first)), given.shape[2])
        given = _repeat(torch.cat([before, given], dim=1), gates.shape[0])
        return torch.cat([given, gates[:, given.shape[1] :]], dim=1)

    def _steady_from(self) -> int:
        return self.offset + (self.start if self.prompt is None else self.prompt.shape[1])

    def _changing(self, batch: int, tokens: int, first: int) -> GatePlan | None:
        if self.prompt is None and self.later is None:
            skipped = self._steady_from() - first
            if skipped >= tokens or not self._open:
                return None
            return GatePlan(_repeat(self.rows, batch)[:, None], batch, tokens, skipped)
        return _plan_of(_repeat(self.gates(first, tokens), batch), batch, tokens)


NEVER = 2**62


def _repeat(gates: Tensor, batch: int) -> Tensor:
    """Beams and several sequences per prompt repeat each row of the batch next to itself."""
    if gates.shape[0] == batch:
        return gates
    if batch % gates.shape[0]:
        raise GateError(f"gates for {gates.shape[0]} rows cannot serve a pass of {batch} rows")
    return gates.repeat_interleave(batch // gates.shape[0], dim=0)


def _plan_of(gates: Tensor, batch: int, tokens: int) -> GatePlan | None:
    """A plan of gates [batch, tokens or 1, traits] that skips the leading columns in which no row has an open gate."""
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
