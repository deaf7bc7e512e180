"""A router that reads the base's own hidden state at one layer, at the prompt's last token, and the text beside it.

With scope "response" the prompt runs on the bare base, so the state comes from the prefill that the reply needs
anyway. Linear probes: Alain and Bengio, arXiv:1610.01644.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gatedwarmth.data import Message
from gatedwarmth.errors import RouterError
from gatedwarmth.injection import decoder_layers
from gatedwarmth.prefill import first_tensor
from gatedwarmth.router.base import ReadHidden
from gatedwarmth.router.storage import Card, check_array, softmax_to_last, write_router
from gatedwarmth.router.text import TextWeights
from gatedwarmth.templates import pad_left, prompt_of


class ProbeRouter:
    """From the base's hidden state, and optionally the text, to a probability per trait: one logistic regression.

    Parameters
    ----------
    weight: float32 [hidden, traits - 1], relative to the last trait; standardisation and calibration are folded in.
    bias: float32 [traits - 1]. layer: states after this many layers, from 1. base: the base's name, for the reader.
    text: weights of text features, whose logits are added; None for the state alone.
    """

    kind = "probe"

    def __init__(
        self,
        weight: np.ndarray,
        bias: np.ndarray,
        layer: int,
        base: str,
        card: Card,
        text: TextWeights | None = None,
    ) -> None:
        self.layer, self.base, self.card, self.text = layer, base, card, text
        others = len(card.traits) - 1
        self.weight = check_array("weight", weight, (weight.shape[0], others))
        self.bias = check_array("bias", bias, (others,))

    @property
    def traits(self) -> tuple[str, ...]:
        return self.card.traits

    @property
    def hidden_size(self) -> int:
        return int(self.weight.shape[0])

    def probabilities(
        self, conversations: Sequence[Sequence[Message]], read_hidden: ReadHidden | None = None
    ) -> np.ndarray:
        """[n, traits], rows sum to 1.

        Raises
        ------
        RouterError: no base at hand, a base of another hidden size, or a state with NaN or infinity.
        """
        if read_hidden is None:
            raise RouterError("a probe router reads a base's hidden state and cannot decide alone; use a text router")
        state = read_hidden(self.layer).detach().float().cpu().numpy()
        if state.shape != (len(conversations), self.hidden_size):
            raise RouterError(
                f"the probe was trained on {self.base} with hidden size {self.hidden_size}, but this base gave states "
                f"of shape {list(state.shape)} for {len(conversations)} conversations; train a probe on this base"
            )
        if not np.isfinite(state).all():
            raise RouterError(
                f"the base's hidden state at layer {self.layer} holds NaN or infinity; try float32 or bfloat16"
            )
        logits = state.astype(np.float64) @ self.weight + self.bias
        return softmax_to_last(logits + self.text.logits(conversations) if self.text is not None else logits)

    def save(self, folder: str | Path) -> None:
        settings: dict[str, Any] = {"layer": self.layer, "base": self.base, "hidden_size": self.hidden_size}
        tensors = {"weight": self.weight, "bias": self.bias}
        if self.text is not None:
            settings["text"] = self.text.to_json()
            tensors["text_weight"] = self.text.weight
        write_router(Path(folder), self.kind, self.card, settings, tensors)

    def describe(self) -> str:
        return f"{self.card.line(self.kind)}, layer {self.layer} of {self.base}"

    @classmethod
    def from_parts(cls, card: Card, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> ProbeRouter:
        weight = check_array("weight", tensors["weight"], (settings["hidden_size"], len(card.traits) - 1))
        text = None
        if "text" in settings:
            text = TextWeights.from_parts(tensors["text_weight"], settings["text"], card.traits)
        return cls(weight, tensors["bias"], settings["layer"], settings["base"], card, text)


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    batch: int = 16,
) -> np.ndarray:
    """float32 [n, layers, hidden]: the bare base's states at the last token before the assistant header.

    Index k of the second axis is the state after k + 1 layers, before any final norm, as `Prefill.hidden` reads it.
    """
    prompts = [prompt_of(tokenizer, messages) for messages in conversations]
    rows = [prompt.ids[: prompt.response_start] for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        states = _last_states(model, [rows[index] for index in chosen], int(tokenizer.pad_token_id or 0))
        found.update(zip(chosen, states, strict=True))
    return np.stack([found[index] for index in range(len(rows))])


def _last_states(model: nn.Module, rows: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """[batch, layers, hidden] of one batch."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda module, given, output: seen.append(first_tensor(output)[:, -1].float().cpu())
        )
        for layer in decoder_layers(model)
    ]
    device = next(model.parameters()).device
    ids, mask = pad_left(rows, pad)
    try:
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen, dim=1).numpy()
