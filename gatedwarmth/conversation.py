"""A conversation of many turns over one KV cache, exact while the gate moves.

Every cached token remembers the gates that it was computed with. Before a reply the wanted ids and gates are compared
with the cached ones, and only what follows the longest equal prefix is computed: that covers new turns, edits,
regeneration, and chat templates that rewrite history, with one rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from gatedwarmth.data import Message
from gatedwarmth.decisions import decision_of
from gatedwarmth.errors import ConversationError
from gatedwarmth.files import write_json_atomic
from gatedwarmth.gates import GateSchedule
from gatedwarmth.model import GatedWarmthModel, Reply
from gatedwarmth.router.base import Decision
from gatedwarmth.templates import Prompt, prompt_of, render, shared_prefix

SCHEMA = 1


@dataclass(frozen=True)
class TurnGates:
    """The gates of one reply: `opening` for its first `switch` tokens, `later` after them; switch None: one gate."""

    opening: dict[str, float]
    later: dict[str, float] | None = None
    switch: int | None = None


@dataclass
class Conversation:
    """Messages, the gates of every reply, and one cache for them.

    Parameters
    ----------
    model: the gated model. messages: may begin with a system message.
    window: when the context is full, drop the oldest turns instead of raising; the system message stays.
    """

    model: GatedWarmthModel
    messages: list[Message] = field(default_factory=list)
    replies: list[TurnGates] = field(default_factory=list)
    window: bool = False
    ids: list[int] = field(default_factory=list, repr=False)  # of the cached tokens
    gates: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)  # [cached tokens, traits]
    cache: DynamicCache = field(default_factory=DynamicCache, repr=False)

    def __post_init__(self) -> None:
        if not len(self.gates):
            self.gates = torch.zeros(0, len(self.model.traits))

    def say(self, text: str, gates: Mapping[str, float] | None = None, **generation: Any) -> Reply:
        """Add a user turn and reply to it. gates: None asks the router. generation: as for transformers' generate.

        Raises
        ------
        ConversationError: an empty turn, or no room for it in the context and `window` is off.
        """
        with self._all_or_nothing():
            self.messages.append(Message(role="user", content=text))
            return self._reply(gates, **generation)

    def regenerate(self, gates: Mapping[str, float] | None = None, **generation: Any) -> Reply:
        """Reply to the last user turn again; the old reply is dropped."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ConversationError("there is no reply to regenerate; say something first")
        with self._all_or_nothing():
            self._drop_reply()
            return self._reply(gates, **generation)

    def edit(self, turn: int, text: str, gates: Mapping[str, float] | None = None, **generation: Any) -> Reply:
        """Replace user turn number `turn` (from 0), drop everything after it, and reply anew."""
        places = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if not 0 <= turn < len(places):
            raise ConversationError(f"there is no user turn {turn}; this conversation has {len(places)}")
        with self._all_or_nothing():
            self.messages = self.messages[: places[turn]]
            self.replies = self.replies[: sum(m["role"] == "assistant" for m in self.messages)]
            return self.say(text, gates, **generation)

    def undo(self) -> None:
        """Drop the last user turn and its reply."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self._drop_reply()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise ConversationError("there is no turn to undo")
        self.messages.pop()

    def save(self, path: str | Path) -> None:
        """Write messages and gates as JSON, atomically. The cache is not kept: it is recomputed, exactly."""
        turns = [vars(turn) for turn in self.replies]
        write_json_atomic(path, {"schema": SCHEMA, "messages": self.messages, "replies": turns, "window": self.window})

    @classmethod
    def load(cls, path: str | Path, model: GatedWarmthModel) -> Conversation:
        """Resume a saved conversation; the next reply sees the same gates on every earlier token."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            replies = [TurnGates(**turn) for turn in value["replies"]]
            return cls(
                model,
                [Message(role=m["role"], content=m["content"]) for m in value["messages"]],
                replies,
                bool(value["window"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversationError(f"{path} is no saved conversation ({error}); give a file that save wrote") from None

    def wanted_gates(self, prompt: Prompt, current: TurnGates) -> Tensor:
        """[len(prompt.ids), traits]: the gates that every prompt token should have, the header's included."""
        gates = torch.zeros(len(prompt.ids), len(self.model.traits))
        tokenizer, start, reply = self.model.tokenizer, 0, 0
        for index, message in enumerate(self.messages):
            end = shared_prefix(prompt.ids, render(tokenizer, self.messages[: index + 1], header=False))
            if message["role"] == "assistant":
                self._fill(gates, start, end, self.replies[reply], self.messages[:index])
                reply += 1
            elif message["role"] == "user" and self.model.scope == "turn":
                turn = self.replies[reply] if reply < len(self.replies) else current
                gates[start:end] = self._row(turn.opening)
            start = max(start, end)
        gates[prompt.response_start :] = self._row(current.opening)
        return gates

    # --- one reply

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A reply that fails or is interrupted leaves the conversation as it was."""
        before = list(self.messages), list(self.replies)
        try:
            yield
        except BaseException:
            self.messages, self.replies = before
            raise

    def _reply(self, gates: Mapping[str, float] | None, **generation: Any) -> Reply:
        settings = {"max_new_tokens": 256, **generation}
        prompt = self._fitting(int(settings["max_new_tokens"]))
        decision = None if gates is not None else self._decide(prompt)
        chosen = self.model.effective(decision.gates if decision else gates or {})
        later = self.model.later_gates() if decision else None
        current = TurnGates({t: float(chosen.get(t, 0.0)) for t in self.model.traits}, later)
        wanted = self.wanted_gates(prompt, current)
        self._crop(self._valid(prompt.ids, wanted, len(prompt.ids) - 1))
        schedule = GateSchedule(self._row(current.opening)[None], prompt=wanted[None])
        schedule.later = self._row(later)[None] if later else None
        text, switch = self._generate(prompt, wanted, schedule, settings)
        self.replies.append(TurnGates(current.opening, later, switch) if later else TurnGates(current.opening))
        self.messages.append(Message(role="assistant", content=text))
        return Reply(text, current.opening, decision)

    def _generate(
        self, prompt: Prompt, wanted: Tensor, schedule: GateSchedule, settings: dict[str, Any]
    ) -> tuple[str, int | None]:
        ids = torch.tensor([prompt.ids], device=self.model.device)
        out = self.model.generate_with(
            schedule, len(prompt.ids), input_ids=ids, cache=self.cache, return_dict_in_generate=True, **settings
        )
        self.cache = out.cache
        sequence = out.sequences[0].tolist()
        cached = int(self.cache.get_seq_length())
        switch = schedule.switch_at.get(0)
        generated = self._row_gates(schedule, switch, cached - len(prompt.ids))
        self.ids, self.gates = sequence[:cached], torch.cat([wanted, generated])
        text = str(self.model.tokenizer.decode(sequence[len(prompt.ids) :], skip_special_tokens=True))
        return text.strip(), switch

    def _decide(self, prompt: Prompt) -> Decision:
        router = self.model.require_router()
        row = router.probabilities([self.messages], lambda layers: self._hidden(prompt, layers))[0]
        named = dict(zip(router.traits, map(float, row), strict=True))
        previous = dict(self._probabilities) if self._probabilities else None
        decision = decision_of(named, self.model.policy, router.describe(), previous)
        self._probabilities = decision.probabilities
        return decision

    def _hidden(self, prompt: Prompt, layers: Sequence[int]) -> Tensor:
        """The base's states up to the assistant header, computed on top of the cache and kept in it."""
        nothing = TurnGates(dict.fromkeys(self.model.traits, 0.0))
        wanted = self.wanted_gates(prompt, nothing)
        end = prompt.response_start
        self._crop(self._valid(prompt.ids[:end], wanted[:end], prompt.text_start))
        first = len(self.ids)
        ids = torch.tensor([prompt.ids[first:end]], device=self.model.device)
        with torch.no_grad():
            output, states = self.model.hidden_after(
                layers, [prompt.text_start - first], ids, wanted[None, first:end], self.cache
            )
        self.cache = output.cache
        self.ids, self.gates = prompt.ids[:end], wanted[:end]
        return states

    # --- the cache

    def _valid(self, ids: Sequence[int], wanted: Tensor, most: int) -> int:
        """How many cached tokens have the wanted ids and the wanted gates; at least one is left to compute."""
        length = min(shared_prefix(self.ids, ids), most)
        unlike = (self.gates[:length] != wanted[:length]).any(-1).nonzero()
        return int(unlike[0]) if len(unlike) else length

    def _crop(self, length: int) -> None:
        if length == len(self.ids):
            return
        try:
            self.cache.crop(length)
        except (ValueError, RuntimeError):  # a sliding window has let go of what a shorter prefix would need
            length, self.cache = 0, DynamicCache(config=self.model.config)
        if length == 0 or int(self.cache.get_seq_length()) != length:
            length, self.cache = 0, DynamicCache(config=self.model.config)
        self.ids, self.gates = self.ids[:length], self.gates[:length]

    def _fitting(self, new_tokens: int) -> Prompt:
        prompt = prompt_of(self.model.tokenizer, self.messages)
        most = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)
        while len(prompt.ids) + new_tokens > most:
            if not self.window or not self._drop_oldest():
                raise ConversationError(
                    f"{len(prompt.ids)} tokens and a reply of up to {new_tokens} do not fit into a context of {most}; "
                    "shorten the turn, lower max_new_tokens, or use Conversation(..., window=True) to drop old turns"
                )
            prompt = prompt_of(self.model.tokenizer, self.messages)
        return prompt

    def _drop_oldest(self) -> bool:
        """Forget the oldest exchange; False when only the current turn is left."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first < 3:
            return False
        dropped = self.messages[first : first + 2]
        self.messages = self.messages[:first] + self.messages[first + 2 :]
        self.replies = self.replies[sum(m["role"] == "assistant" for m in dropped) :]
        return True

    def _drop_reply(self) -> None:
        self.messages.pop()
        self.replies.pop()

    # --- gates of tokens

    def _fill(self, gates: Tensor, start: int, end: int, turn: TurnGates, before: Sequence[Message]) -> None:
        gates[start:end] = self._row(turn.opening)
        if turn.later is not None and turn.switch is not None:
            header = len(render(self.model.tokenizer, before)) - start
            gates[start + header + turn.switch : end] = self._row(turn.later)

    def _row_gates(self, schedule: GateSchedule, switch: int | None, count: int) -> Tensor:
        rows = schedule.rows[0].cpu().expand(count, -1).clone()
        if schedule.later is not None and switch is not None:
            rows[switch:] = schedule.later[0].cpu()
        return rows

    def _row(self, gates: Mapping[str, float]) -> Tensor:
        return torch.tensor([float(gates.get(trait, 0.0)) for trait in self.model.traits])

    _probabilities: dict[str, float] = field(default_factory=dict, repr=False)
