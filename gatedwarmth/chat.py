"""A terminal chat that streams, shows the gate of every turn as a bar, and lets a person overrule it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from transformers import TextStreamer

from gatedwarmth.conversation import Conversation
from gatedwarmth.errors import GatedWarmthError, GateError
from gatedwarmth.gates import gates_tensor
from gatedwarmth.model import GatedWarmthModel

HELP = """/gate TRAIT VALUE   hold a trait's gate at a value in [0, 1] from now on; /gate off: the router decides
/undo               drop the last turn    /again   reply to it once more
/save FILE          keep the conversation /load FILE
/help               this                  /quit"""


def gate_bar(gate: float, width: int = 10) -> str:
    """A gate as a bar.

    >>> gate_bar(0.4)
    '████······ 0.40'
    """
    full = round(gate * width)
    return "█" * full + "·" * (width - full) + f" {gate:.2f}"


@dataclass
class Chat:
    """One session at a terminal. read: gives the next line, raises EOFError at the end."""

    model: GatedWarmthModel
    generation: dict[str, Any]
    console: Console = field(default_factory=Console)
    read: Callable[[], str] = field(default=lambda: input("you ▸ "))
    held: dict[str, float] = field(default_factory=dict)
    conversation: Conversation = field(init=False)

    def __post_init__(self) -> None:
        self.conversation = Conversation(self.model, window=True)

    def run(self) -> None:
        """Talk until /quit or the end of input. Ctrl-C stops a reply, not the chat."""
        self.console.print(HELP, style="dim", highlight=False)
        while True:
            try:
                line = self.read().strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                if line:
                    self.handle(line)
            except KeyboardInterrupt:
                self.console.print("(stopped; the turn is dropped)", style="yellow")
            except GatedWarmthError as error:
                self.console.print(str(error), style="red", highlight=False)

    def handle(self, line: str) -> None:
        """One line: a command or a turn."""
        if not line.startswith("/"):
            self._answer(lambda settings: self.conversation.say(line, **settings))
            return
        try:
            command, *arguments = shlex.split(line)
        except ValueError as error:
            raise GateError(f"{line!r} is no command: {error}; /help lists them") from None
        commands: dict[str, Callable[..., None]] = {
            "/gate": self._gate,
            "/undo": self._undo,
            "/again": lambda: self._answer(lambda settings: self.conversation.regenerate(**settings)),
            "/save": lambda path: self.conversation.save(path),
            "/load": self._load,
            "/help": lambda: self.console.print(HELP, style="dim", highlight=False),
        }
        if command not in commands:
            raise GateError(f"unknown command {command}; /help lists them")
        try:
            commands[command](*arguments)
        except TypeError:
            raise GateError(f"{command} does not take {len(arguments)} words; /help shows how it is used") from None

    def _answer(self, speak: Callable[[dict[str, Any]], Any]) -> None:
        streamer = TextStreamer(self.model.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        given = None if self.model.router is not None else {self.model.traits[0]: 1.0}
        with self.model.override(**self.held):
            reply = speak({"gates": given, "streamer": streamer, **self.generation})
        bars = "   ".join(f"{trait} {gate_bar(gate)}" for trait, gate in reply.gates.items())
        held = f"   (held: {', '.join(self.held)})" if self.held else ""
        self.console.print(f"  {bars}{held}", style="cyan", highlight=False)

    def _gate(self, trait: str, value: str | None = None) -> None:
        if trait == "off":
            self.held.clear()
            self.console.print("(the router decides)", style="dim")
            return
        try:
            number = float(value or "")
        except ValueError:
            raise GateError(f"/gate {trait} needs a number in [0, 1], found {value!r}") from None
        gates_tensor({trait: number}, self.model.traits, 1)
        self.held[trait] = number
        self.console.print(f"({trait} held at {number:g})", style="dim", highlight=False)

    def _undo(self) -> None:
        self.conversation.undo()
        self.console.print("(dropped)", style="dim")

    def _load(self, path: str) -> None:
        self.conversation = Conversation.load(path, self.model)
        for message in self.conversation.messages:
            self.console.print(f"{message['role']}: {message['content']}", style="dim", highlight=False)
