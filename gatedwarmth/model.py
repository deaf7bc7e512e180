"""GatedWarmthModel: any causal language model of transformers with traits that can be gated token by token."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from gatedwarmth import bases, folders
from gatedwarmth.adapters import Adapter, load_adapter
from gatedwarmth.data import Message
from gatedwarmth.decisions import decision_of
from gatedwarmth.errors import GatedWarmthError, GateError, RouterError
from gatedwarmth.gates import SCOPES, GatePlan, GateSchedule, PassGates, Policy, Scope, gates_tensor, policy_from_name
from gatedwarmth.handoff import HandoffWatch
from gatedwarmth.injection import decoder_layers, inject
from gatedwarmth.merging import Merging
from gatedwarmth.prefill import Prefill, reading
from gatedwarmth.router import load_router
from gatedwarmth.router.base import Decision, Router
from gatedwarmth.templates import Prompt, prompt_of

Gates = Mapping[str, float] | Tensor
log = logging.getLogger("gatedwarmth")


@dataclass(frozen=True)
class Reply:
    """A reply, the gates that it was generated with, and the router's decision where one was asked for."""

    text: str
    gates: dict[str, float]
    decision: Decision | None = None


class GatedWarmthModel(nn.Module):
    """A base model, its traits, a router and a policy.

    Parameters
    ----------
    base: from `bases.load`. adapters: trait name → adapter; the order is the order of gate columns.
    router: decides when no gates are given; its traits must be among the adapters.
    policy: from probabilities to gates. scope: "response" gates the assistant header and the reply, "turn" the last
        user turn too.
    merge: whether a reply whose gates stay the same may run on merged weights (`merging`); None for its rule, False
        for never.

    Raises
    ------
    AdapterError: an adapter that does not fit the base. RouterError: a router for other traits.
    """

    def __init__(
        self,
        base: bases.Base,
        adapters: Mapping[str, Adapter],
        router: Router | None = None,
        policy: str | Policy = "soft",
        scope: Scope = "response",
        merge: bool | None = None,
    ) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise GateError(f"unknown scope {scope!r}; the scopes are {', '.join(SCOPES)}")
        self.traits = tuple(adapters)
        self.router = checked_router(router, self.traits)
        self.policy, self.scope = policy_from_name(policy), scope
        self.tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self.base_name, self.source = base.name, base.source
        self.adapter_configs = {name: dict(adapter.config) for name, adapter in adapters.items()}
        if base.name != type(base.model).__name__:  # a model that was never saved has no name
            _report_other_bases(adapters, base.name)
        self.injection = inject(base.model, adapters)
        self.base: PreTrainedModel = base.model
        self.merging = Merging(self.base, self.injection.layers.values(), merge)
        self._hook = self.base.register_forward_pre_hook(self._set_plan, with_kwargs=True)
        self._schedule: GateSchedule | PassGates | None = None
        self._lock = threading.RLock()
        self._overrides: ContextVar[dict[str, float] | None] = ContextVar("overrides", default=None)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | PreTrainedModel | bases.Base,
        adapters: Mapping[str, str | Path | Adapter] | None = None,
        router: str | Path | Router | None = None,
        policy: str | Policy | None = None,
        scope: Scope | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        merge: bool | None = None,
    ) -> GatedWarmthModel:
        """Wrap a base, or load a folder that `save_pretrained` wrote.

        source: a model's name or folder, a loaded model (then give its tokenizer), or a gatedwarmth folder, whose
            adapters, router, policy and scope hold unless given here.
        adapters: trait → PEFT folder, hub name or Adapter. router: a folder, a Router or None.
        """
        if isinstance(source, (str, Path)) and folders.is_model_folder(source):
            saved = folders.read(Path(source))
            adapters = adapters or saved.adapters
            router = router or saved.router
            policy = policy or saved.policy
            scope = scope or saved.scope
            source = saved.base
        base = _as_base(source, tokenizer, dtype, device)
        loaded = {name: a if isinstance(a, Adapter) else load_adapter(a) for name, a in (adapters or {}).items()}
        made = load_router(router) if isinstance(router, (str, Path)) else router
        return cls(base, loaded, made, policy or "soft", scope or "response", merge)

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def config(self) -> Any:
        return self.base.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gates: Gates | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward pass with gates.

        gates: dict, [batch, traits] for every token of this pass, or [batch, tokens, traits]; None is the bare base.
            Differentiable. Everything else goes to the base, whose output comes back.
        """
        shape = input_ids.shape if input_ids is not None else kwargs["inputs_embeds"].shape
        with self._in_force(self._forward_schedule(gates, int(shape[0]), int(shape[1]))):
            return self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gates: Gates | None = None,
        gate_start: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' generate with gates; takes all of its arguments and returns what it returns.

        gates: dict or [batch, traits]; [batch, tokens, traits] gates the prompt's tokens one by one, and the last
            column holds for the reply; None asks the router (by the prompt's text) and the policy.
        gate_start: first gated column of the prompt; by default where the scope says.
        """
        embeds = kwargs.get("inputs_embeds")
        prompt = input_ids if input_ids is not None else embeds
        if prompt is None:
            raise GateError("generate needs input_ids or inputs_embeds")
        batch, length = int(prompt.shape[0]), int(prompt.shape[1])
        later = None
        if gates is None:
            decisions = self.route_many(self._as_conversations(input_ids))
            gates = self._decided(decisions)
            later = self._later(decisions)
        tensor = gates_tensor(self._overridden(gates, batch), self.traits, batch, length).to(self.device)
        if tensor.dim() == 3:
            schedule = GateSchedule(tensor[:, -1], prompt=tensor)
        else:
            schedule = GateSchedule(tensor, start=self._start(input_ids, length, gate_start), later=later)
        return self.generate_with(schedule, length, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def chat(self, messages: Sequence[Message], gates: Gates | None = None, **generation: Any) -> Reply:
        """Reply to a conversation. gates: None asks the router. generation: as for transformers' generate."""
        return self.chat_many([messages], gates, **generation)[0]

    @torch.no_grad()
    def chat_many(
        self, conversations: Sequence[Sequence[Message]], gates: Gates | None = None, **generation: Any
    ) -> list[Reply]:
        """One reply per conversation, as one batch. gates: dict, [batch, traits], or None for the router."""
        prompts = [prompt_of(self.tokenizer, messages) for messages in conversations]
        prefill = Prefill(self, prompts)
        decisions: list[Decision | None] = [None] * len(prompts)
        later = None
        if gates is None:
            decided = self._route(conversations, prefill)
            gates, later, decisions = self._decided(decided), self._later(decided), list(decided)
        rows = gates_tensor(self._overridden(gates, len(prompts)), self.traits, len(prompts)).to(self.device)
        schedule = self._schedule_for(prompts, rows, prefill, later)
        settings = {"max_new_tokens": 256, **generation}
        ids = self.generate_with(schedule, prefill.length, **prefill.inputs(), **settings)
        texts = self.tokenizer.batch_decode(ids[:, prefill.length :], skip_special_tokens=True)
        named = [dict(zip(self.traits, row, strict=True)) for row in rows.tolist()]
        return [Reply(t.strip(), g, d) for t, g, d in zip(texts, named, decisions, strict=True)]

    def route(self, messages: Sequence[Message]) -> Decision:
        """The router's decision for the last turn of a conversation."""
        return self.route_many([messages])[0]

    @torch.no_grad()
    def route_many(self, conversations: Sequence[Sequence[Message]]) -> list[Decision]:
        prompts = [prompt_of(self.tokenizer, messages) for messages in conversations]
        return self._route(conversations, Prefill(self, prompts))

    @contextmanager
    def override(self, **gates: float) -> Iterator[None]:
        """A person's word beats the router: inside the block these traits have these gates, in this thread."""
        gates_tensor(gates, self.traits, 1)
        token = self._overrides.set({**(self._overrides.get() or {}), **gates})
        try:
            yield
        finally:
            self._overrides.reset(token)

    @contextmanager
    def gates_in_force(self, gates: Gates, batch: int = 1, start: int = 0) -> Iterator[None]:
        """For a generation loop of one's own: inside the block every pass of `model.base` runs under these gates.

        gates: dict or [batch, traits]; each row also serves its beams. start: the first column that is gated; those
        before it, a prompt's, run on the bare base. As in `generate`, a stretch may be merged: the base's parameters
        are its own again only after the block.
        """
        rows = gates_tensor(self._overridden(gates, batch), self.traits, batch).to(self.device)
        with self._in_force(GateSchedule(rows, start)):
            yield

    @torch.no_grad()
    def generate_with(self, schedule: GateSchedule, length: int, **kwargs: Any) -> Any:
        """transformers' generate under a schedule of one's own; `length`: columns of the prompt."""
        mask = kwargs.get("attention_mask")
        if mask is not None and kwargs.get("input_ids") is not None:  # a longer mask: only the tokens after a cache
            schedule.offset = max(0, int(mask.shape[1]) - int(kwargs["input_ids"].shape[1]))
        if schedule.later is not None:
            watch = HandoffWatch(schedule, self.policy, self.tokenizer, length)
            watch.check(kwargs)
            kwargs["logits_processor"] = LogitsProcessorList([watch, *kwargs.get("logits_processor", [])])
        if kwargs.get("attention_mask") is None and kwargs.get("input_ids") is not None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        kwargs.setdefault("pad_token_id", self.tokenizer.pad_token_id)
        with self._in_force(schedule):
            base: Any = self.base
            return base.generate(**{key: value for key, value in kwargs.items() if value is not None})

    @torch.no_grad()
    def hidden_after(
        self,
        layers: Sequence[int],
        starts: Sequence[int],
        input_ids: Tensor,
        gates: Tensor | None,
        cache: Any,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """A pass that also returns its states after some layers (from 1): output, [batch, layers, 2, hidden].

        starts: the column of each row from which the mean is taken, see `prefill.reading`.

        Raises
        ------
        RouterError: the base has fewer layers.
        """
        stack = decoder_layers(self.base)
        missing = [layer for layer in layers if not 1 <= layer <= len(stack)]
        if missing:
            raise RouterError(
                f"the router reads layer {missing[0]}, but this base has {len(stack)} layers; train it anew"
            )
        base: Any = self.base
        # Not self(...): a person's override is about the reply, and must not move what the router reads.
        pass_gates = None if gates is None else PassGates(gates.to(self.device))
        with reading([stack[layer - 1] for layer in layers], starts) as seen, self._in_force(pass_gates):
            output = base(input_ids=input_ids, cache=cache, use_cache=True, logits_to_keep=1, **kwargs)
        return output, torch.stack(seen, dim=1)

    def effective(self, gates: Mapping[str, float]) -> dict[str, float]:
        """Gates by trait after a person's overrides, checked.

        Raises
        ------
        GateError: an unknown trait or a value outside [0, 1].
        """
        merged = {**gates, **(self._overrides.get() or {})}
        gates_tensor(merged, self.traits, 1)
        return merged

    def later_gates(self) -> dict[str, float] | None:
        """The gates after the opening of a handoff: the router's last trait alone; None for other policies."""
        if self.policy.kind != "handoff":
            return None
        later = self.effective({self.require_router().traits[-1]: 1.0})
        return {trait: float(later.get(trait, 0.0)) for trait in self.traits}

    def require_router(self) -> Router:
        if self.router is None:
            raise RouterError("this model has no router; give gates, or load one with router=FOLDER")
        return self.router

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """transformers' own, but layers that run again in the backward pass get the gates of their forward pass.

        So passes under different gates may share one backward pass. Always non-reentrant.
        """
        force = self.injection.in_force

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), force.holding(force.plan)

        settings = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False, "context_fn": contexts}
        self.base.gradient_checkpointing_enable(settings)

    def gradient_checkpointing_disable(self) -> None:
        self.base.gradient_checkpointing_disable()

    def unwrap(self) -> PreTrainedModel:
        """The base exactly as it came. The wrapper is of no use afterwards."""
        with self._lock:
            self._hook.remove()
            self.merging.end()
            self.injection.remove(self.base)
            self._schedule, self.injection.in_force.plan = None, None
        return self.base

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> GatedWarmthModel:
        self.merging.end()  # what is moved or cast has to be the base's own weights
        return super()._apply(fn, recurse)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapters, router, policy and scope; the base is named, not copied. Whole or not at all.

        How to run (device, dtype, `merge`) is not saved.
        """
        folders.write(self, Path(folder))

    def push_to_hub(self, repo: str, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to the hub repository `repo`; returns its address. Needs a hub login."""
        return folders.push(self, repo, private)

    def adapter(self, trait: str) -> Adapter:
        """The trait's weights as they are now, with the configuration that it came with."""
        return self.injection.adapter(self.traits.index(trait), self.adapter_configs[trait])

    # --- from here on: how a call's gates reach the layers

    @contextmanager
    def _in_force(self, schedule: GateSchedule | PassGates | None) -> Iterator[None]:
        """One call at a time: a second thread waits, so that it never runs under another's gates."""
        if self.base is not None and not self.injection.layers and self.traits:
            raise GatedWarmthError("this model was unwrapped; wrap its base again with from_pretrained")
        with self._lock:
            before, self._schedule = self._schedule, schedule
            try:
                yield
            finally:
                self._schedule = before
                self.injection.forget()
                self.merging.end()

    def _set_plan(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each pass of the base. The plan stays until the next: checkpointed layers run again in backward."""
        self.injection.in_force.plan = self.merging.follow(self._next_plan(args, kwargs))

    def _next_plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GatePlan | None:
        if self._schedule is None:
            return None
        ids = kwargs.get("input_ids")
        tokens = ids if ids is not None else args[0] if args else kwargs["inputs_embeds"]
        first = cached_columns(kwargs) if self._schedule.needs_first() else 0
        return self._schedule.plan(int(tokens.shape[0]), int(tokens.shape[1]), first)

    def _forward_schedule(self, gates: Gates | None, batch: int, tokens: int) -> PassGates | None:
        if gates is None and not self._overrides.get():
            return None
        given = self._overridden(gates if gates is not None else {}, batch)
        tensor = gates_tensor(given, self.traits, batch, tokens).to(self.device)
        return PassGates(tensor if tensor.dim() == 3 else tensor[:, None])

    def _schedule_for(
        self, prompts: Sequence[Prompt], rows: Tensor, prefill: Prefill, later: Tensor | None
    ) -> GateSchedule:
        starts = [prefill.column(i, p.response_start) for i, p in enumerate(prompts)]
        if self.scope == "turn":
            starts = [prefill.column(i, p.turn_start) for i, p in enumerate(prompts)]
        if len(set(starts)) == 1:
            return GateSchedule(rows, start=min(starts[0], prefill.length - 1), later=later)
        columns = torch.arange(prefill.length, device=rows.device)
        gated = columns[None] >= torch.tensor(starts, device=rows.device)[:, None]
        return GateSchedule(rows, prompt=rows[:, None] * gated[..., None], later=later)

    def _start(self, input_ids: Tensor | None, length: int, given: int | None) -> int:
        """The first gated column of a bare prompt: the assistant header at its end, or its last token."""
        if given is not None or self.scope == "turn" or input_ids is None:
            return given if given is not None else 0 if self.scope == "turn" else length - 1
        sample = prompt_of(self.tokenizer, [{"role": "user", "content": "hi"}])
        header = sample.ids[sample.response_start :]
        if header and length > len(header) and bool((input_ids[:, -len(header) :].cpu() == torch.tensor(header)).all()):
            return length - len(header)
        return length - 1

    def _route(self, conversations: Sequence[Sequence[Message]], prefill: Prefill) -> list[Decision]:
        router = self.require_router()
        table = router.probabilities(conversations, prefill.hidden)
        named = [dict(zip(router.traits, map(float, row), strict=True)) for row in table]
        return [decision_of(p, self.policy, router.describe()) for p in named]

    def _decided(self, decisions: Sequence[Decision]) -> Tensor:
        return torch.tensor([[d.gates.get(trait, 0.0) for trait in self.traits] for d in decisions])

    def _later(self, decisions: Sequence[Decision]) -> Tensor | None:
        later = self.later_gates()
        return None if later is None else gates_tensor(later, self.traits, len(decisions)).to(self.device)

    def _overridden(self, gates: Gates, batch: int) -> Gates:
        override = self._overrides.get()
        if not override:
            return gates
        if isinstance(gates, Mapping):
            return {**gates, **override}
        gates = gates.clone()
        for trait, value in override.items():
            gates[..., self.traits.index(trait)] = value
        return gates

    def _as_conversations(self, input_ids: Tensor | None) -> list[list[Message]]:
        if input_ids is None:
            raise GateError("inputs_embeds have no text for a router to read; give gates")
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return [[{"role": "user", "content": text}] for text in texts]


def _report_other_bases(adapters: Mapping[str, Adapter], name: str) -> None:
    """Warn of adapters trained on a base of another name: equal sizes fit, but may be another model's."""
    for trait, adapter in adapters.items():
        theirs, ours = (n.rstrip("/").rpartition("/")[2].lower() for n in (adapter.base_name, name))
        if theirs and ours and theirs != ours:
            log.warning("adapter %r was trained on %r, this base is %r", trait, adapter.base_name, name)


def cached_columns(kwargs: Mapping[str, Any]) -> int:
    """How many columns the cache among a pass's arguments holds; generate without a cache starts anew every time."""
    cache = kwargs.get("cache")
    cache = cache if cache is not None else kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if cache is not None else 0


def checked_router(router: Router | None, traits: Sequence[str]) -> Router | None:
    """The router, if the traits that it decides about are traits of the model."""
    unknown = [trait for trait in router.traits if trait not in traits] if router is not None else []
    if unknown and router is not None:
        raise RouterError(
            f"the router decides about {list(router.traits)}, but the model's traits are {list(traits)}; "
            "name the adapters alike, or train a router with --traits"
        )
    return router


def _as_base(
    source: str | Path | PreTrainedModel | bases.Base,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> bases.Base:
    if isinstance(source, bases.Base):
        return source
    if isinstance(source, (str, Path)):
        return bases.load(source, dtype, device)
    if tokenizer is None:
        raise GatedWarmthError(
            "a loaded model needs its tokenizer too: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    name = str(source.config._name_or_path or type(source).__name__)
    return bases.Base(source, tokenizer, "a loaded model", name)
