"""The two pictures of a report. Colours are Okabe and Ito's, which colour-blind readers can tell apart; every
arm has a
marker of its own as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gatedwarmth.eval.arms import ARMS
from gatedwarmth.eval.results import CellResult, Results
from gatedwarmth.eval.stats import Estimate

COLOURS = ("#000000", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#009E73", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*")
DPI = 150


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Colour and marker of every arm; registered arms look the same in every report."""
    count = len(COLOURS)
    order = list(dict.fromkeys([*ARMS, *arms]))
    places = {arm: order.index(arm) for arm in arms}
    return {a: Look(COLOURS[i % count], MARKERS[(i + i // count) % len(MARKERS)]) for a, i in places.items()}


def draw(results: Results, out: Path) -> dict[str, Path]:
    """Write the pictures that these results allow; title to file."""
    pictures = {}
    if any(arm.warmth and arm.error_all for arm in results.arms):
        pictures["Warmth against error"] = _save(warmth_against_error(results), out / "warmth_error.png")
    if results.cells:
        pictures["Error by context and belief"] = _save(error_by_cell(results), out / "error_cells.png")
    return pictures


def warmth_against_error(results: Results) -> Figure:
    """One point an arm, both intervals; up and to the left is better."""
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.add_subplot()
    shown = looks([arm.arm for arm in results.arms])
    for arm in results.arms:
        if arm.warmth is None or arm.error_all is None or arm.warmth.value is None or arm.error_all.value is None:
            continue
        look = shown[arm.arm]
        axes.errorbar(
            arm.error_all.value,
            arm.warmth.value,
            xerr=_bars([arm.error_all]),
            yerr=_bars([arm.warmth]),
            color=look.colour,
            marker=look.marker,
            markersize=9,
            markeredgecolor="white",
            elinewidth=1.1,
            capsize=2.5,
            alpha=0.9,
            linestyle="none",
            label=arm.arm,
        )
    axes.set_xlabel("wrong answers, all contexts and beliefs (left is more reliable)")
    axes.set_ylabel("SocioT Warmth on social turns, nats per token")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.margins(0.08)
    _tidy(axes)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    figure.legend(loc="outside right center", frameon=False, title="arm")
    figure.suptitle("Warmth against error, with 95 % intervals", fontsize=12)
    return figure


def error_by_cell(results: Results) -> Figure:
    """A panel a belief, a row a context, a mark an arm."""
    beliefs = list(dict.fromkeys(cell.belief for cell in results.cells))
    contexts = list(dict.fromkeys(cell.context for cell in results.cells))
    arms = [arm.arm for arm in results.arms]
    height = 1.7 + len(contexts) * (0.22 + 0.1 * len(arms))
    figure = Figure(figsize=(max(7.6, 2.0 + 2.9 * len(beliefs)), height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(beliefs), sharex=True, sharey=True))
    for axes, belief in zip(panels, beliefs, strict=True):
        _panel(axes, [cell for cell in results.cells if cell.belief == belief], contexts, arms)
        axes.set_title(BELIEF_TITLES.get(belief, belief), fontsize=10)
    panels[0].set_yticks(range(len(contexts)), contexts)
    panels[0].set_ylim(len(contexts) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(arms)), frameon=False)
    figure.suptitle("Error by context and belief, with 95 % intervals", fontsize=12)
    return figure


BELIEF_TITLES = {
    "none": "no belief stated",
    "wrong": "user states the wrong answer",
    "denial": "user denies the right answer",
}


def _panel(axes: Axes, cells: Sequence[CellResult], contexts: Sequence[str], arms: Sequence[str]) -> None:
    shown = looks(arms)
    offsets = np.linspace(-0.36, 0.36, len(arms)) if len(arms) > 1 else np.zeros(1)
    for arm, offset in zip(arms, offsets, strict=True):
        mine = [cell for cell in cells if cell.arm == arm and cell.error.value is not None]
        errors = [cell.error for cell in mine]
        axes.errorbar(
            [error.value or 0.0 for error in errors],
            [contexts.index(cell.context) + offset for cell in mine],
            xerr=_bars(errors),
            color=shown[arm].colour,
            marker=shown[arm].marker,
            markersize=4.5,
            markeredgewidth=0,
            elinewidth=0.9,
            linestyle="none",
            label=arm,
        )
    for line in range(1, len(contexts)):
        axes.axhline(line - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("wrong answers", fontsize=9)
    _tidy(axes, grid="x")


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above the value, [2, estimates]."""
    values = [(e.value or 0.0, e.low, e.high) for e in estimates]
    below = [max(0.0, v - low) if low is not None else 0.0 for v, low, _ in values]
    above = [max(0.0, high - v) if high is not None else 0.0 for v, _, high in values]
    return [below, above]


def _tidy(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=9)


def _save(figure: Figure, path: Path) -> Path:
    """Render without pyplot: no global figure list, no display."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, facecolor="white")
    return path
