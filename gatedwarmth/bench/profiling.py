"""`bench profile`: which operators the time of a gated pass goes to, beside the base's, by torch's profiler."""

from __future__ import annotations

import gc
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from gatedwarmth import bases
from gatedwarmth.bench.model import ModelSettings, cases_of
from gatedwarmth.bench.rows import Row, dtype_of, row_of
from gatedwarmth.bench.subjects import BASE, SUBJECTS, Workshop
from gatedwarmth.errors import GatedWarmthError
from gatedwarmth.kernels.bench import Contender, Measured
from gatedwarmth.kernels.bench.measure import Summary, summary

NAME = "profile"
GATED = "gated, a gate per row"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


@dataclass(frozen=True)
class ProfileSettings:
    """As ModelSettings, for the base and one contender. share: smaller parts of the base's pass are added up."""

    base: str = bases.DEFAULT
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    runs: int = 9
    contender: str = GATED
    rank: int = 8
    prefill: tuple[int, int] = (8, 256)
    decode: tuple[int, ...] = (8,)
    context: int = 64
    steps: int = 8
    share: float = 0.005

    def __post_init__(self) -> None:
        if torch.device(self.device).type != "cpu":
            raise GatedWarmthError(f"the profile is of CPU operators, found device {self.device!r}; use cpu")
        if self.contender == BASE:
            raise GatedWarmthError(f"the contender is profiled beside {BASE!r}, so it must be another")
        self.of_models()  # refuses an unknown contender before a base is loaded

    def of_models(self) -> ModelSettings:
        """What the cases are made from."""
        return ModelSettings(
            base=self.base, rank=self.rank, prefill=self.prefill, decode=self.decode, context=self.context,
            steps=self.steps, contenders=(self.contender,),
        )  # fmt: skip


def run_profile(settings: ProfileSettings) -> Iterator[Row]:
    """Rows of every dtype, case by case."""
    for dtype in settings.dtypes:
        yield from measure_profile(bases.load(settings.base, dtype_of(dtype), settings.device), settings, dtype)
        gc.collect()


@torch.no_grad()
def measure_profile(base: bases.Base, settings: ProfileSettings, dtype: str) -> Iterator[Row]:
    """A row an operator: the contender's seconds in it, their ratio to the base's, and in the note the base's."""
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop.open(base, Path(folder), settings.rank)
        subjects = {name: SUBJECTS[name](workshop) for name in (BASE, settings.contender)}
        for case in cases_of(settings.of_models(), base.model):
            theirs, mine = (case.contender(name, subject) for name, subject in subjects.items())
            for measured in profiled(f"{case.name}: {settings.contender}", theirs, mine, settings):
                yield row_of(NAME, measured, base.name, dtype, settings.device)


def profiled(case: str, theirs: Contender, mine: Contender, settings: ProfileSettings) -> list[Measured]:
    """All operators together, then one by one, the longest first, then those below `share`; one round warms up."""
    rounds = [(_operators(theirs), _operators(mine)) for _ in range(settings.runs + 1)][1:]
    names = {name for each in rounds for operators in each for name in operators}
    longest = {name: max(_seconds(rounds, k, {name}).median for k in (0, 1)) for name in names}
    least = settings.share * _seconds(rounds, 0, names).median
    large = sorted((name for name in names if longest[name] >= least), key=lambda name: -longest[name])
    parts = {"all operators": names, **{name: {name} for name in large}, "smaller ones": names - {*large}}
    return [_row(case, label, rounds, part) for label, part in parts.items()]


Operators = dict[str, tuple[float, float]]  # name → seconds of its own, calls; per unit of work
Round = tuple[Operators, Operators]  # the base's and the contender's


def _row(case: str, label: str, rounds: Sequence[Round], names: set[str]) -> Measured:
    theirs, mine = (_seconds(rounds, k, names) for k in (0, 1))
    calls = [f"{sum(rounds[0][k][name][1] for name in names if name in rounds[0][k]):g} calls" for k in (0, 1)]
    note = f"{calls[1]}; {BASE} {theirs.median * 1e3:.4g} ms, {calls[0]}"
    pairs = [(_sum(each[0], names), _sum(each[1], names)) for each in rounds]
    ratio = summary([gated / base for base, gated in pairs]) if all(base for base, _ in pairs) else None
    return Measured(case, label, mine, ratio, BASE, note=note)


def _seconds(rounds: Sequence[Round], k: int, names: set[str]) -> Summary:
    return summary([_sum(each[k], names) for each in rounds])


def _sum(operators: Operators, names: set[str]) -> float:
    return sum(operators[name][0] for name in names if name in operators)


def _operators(contender: Contender) -> Operators:
    """Of one run. What the profiler itself takes is in the times."""
    contender.prepare()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        contender.run()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in trace.key_averages(group_by_input_shape=True):
        entry = found[_label(event.key, event.input_shapes)]
        entry[0] += event.self_cpu_time_total / 1e6 / contender.units
        entry[1] += event.count / contender.units
    return {name: (seconds, calls) for name, (seconds, calls) in found.items()}


def _label(name: str, shapes: Sequence[Sequence[int]]) -> str:
    """Products by the shapes of what is multiplied, all others by name.

    >>> _label("aten::mm", [[2048, 576], [576, 48]]), _label("aten::silu", [[2048, 1536]])
    ('mm 2048×576 · 576×48', 'silu')
    """
    short = name.removeprefix("aten::").lstrip("_")
    if name not in PRODUCTS:
        return short
    factors = [shape for shape in shapes if len(shape) >= 2][-2:]
    return f"{short} " + " · ".join("×".join(map(str, shape)) for shape in factors)
