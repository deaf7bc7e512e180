"""Rows, comparisons and the static report for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from gatedwarmth.bench.compare import Change
from gatedwarmth.bench.rows import Row


def rows_table(rows: Sequence[Row]) -> Table:
    """Median with quartiles, ratio with quartiles, bytes over the baseline."""
    first = rows[0]
    title = f"{first.benchmark} · {first.model} · {first.dtype} · {first.threads} threads · {first.processor}"
    table = Table(title=title, title_justify="left")
    for name in ("case", "contender", "n", "time", "ratio", "held", "peak", "note"):
        table.add_column(name, justify="left" if name in ("case", "contender", "note") else "right", overflow="fold")
    for row in rows:
        ratio = spread(row.ratio, row.ratio_low, row.ratio_high)
        remark = row.error or row.note
        table.add_row(row.case, row.contender, str(row.n), duration(row), ratio, size(row.held), size(row.peak), remark)
    return table


def changes_table(changes: Sequence[Change]) -> Table:
    table = Table(title="against the older run", title_justify="left")
    for name in ("case", "contender", "dtype", "old", "new", "new / old", "verdict"):
        table.add_column(name, overflow="fold")
    for change in changes:
        row = change.row
        factor = f"{change.change:.3f}" if change.change is not None else ""
        table.add_row(
            row.case, row.contender, row.dtype, _figure(change.old), _figure(change.new), factor, change.verdict
        )
    return table


def duration(row: Row) -> str:
    """Median seconds in a unit that reads well, with quartiles.

    >>> unit_of(0.00042)
    (1000000.0, 'µs')
    """
    if row.median is None or row.low is None or row.high is None:
        return "–"
    factor, unit = unit_of(row.median)
    return f"{row.median * factor:.4g} {unit} ({row.low * factor:.4g}–{row.high * factor:.4g})"


def unit_of(seconds: float) -> tuple[float, str]:
    """(factor, unit) in which a number of seconds is at least 1."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return factor, unit
    return 1e6, "µs"


def spread(middle: float | None, low: float | None, high: float | None) -> str:
    if middle is None or low is None or high is None:
        return "–"
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def size(count: int | None) -> str:
    """Bytes in MiB.

    >>> size(3 * 2**20), size(None)
    ('3.00 MiB', '')
    """
    return "" if count is None else f"{count / 2**20:.2f} MiB"


def _figure(row: Row | None) -> str:
    if row is None:
        return ""
    if row.ratio is not None and row.contender != row.baseline:
        return spread(row.ratio, row.ratio_low, row.ratio_high)
    return duration(row)
