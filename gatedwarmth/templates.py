"""From messages to token ids, and where in them the reply and the last user turn begin."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gatedwarmth.data import Message
from gatedwarmth.errors import ConversationError

log = logging.getLogger("gatedwarmth")
ROLES = ("system", "user", "assistant")
# For bases without a chat template of their own (GPT-2 and other pretrained models).
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a conversation with the assistant header at its end.

    turn_start: index of the first token that belongs to the last user turn (its header included, and in the first turn
        a system prompt that the template adds of its own).
    text_start: index of the first token of the last user turn's own text; never 0, whose state is an attention sink,
        thousands of times as large as the others' (arXiv:2402.17762).
    response_start: index of the first token of the assistant header; len(ids) where the template has none.
    """

    ids: list[int]
    turn_start: int
    text_start: int
    response_start: int


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], header: bool = True) -> list[int]:
    """Token ids of `messages` in the base's chat template; with `header`, ready for the assistant to speak."""
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    ids: Any = tokenizer.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in messages],
        add_generation_prompt=header,
        tokenize=True,
        return_dict=False,
        chat_template=template,
    )
    return [int(i) for i in ids]


def prompt_of(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Prompt:
    """Render a conversation that ends with a user turn.

    Raises
    ------
    ConversationError: no messages, an unknown role, an empty turn, or a last message that is not the user's.
    """
    check_messages(messages)
    ids = render(tokenizer, messages)
    response = shared_prefix(ids, render(tokenizer, messages, header=False))
    before = render(tokenizer, messages[:-1], header=False) if len(messages) > 1 else []
    text = response - _text_length(tokenizer, messages[-1])
    return Prompt(ids, min(shared_prefix(ids, before), response), min(max(text, 1), response - 1), response)


def _text_length(tokenizer: PreTrainedTokenizerBase, message: Message) -> int:
    """Tokens of a message from its first own one to the end of its turn: where two texts' renderings part."""
    other = "B" if str(message["content"]).lstrip().startswith("A") else "A"
    rendered = render(tokenizer, [message], header=False)
    return len(rendered) - shared_prefix(rendered, render(tokenizer, [{**message, "content": other}], header=False))


def check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ConversationError("the conversation is empty; give at least one user message")
    if isinstance(messages, str):
        raise ConversationError("a conversation is a list of messages; write [{'role': 'user', 'content': …}]")
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ConversationError(f"message {index} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
        empty = not str(message.get("content") or "").strip() and message["role"] != "assistant"  # a reply may be empty
        if not isinstance(message.get("content"), str) or empty:
            raise ConversationError(f"message {index} ({message['role']}) is empty; every turn needs a text")
    if messages[-1]["role"] != "user":
        raise ConversationError(
            f"the last message is the {messages[-1]['role']}'s; a reply needs a user turn to answer"
        )


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix.

    >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids → input_ids, attention_mask, both int64 [batch, longest], padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask
