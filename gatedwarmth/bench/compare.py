"""Two runs of a benchmark side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gatedwarmth.bench.rows import Row

Verdict = Literal["faster", "slower", "same", "failed", "mended", "added", "gone"]


@dataclass(frozen=True)
class Change:
    """What became of one row.

    change: new figure over old, of the ratio to the baseline where there is one, else of the seconds.
    verdict: "faster" or "slower" only where the two quartile ranges do not meet.
    """

    old: Row | None
    new: Row | None
    change: float | None
    verdict: Verdict

    @property
    def row(self) -> Row:
        """The new row, or the old one where it is gone."""
        found = self.new or self.old
        assert found is not None
        return found


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """A change for every row of either run, in the order of the new one, what is gone at the end.

    Ratios are compared rather than seconds: they survive another processor. A baseline's own row, whose ratio is 1,
    is compared by its seconds.
    """
    before = {row.key: row for row in old}
    after = {row.key: row for row in new}
    changes = [_change(before.get(key), row) for key, row in after.items()]
    return changes + [Change(row, None, None, "gone") for key, row in before.items() if key not in after]


def _change(old: Row | None, new: Row) -> Change:
    if old is None:
        return Change(None, new, None, "added")
    was, now = _figures(old), _figures(new)
    if was is None or now is None:
        verdict: Verdict = "failed" if now is None and was is not None else "mended" if now is not None else "same"
        return Change(old, new, None, verdict)
    if now[0] > was[2]:
        verdict = "slower"
    elif now[2] < was[0]:
        verdict = "faster"
    else:
        verdict = "same"
    return Change(old, new, now[1] / was[1], verdict)


def _figures(row: Row) -> tuple[float, float, float] | None:
    """(low, median, high) of what a row is compared by."""
    by_ratio = row.contender != row.baseline
    if by_ratio and row.ratio is not None and row.ratio_low is not None and row.ratio_high is not None:
        return row.ratio_low, row.ratio, row.ratio_high
    if row.median is None or row.low is None or row.high is None:
        return None
    return row.low, row.median, row.high
