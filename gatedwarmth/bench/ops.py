"""`bench op`: every frozen shape in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gatedwarmth.bench.rows import Row, dtype_of, row_of
from gatedwarmth.errors import GatedWarmthError
from gatedwarmth.kernels.bench import OpSettings, OpShape, load_shapes, measure_op

NAME = "op"


@dataclass(frozen=True)
class OpBenchSettings:
    """quick: the few shapes that a CPU can do. only: keep shapes whose name contains this, such as "16×4096→4096"."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    device: str = "cpu"
    runs: int = 9
    quick: bool = False
    only: str = ""
    peaks: bool = True


def shapes_of(settings: OpBenchSettings) -> list[OpShape]:
    """The frozen shapes that the settings leave.

    Raises
    ------
    GatedWarmthError: none is left.
    """
    shapes = [shape for shape in load_shapes(settings.quick) if settings.only in shape.name]
    if not shapes:
        raise GatedWarmthError(
            f"no shape's name contains {settings.only!r}; names look like {load_shapes(settings.quick)[0].name!r}"
        )
    return shapes


def run_op(settings: OpBenchSettings) -> Iterator[Row]:
    """Rows of every dtype and shape; the model of a row is "op"."""
    for dtype in settings.dtypes:
        inner = OpSettings(dtype_of(dtype), settings.device, settings.runs, peaks=settings.peaks)
        for shape in shapes_of(settings):
            for measured in measure_op(shape, inner):
                yield row_of(NAME, measured, NAME, dtype, settings.device)
