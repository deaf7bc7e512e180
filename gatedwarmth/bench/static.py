"""`bench static`: what the compiled kernels would use of a GPU; computed from binaries and datasheets, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from rich.table import Table

from gatedwarmth.errors import GatedWarmthError

LABEL = "computed from compiled kernels and datasheet figures; nothing here was measured on a GPU"


def static_rows() -> list[dict[str, Any]]:
    """The rows of `gatedwarmth.kernels.aot.static_report`, ready for JSON.

    Raises
    ------
    GatedWarmthError: Triton is not installed.
    """
    if find_spec("triton") is None:
        raise GatedWarmthError(
            "bench static compiles with Triton, which is not installed: pip install 'gatedwarmth[triton]'"
        )
    from gatedwarmth.kernels.aot import static_report

    return [dataclasses.asdict(row) for row in static_report()]


def static_table(rows: Sequence[dict[str, Any]]) -> Table:
    """A column a field, floats rounded."""
    table = Table(title=LABEL, title_justify="left")
    fields = list(rows[0]) if rows else []
    for name in fields:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in fields))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={number}" for key, number in value.items())
    return str(value)
