"""The benchmarks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gatedwarmth.bench import model, ops, profiling, routers, training
from gatedwarmth.bench.rows import Row


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: its settings, a frozen dataclass, and how it runs. Rows come as soon as they are measured."""

    name: str
    summary: str
    settings: type[Any]
    run: Callable[[Any], Iterator[Row]]


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark(ops.NAME, "the gated-LoRA op, ratio to the bare linear", ops.OpBenchSettings, ops.run_op),
            Benchmark(
                model.NAME, "prefill and decoding, ratio to the base model", model.ModelSettings, model.run_model
            ),
            Benchmark(training.NAME, "one optimiser step, ratio to PEFT's", training.TrainSettings, training.run_train),
            Benchmark(
                routers.NAME, "a routing decision, ratio to no router", routers.RouterSettings, routers.run_router
            ),
            Benchmark(
                profiling.NAME,
                "operators of a gated pass beside the base's",
                profiling.ProfileSettings,
                profiling.run_profile,
            ),
        )
    }
)
