"""`gatedwarmth bench op | model | train | router | profile | static`."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from gatedwarmth import bases
from gatedwarmth.bench.compare import compare
from gatedwarmth.bench.profiling import GATED
from gatedwarmth.bench.registry import BENCHMARKS
from gatedwarmth.bench.rows import Row, read_results, write_results
from gatedwarmth.bench.static import LABEL, static_rows, static_table
from gatedwarmth.bench.table import changes_table, rows_table
from gatedwarmth.errors import GatedWarmthError
from gatedwarmth.files import write_json_atomic

app = typer.Typer(
    no_args_is_help=True,
    help="Measure the op, the model, training and the router; profile a pass; compute what GPUs would do.",
)

Out = Annotated[Path | None, typer.Option(help="JSON file for the rows; written anew after every row.")]
Compare = Annotated[Path | None, typer.Option("--compare", help="An older JSON file to set the rows against.")]
Dtypes = Annotated[str, typer.Option(help="Names with commas between.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]
Runs = Annotated[int, typer.Option(min=3, help="Interleaved rounds; quartiles need 9 or more.")]
Threads = Annotated[int, typer.Option(min=0, help="Of the CPU; 0 leaves torch's own number.")]
BaseName = Annotated[str, typer.Option("--base", help="Hub name or folder of the base model.")]
TWO = "float32,bfloat16"


@app.command()
def op(
    quick: Annotated[bool, typer.Option("--quick", help="The few small shapes for a CPU.")] = False,
    only: Annotated[str, typer.Option(help="Only shapes whose name contains this.")] = "",
    peaks: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure memory too.")] = True,
    dtypes: Dtypes = TWO,
    device: Device = "cpu",
    runs: Runs = 9,
    threads: Threads = 0,
    out: Out = None,
    compare_with: Compare = None,
) -> None:
    """The op on its own: every path, PEFT's loop, Arrow's einsum, against the bare linear."""
    given = {"quick": quick, "only": only, "peaks": peaks, "runs": runs}
    _run("op", {**given, "dtypes": _names(dtypes), "device": device}, threads, out, compare_with)


@app.command()
def model(
    base: BaseName = bases.DEFAULT,
    contenders: Annotated[str, typer.Option(help="Names with semicolons between; all when not given.")] = "",
    rank: Annotated[int, typer.Option(min=1, help="Of each of the two random adapters.")] = 8,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache before decoding.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps that are timed together.")] = 8,
    peft_autocast: Annotated[
        bool, typer.Option("--peft-autocast", help="Let PEFT keep adapters in float32, its default.")
    ] = False,
    dtypes: Dtypes = TWO,
    device: Device = "cpu",
    runs: Runs = 9,
    threads: Threads = 0,
    out: Out = None,
    compare_with: Compare = None,
) -> None:
    """Prefill and decoding: base, gated, and what PEFT offers, interleaved in one process."""
    given: dict[str, Any] = {"base": base, "rank": rank, "context": context, "steps": steps, "runs": runs}
    if contenders:
        given["contenders"] = tuple(name.strip() for name in contenders.split(";"))
    given |= {"autocast": peft_autocast, "dtypes": _names(dtypes), "device": device}
    _run("model", given, threads, out, compare_with)


@app.command()
def train(
    base: BaseName = bases.DEFAULT,
    rank: Annotated[int, typer.Option(min=2, help="In total; two traits have half of it each.")] = 16,
    batch: Annotated[int, typer.Option(min=1)] = 4,
    tokens: Annotated[int, typer.Option(min=2)] = 128,
    prompt: Annotated[int, typer.Option(min=1, help="Leading tokens that carry no loss.")] = 64,
    dtypes: Dtypes = TWO,
    device: Device = "cpu",
    runs: Runs = 9,
    threads: Threads = 0,
    out: Out = None,
    compare_with: Compare = None,
) -> None:
    """One optimiser step of the gated model against PEFT's with as many parameters."""
    if prompt >= tokens:
        raise GatedWarmthError(f"a prompt of {prompt} tokens leaves none of {tokens} for the reply; lower --prompt")
    given = {"base": base, "rank": rank, "batch": batch, "tokens": tokens, "prompt": prompt, "runs": runs}
    _run("train", {**given, "dtypes": _names(dtypes), "device": device}, threads, out, compare_with)


@app.command()
def router(
    base: BaseName = bases.DEFAULT,
    dtypes: Dtypes = TWO,
    device: Device = "cpu",
    runs: Runs = 9,
    threads: Threads = 0,
    out: Out = None,
    compare_with: Compare = None,
) -> None:
    """Time per decision, and what the probe adds to the prefill that it rides on."""
    given = {"base": base, "runs": runs, "dtypes": _names(dtypes), "device": device}
    _run("router", given, threads, out, compare_with)


@app.command()
def profile(
    base: BaseName = bases.DEFAULT,
    contender: Annotated[str, typer.Option(help="Set beside the base.")] = GATED,
    dtypes: Dtypes = TWO,
    runs: Runs = 9,
    threads: Threads = 0,
    out: Out = None,
    compare_with: Compare = None,
) -> None:
    """Which operators a gated pass spends its time on, beside the base's; on the CPU."""
    given = {"base": base, "contender": contender, "runs": runs, "dtypes": _names(dtypes)}
    _run("profile", given, threads, out, compare_with)


@app.command()
def static(out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None) -> None:
    """For GPUs, without one: registers, occupancy, bytes and roofline times; computed, not measured."""
    rows = static_rows()
    Console().print(static_table(rows))
    if out is not None:
        write_json_atomic(out, {"benchmark": "static", "label": LABEL, "rows": rows})


def _run(name: str, given: dict[str, Any], threads: int, out: Path | None, older: Path | None) -> None:
    """Run a registered benchmark; print each case when it is complete, keep what there is after every row."""
    before = read_results(older) if older is not None else None  # a wrong file must not cost a whole run
    if threads:
        torch.set_num_threads(threads)
    benchmark = BENCHMARKS[name]
    settings = benchmark.settings(**given)
    rows: list[Row] = []
    for _, group in groupby(benchmark.run(settings), key=lambda row: (row.case, row.dtype)):
        case = []
        for row in group:
            rows.append(row)
            case.append(row)
            if out is not None:
                write_results(out, rows, dataclasses.asdict(settings), settings.device)
        Console().print(rows_table(case))
    if before is not None:
        Console().print(changes_table(compare(before.rows, rows)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
