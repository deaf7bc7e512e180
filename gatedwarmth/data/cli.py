"""`gatedwarmth data stats | check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gatedwarmth.data.check import check as check_corpora
from gatedwarmth.data.stats import stats as figures_of
from gatedwarmth.data.stats import table

app = typer.Typer(no_args_is_help=True, help="Figures and checks of the corpora.")

Folder = Annotated[Path | None, typer.Argument(help="Corpora of your own; the packaged ones when not given.")]


@app.command()
def stats(
    folder: Folder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Counts, balance, lengths, vocabulary and agreement."""
    figures = figures_of(folder)
    if as_json:
        typer.echo(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        Console().print(table(figures))


@app.command()
def check(
    folder: Folder = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Local copy of the public sets, to look for overlap with them.")
    ] = None,
    counts: Annotated[
        bool | None, typer.Option(help="Demand the sizes of the packaged corpora; by default only of those.")
    ] = None,
) -> None:
    """Look for everything that should not be in the corpora; exit status 1 when something is."""
    report = check_corpora(folder, data_dir, counts)
    for problem in report.problems:
        typer.echo(str(problem))
    if report.problems:
        typer.echo(f"{len(report.problems)} problems", err=True)
        raise typer.Exit(1)
    typer.echo("No problems. " + "; ".join(f"{name}: {value}" for name, value in report.measured.items()))
