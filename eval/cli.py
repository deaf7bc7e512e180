"""`gatedwarmth eval run | ls | report | compare`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from gatedwarmth import GatedWarmthModel
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.arms import ARMS
from gatedwarmth.eval.contexts import BELIEFS, CONTEXTS
from gatedwarmth.eval.evaluate import evaluate
from gatedwarmth.eval.report import compare as compare_results
from gatedwarmth.eval.report import print_table, rich_table, write_report
from gatedwarmth.eval.results import Results, analyse
from gatedwarmth.eval.runner import identify
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.tasks import TASKS
from gatedwarmth.files import write_text_atomic
from gatedwarmth.hardware import faster_dtype

app = typer.Typer(no_args_is_help=True, help="Compare arms on tasks, in contexts, with intervals.")


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def run(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model.")],
    out: Annotated[Path, typer.Option(help="Folder for samples and report; an interrupted run there goes on.")],
    arms: Annotated[str, typer.Option(help="Names with commas between, or 'all'; `eval ls` lists them.")] = "all",
    tasks: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    contexts: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    beliefs: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions, and social turns, at most.")] = None,
    limit_turns: Annotated[int | None, typer.Option(min=1, help="Social turns at most, if not as questions.")] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Cases a batch.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a reply, in tokens.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy. 0.8: as in arXiv:2507.21919.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="1: none; small models loop without.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling and of the bootstrap.")] = 0,
    dtype: Annotated[
        Precision | None, typer.Option(help="Of the weights; what this machine is faster in when not given.")
    ] = None,
    scorer: Annotated[str, typer.Option(help="'base', or a causal LM that scores warmth.")] = "base",
) -> None:
    """Run arms on tasks and write results.json, report.md and report.html."""
    settings = EvalSettings(
        arms=_names(arms, tuple(ARMS)),
        tasks=_names(tasks, tuple(TASKS)),
        contexts=_names(contexts, CONTEXTS),
        beliefs=_names(beliefs, BELIEFS),
        split=split,
        limit=limit,
        limit_turns=limit_turns,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        repetition_penalty=repetition_penalty,
        seed=seed,
        scorer=scorer,
    )
    if not model.is_dir():
        raise EvaluationError(f"{model} is no folder; give one that `save_pretrained` or `gatedwarmth demo` wrote")
    # All arms through the same arithmetic: merged weights round otherwise.
    chosen = getattr(torch, dtype.value) if dtype else faster_dtype()
    loaded = GatedWarmthModel.from_pretrained(model, dtype=chosen, merge=False)
    identity = {**identify(model), "dtype": str(chosen).removeprefix("torch.")}
    print_table(evaluate(loaded, out, settings, identity))
    Console().print(f"report: {out / 'report.html'}", highlight=False)


@app.command()
def ls() -> None:
    """List arms, tasks, contexts and beliefs."""
    console = Console(highlight=False)
    console.print("arms", style="bold")
    for arm in ARMS.values():
        console.print(f"  {arm.name:<12} {arm.about}")
    for title, names in (("tasks", tuple(TASKS)), ("contexts", CONTEXTS), ("beliefs", BELIEFS)):
        console.print(title, style="bold")
        console.print(f"  {', '.join(names)}")


@app.command()
def report(out: Annotated[Path, typer.Argument(help="Folder of a finished run.")]) -> None:
    """Analyse the samples of a finished run again and rewrite its report."""
    results = analyse(out)
    write_report(results, out)
    print_table(results)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A run's folder or its results.json.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    out: Annotated[Path | None, typer.Option(help="Write the table there as Markdown.")] = None,
) -> None:
    """Two runs side by side."""
    table = compare_results(Results.load(first), Results.load(second))
    console = Console()
    console.print(f"A: {first}\nB: {second}", highlight=False)
    console.print(rich_table(table, narrow=console.width < 104))
    if out is not None:
        write_text_atomic(out, f"A: {first}\n\nB: {second}\n\n{table.markdown()}\n")


def _names(given: str, every: tuple[str, ...]) -> tuple[str, ...]:
    return every if given == "all" else tuple(name.strip() for name in given.split(",") if name.strip())
