"""One prefill for two readers: the router's hidden state and the reply's cache come from the same pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gatedwarmth.errors import RouterError
from gatedwarmth.templates import Prompt, pad_left

if TYPE_CHECKING:
    from gatedwarmth.model import GatedWarmthModel


class Prefill:
    """A batch of prompts, padded on the left, and what has been computed of it so far.

    The columns before the assistant header run on the bare base, so a router may read them and the reply may still
    use their keys and values. With scope "turn" those columns are gated, and nothing computed here is kept.
    """

    def __init__(self, model: GatedWarmthModel, prompts: Sequence[Prompt]) -> None:
        self.model, self.prompts = model, prompts
        pad = model.tokenizer.pad_token_id
        ids, mask = pad_left([prompt.ids for prompt in prompts], int(pad) if pad is not None else 0)
        self.ids, self.mask = ids.to(model.device), mask.to(model.device)
        self.cache: Any = None

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    def column(self, row: int, index: int) -> int:
        """The column of token `index` of a row, behind its padding."""
        return self.length - len(self.prompts[row].ids) + index

    def inputs(self) -> dict[str, Any]:
        """What generate takes."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "cache": self.cache}

    def hidden(self, layers: Sequence[int]) -> Tensor:
        """[batch, layers, 2, hidden]: what `reading` reads of the bare base, up to the assistant header."""
        starts = {self.column(row, prompt.response_start) for row, prompt in enumerate(self.prompts)}
        end = min(starts)
        if len(starts) > 1:
            raise RouterError(
                "the assistant header differs in length between rows; route these conversations one by one"
            )
        reads = [self.column(row, prompt.text_start) for row, prompt in enumerate(self.prompts)]
        output, states = self.model.hidden_after(
            layers, reads, self.ids[:, :end], gates=None, cache=None, attention_mask=self.mask[:, :end]
        )
        if self.model.scope == "response" and end < self.length:
            self.cache = output.cache
        return states


@contextmanager
def reading(layers: Sequence[nn.Module], starts: Sequence[int]) -> Iterator[list[Tensor]]:
    """Inside the block a pass leaves [batch, 2, hidden] of every layer, float32 on the CPU, in the list.

    The state at the pass's last token, and the mean of the states from column `starts[row]` to the last.
    """
    seen: list[Tensor] = []

    def read(module: nn.Module, given: object, output: Any) -> None:
        states = first_tensor(output).float()
        means = torch.stack([row[start:].mean(0) for row, start in zip(states, starts, strict=True)])
        seen.append(torch.stack([states[:, -1], means], dim=1).cpu())  # a base may be spread over several devices

    handles = [layer.register_forward_hook(read) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """A layer's hidden state: older layers return it as the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]
