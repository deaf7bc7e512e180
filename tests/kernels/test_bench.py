"""The benchmarks' clock, shapes, memory and contenders of the op."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from gatedwarmth.kernels.bench import OPS, Contender, OpSettings, OpShape, load_shapes, measure, measure_op, summary
from gatedwarmth.kernels.bench.memory import live_bytes, peak_bytes
from gatedwarmth.kernels.bench.op import LINEAR, contenders_on


class FakeClock:
    """Time passes only where a run says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        start = self.now
        for _ in range(calls):
            run()
        return self.now - start

    def contender(self, name: str, durations: list[float], units: int = 1) -> Contender:
        left = iter(durations)

        def run() -> None:
            self.log.append(name)
            self.now += next(left)

        return Contender(name, run, units=units)


def test_quartiles_are_linear_between_neighbours() -> None:
    found = summary([4.0, 1.0, 2.0, 3.0])
    assert (found.n, found.low, found.median, found.high) == (4, 1.75, 2.5, 3.25)


def test_ratios_are_taken_within_each_round() -> None:
    clock = FakeClock()
    base = clock.contender("base", [1.0, 2.0, 4.0])  # the machine slows down
    twice = clock.contender("twice", [2.0, 4.0, 8.0])
    rows = measure("case", [base, twice], "base", runs=3, clock=clock, warmup=0)
    assert [row.contender for row in rows] == ["base", "twice"]
    ratio = rows[1].ratio
    assert ratio is not None and (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)
    assert rows[1].seconds is not None and rows[1].seconds.median == 4.0
    assert rows[0].ratio is not None and rows[0].ratio.median == 1.0


def test_units_divide_and_every_round_runs_every_contender_once() -> None:
    clock = FakeClock()
    contenders = [clock.contender(name, [8.0] * 9, units=4) for name in "abc"]
    rows = measure("case", contenders, "a", runs=9, clock=clock, warmup=0)
    assert all(row.seconds is not None and row.seconds.median == 2.0 and row.seconds.n == 9 for row in rows)
    rounds = [clock.log[i : i + 3] for i in range(0, 27, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1, "the order never changed"


def test_short_work_is_called_often_enough() -> None:
    clock = FakeClock()
    rows = measure("case", [clock.contender("a", [0.5] * 100)], "", runs=2, clock=clock, warmup=0, shortest=5.0)
    assert len(clock.log) == 1 + 2 * 10
    assert rows[0].seconds is not None and rows[0].seconds.median == pytest.approx(0.5)
    assert rows[0].ratio is None


def test_a_failing_contender_leaves_its_error_and_does_not_stop_the_others() -> None:
    def fails() -> None:
        raise KeyError("warmth")

    clock = FakeClock()
    rows = measure("case", [clock.contender("a", [1.0] * 9), Contender("b", fails)], "a", 3, clock, warmup=1)
    assert rows[0].seconds is not None and not rows[0].error
    assert rows[1].seconds is None and rows[1].error == "KeyError: 'warmth'"


def test_a_failing_baseline_leaves_seconds_without_ratios() -> None:
    clock = FakeClock()
    rows = measure("c", [Contender("a", lambda: 1 // 0), clock.contender("b", [1.0] * 9)], "a", 3, clock, warmup=1)
    assert rows[0].error.startswith("ZeroDivisionError")
    assert rows[1].seconds is not None and rows[1].ratio is None


def test_the_collector_is_off_while_timing_and_on_afterwards() -> None:
    states: list[bool] = []
    measure("case", [Contender("a", lambda: states.append(gc.isenabled()))], "", 2, FakeClock(), warmup=0)
    assert states == [False, False] and gc.isenabled()


def test_the_frozen_shapes() -> None:
    """Changing them breaks every comparison with older files: change this test knowingly."""
    full, quick = load_shapes(), load_shapes(quick=True)
    assert (len(full), len(quick)) == (128, 16)
    assert len(set(full)) == len(full)
    assert {s.tokens for s in full} == {1, 4, 16, 64, 256, 1024, 4096, 8192}
    assert {s.rank for s in full} == {8, 16, 32, 64} and {s.traits for s in full} == {1, 2, 4}
    assert {s.gates for s in full} == {"zero", "one-hot", "half", "soft"}
    assert {s.width for s in quick} == {576, 1536}


@pytest.mark.parametrize("gates", ["zero", "one-hot", "half", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_of_the_op_computes_the_same(gates: str, dtype: torch.dtype) -> None:
    settings = OpSettings(dtype, runs=3, shortest=0.0, peaks=False)
    rows = list(measure_op(OpShape(5, 24, 40, 3, 2, gates), settings))
    assert [row.contender for row in rows] == list(contenders_on("cpu"))
    assert not [row.error for row in rows if row.error]
    assert all(row.ratio is not None and row.baseline == LINEAR for row in rows)


def test_a_contender_that_computes_something_else_is_no_contender(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatedwarmth.kernels.bench.op.OPS", {**OPS, "dense": OPS[LINEAR]})
    rows = list(measure_op(OpShape(5, 24, 40, 3, 2, "soft"), OpSettings(runs=3, shortest=0.0, peaks=False)))
    found = {row.contender: row for row in rows}
    assert "differs from the reference" in found["dense"].error and found["dense"].seconds is None
    assert found["loop"].seconds is not None


def test_einsum_needs_more_memory_than_two_products() -> None:
    rows = measure_op(OpShape(64, 32, 64, 4, 4, "soft"), OpSettings(runs=3, shortest=0.0))
    peak = {row.contender: row.peak for row in rows}
    assert peak[LINEAR] == 0
    einsum, dense = peak["einsum"], peak["dense"]
    assert einsum is not None and dense is not None and einsum > dense


def test_live_bytes_counts_each_storage_once() -> None:
    before = live_bytes()
    tensor = torch.zeros(1000)
    view = tensor[10:].view(-1)
    assert live_bytes() - before == 4000
    del tensor, view
    assert live_bytes() == before


def test_peak_bytes_is_the_most_at_one_time() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(250_000)
        first, second = torch.zeros(250_000), torch.zeros(500_000)
        del first, second

    assert peak_bytes(run) == pytest.approx(3_000_000, rel=0.01)
