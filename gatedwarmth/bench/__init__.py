"""Benchmarks of whole models, training and routers, their JSON, and the comparison of two runs.

The op alone, and how anything is timed: `gatedwarmth.kernels.bench`.
"""

from gatedwarmth.bench.compare import Change, compare
from gatedwarmth.bench.registry import BENCHMARKS, Benchmark
from gatedwarmth.bench.rows import Results, Row, read_results, write_results

__all__ = ["BENCHMARKS", "Benchmark", "Change", "Results", "Row", "compare", "read_results", "write_results"]
