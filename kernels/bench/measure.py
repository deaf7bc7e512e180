"""Fair timings: warmed up, interleaved in one process, garbage collector off, a ratio from each round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Run = Callable[[], object]


def nothing() -> None:
    """The preparation of a contender that needs none."""


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    run: the work. prepare: done before each measurement and not timed. units: how many of the thing that the row is
    about one run does (decode steps, decisions); seconds are divided by it. note: for the reader of the row.
    """

    name: str
    run: Run
    prepare: Run = nothing
    units: int = 1
    note: str = ""


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of n values."""

    n: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """One contender in one case.

    seconds: per unit of work; None where it failed. ratio: to the baseline, from the rounds in which both ran.
    held: bytes kept on top of the baseline's. peak: bytes that one run needs for a while, on top of the baseline's.
    error: why there is no figure.
    """

    case: str
    contender: str
    seconds: Summary | None = None
    ratio: Summary | None = None
    baseline: str = ""
    held: int | None = None
    peak: int | None = None
    error: str = ""
    note: str = ""


class Clock(Protocol):
    def seconds(self, run: Run, calls: int) -> float:
        """How long `calls` calls take, all together."""
        ...


class WallClock:
    """Wall time of the CPU."""

    def seconds(self, run: Run, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return time.perf_counter() - start


class CudaClock:
    """Time between two CUDA events around the calls."""

    def seconds(self, run: Run, calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: str | torch.device) -> Clock:
    """CUDA events on a GPU, wall time elsewhere."""
    return CudaClock() if torch.device(device).type == "cuda" else WallClock()


def summary(values: Sequence[float]) -> Summary:
    """Median and quartiles, linear between neighbours.

    >>> summary([4.0, 1.0, 3.0, 2.0, 5.0])
    Summary(n=5, median=3.0, low=2.0, high=4.0)
    """
    ordered = sorted(values)
    return Summary(len(ordered), _quantile(ordered, 0.5), _quantile(ordered, 0.25), _quantile(ordered, 0.75))


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    contenders: Sequence[Contender], runs: int, clock: Clock, shortest: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per unit, one entry a round, of every contender.

    A round runs each contender once, in an order that changes from round to round: a machine that slows down slows all
    of them, and none always follows the same other one. What takes less than `shortest` seconds is called as often as
    it needs, the same number of times for all contenders.
    """
    calls = 1
    if shortest and contenders:
        contenders[0].prepare()
        calls = max(1, round(shortest / max(clock.seconds(contenders[0].run, 1), 1e-7)))
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order, shuffler = list(contenders), random.Random(0)
    with collector_off():
        for _ in range(runs):
            shuffler.shuffle(order)
            for contender in order:
                contender.prepare()
                times[contender.name].append(clock.seconds(contender.run, calls) / (calls * contender.units))
    return times


def measure(
    case: str,
    contenders: Sequence[Contender],
    baseline: str,
    runs: int,
    clock: Clock,
    warmup: int = 2,
    shortest: float = 0.0,
) -> list[Measured]:
    """A row a contender, in the given order; one that fails in the warm-up leaves its error and no figure.

    baseline: the contender that ratios are taken to, "" for none. A ratio is taken within each round, then summarised.
    """
    errors: dict[str, str] = {}
    for contender in contenders:
        error = _warm(contender, warmup)
        if error:
            errors[contender.name] = error
    times = interleave([c for c in contenders if c.name not in errors], runs, clock, shortest)
    return [
        Measured(case, c.name, baseline=baseline, error=errors[c.name], note=c.note)
        if c.name in errors
        else Measured(case, c.name, summary(times[c.name]), _ratio(times, c.name, baseline), baseline, note=c.note)
        for c in contenders
    ]


def _warm(contender: Contender, warmup: int) -> str:
    try:
        for _ in range(warmup):
            contender.prepare()
            contender.run()
    except Exception as error:  # other people's code: whatever it raises belongs in the table
        return describe_error(error)
    return ""


def describe_error(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _ratio(times: dict[str, list[float]], name: str, baseline: str) -> Summary | None:
    if baseline not in times:
        return None
    return summary([mine / theirs for mine, theirs in zip(times[name], times[baseline], strict=True)])


@contextmanager
def collector_off() -> Iterator[None]:
    """Collect garbage now, and not inside the block."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
