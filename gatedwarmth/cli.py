"""The console script `gatedwarmth`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from gatedwarmth.errors import GatedWarmthError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_show_locals=False)
train_app = typer.Typer(no_args_is_help=True, help="Train adapters and routers.")
app.add_typer(train_app, name="train")
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"gatedwarmth {version('gatedwarmth')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Warmth and neutral LoRAs on one model, and a router that sets their gates."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes; an interrupted run there goes on.")] = Path(
        "runs/demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="All data and the budget it takes, not ten minutes.")] = False,
    base: Annotated[str, typer.Option(help="Hub name or folder of the base model.")] = DEFAULT_BASE,
) -> None:
    """Train a router and two adapters, compare the arms, write a report, show a conversation."""
    from gatedwarmth.demo import run_demo

    run_demo(out, full, base)


@app.command()
def route(
    model: Annotated[
        Path,
        typer.Argument(help="A model folder, or a folder of a text router. A probe needs its base, which is loaded."),
    ],
    text: Annotated[str, typer.Argument(help="The user's turn.")],
) -> None:
    """Show what the router makes of one turn."""
    from gatedwarmth import GatedWarmthModel, folders
    from gatedwarmth.data import Message
    from gatedwarmth.decisions import decide
    from gatedwarmth.hardware import faster_dtype
    from gatedwarmth.router import TextRouter, load_router
    from gatedwarmth.templates import check_messages

    messages: list[Message] = [{"role": "user", "content": text}]
    check_messages(messages)
    saved = folders.read(model) if folders.is_model_folder(model) else None
    if saved is not None and saved.router and not isinstance(load_router(saved.router), TextRouter):
        decision = GatedWarmthModel.from_pretrained(model, dtype=faster_dtype()).route(messages)  # reads the base
    else:
        decision = decide(
            saved.router if saved and saved.router else model, messages, saved.policy if saved else "soft"
        )
    Console().print(decision.why, highlight=False)
    for trait, gate in decision.gates.items():
        Console().print(f"{trait:>12} {gate:.3f}", highlight=False)


@app.command()
def check(folder: Annotated[Path, typer.Argument(help="A model folder.")]) -> None:
    """Prove that a model folder does what it says; exit code 1 with the line that failed."""
    from gatedwarmth.check import check as run_check

    for proof in run_check(folder):
        Console().print(("ok    " if proof.passed else "FAILED ") + proof.line, highlight=False, soft_wrap=True)
        if not proof.passed:
            raise typer.Exit(1)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0)] = 1.1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
) -> None:
    """Talk to a model and see its gate; /gate overrules the router."""
    from gatedwarmth import GatedWarmthModel, folders
    from gatedwarmth.chat import Chat
    from gatedwarmth.hardware import faster_dtype

    folders.read(folder)  # says what is missing before a base is loaded
    model = GatedWarmthModel.from_pretrained(folder, dtype=faster_dtype(device or "cpu"), device=device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    Chat(model, {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty, **sampling}).run()


@train_app.command("adapter")
def train_adapter_command(
    out: Annotated[Path, typer.Option(help="The adapter's PEFT folder.")],
    style: Annotated[
        str, typer.Option(help="Which reply of each pair: warm, neutral, validating, or your own.")
    ] = "warm",
    base: Annotated[str, typer.Option(help="Hub name or folder of the base model.")] = DEFAULT_BASE,
    pairs: Annotated[
        Path | None, typer.Option(help="A pairs file or folder; the packaged pairs when not given.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="Scaling is alpha / rank.")] = 32.0,
    lr: Annotated[float, typer.Option()] = 1e-3,
    epochs: Annotated[float, typer.Option()] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    scope: Annotated[str, typer.Option(help="response or turn: what the adapter will serve.")] = "response",
    seed: Annotated[int, typer.Option(min=0, help="Of the first weights and the order of the pairs.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
) -> None:
    """Train one trait on pairs; a killed run goes on from its last checkpoint."""
    import torch

    from gatedwarmth import bases
    from gatedwarmth.data import load_pairs
    from gatedwarmth.train.adapter import AdapterSettings, check_styles, train_adapter

    settings = AdapterSettings(
        style,
        rank=rank,
        alpha=alpha,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        scope=scope,  # type: ignore[arg-type]
        seed=seed,
    )
    train, dev = load_pairs("train", path=pairs), load_pairs("dev", path=pairs)
    check_styles([*train, *dev], style)  # says what is missing before a base is loaded
    report = train_adapter(bases.load(base, torch.float32, device), train, out, settings, dev)
    Console().print(
        f"{out}: {report['steps']} steps, dev loss {report['dev_loss_before']} → {report['dev_loss_after']}"
    )


@train_app.command("router")
def train_router_command(
    out: Annotated[Path, typer.Option(help="The router's folder.")],
    kind: Annotated[str, typer.Option(help="text (any base, any engine) or probe (the base's hidden state).")] = "text",
    base: Annotated[str | None, typer.Option(help="Base of a probe, or of a text's word vectors.")] = None,
    turns: Annotated[
        Path | None, typer.Option(help="A turns file or folder; the packaged turns when not given.")
    ] = None,
    traits: Annotated[str, typer.Option(help="Classes, with commas between.")] = "warmth,neutral",
    seed: Annotated[
        int, typer.Option(min=0, help="Of a probe's network; a text router's fit has no chance in it.")
    ] = 0,
) -> None:
    """Train a router, calibrate it, and report it on held-out turns."""
    from gatedwarmth.train.router import train_router

    report = train_router(kind, out, base, turns, tuple(name.strip() for name in traits.split(",")), seed)
    for line in report.lines():
        Console().print(line, highlight=False)


def _mount() -> None:
    """The parts with command lines of their own."""
    from gatedwarmth.bench.cli import app as bench_app
    from gatedwarmth.data.cli import app as data_app
    from gatedwarmth.eval.cli import app as eval_app

    app.add_typer(data_app, name="data")
    app.add_typer(bench_app, name="bench")
    app.add_typer(eval_app, name="eval")


def main() -> None:
    """Run the command line; errors of this package become one line and exit code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    logging.getLogger("gatedwarmth").setLevel(logging.INFO)
    _mount()
    try:
        app()
    except GatedWarmthError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
