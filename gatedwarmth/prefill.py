"""One prefill for two readers: the router's hidden state and the reply's cache come from the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

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

    def hidden(self, layer: int) -> Tensor:
        """[batch, hidden]: the bare base's state after `layer` layers at the last token before the assistant header."""
        starts = {self.column(row, prompt.response_start) for row, prompt in enumerate(self.prompts)}
        end = min(starts)
        if len(starts) > 1:
            raise RouterError(
                "the assistant header differs in length between rows; route these conversations one by one"
            )
        output, state = self.model.hidden_after(
            layer, self.ids[:, :end], gates=None, cache=None, attention_mask=self.mask[:, :end]
        )
        if self.model.scope == "response" and end < self.length:
            self.cache = output.cache
        return state


def first_tensor(output: Any) -> Tensor:
    """A layer's hidden state: older layers return it as the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]
