"""Benchmarks of the op alone: the clock, the frozen shapes and the contenders. It imports torch and triton only.

Benchmarks of whole models, of training and of the routers are in `gatedwarmth.bench`.
"""

from gatedwarmth.kernels.bench.measure import (
    Clock,
    Contender,
    CudaClock,
    Measured,
    Summary,
    WallClock,
    clock_for,
    interleave,
    measure,
    summary,
)
from gatedwarmth.kernels.bench.op import OPS, OpSettings, measure_op
from gatedwarmth.kernels.bench.shapes import OpShape, load_shapes

__all__ = [
    "Clock",
    "OPS",
    "Contender",
    "CudaClock",
    "Measured",
    "OpSettings",
    "OpShape",
    "Summary",
    "WallClock",
    "clock_for",
    "interleave",
    "load_shapes",
    "measure",
    "measure_op",
    "summary",
]
