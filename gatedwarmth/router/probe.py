"""A router that reads the base's own hidden states: at the prompt's last token and on average over the user's turn.

With scope "response" the prompt runs on the bare base, so the states come from the prefill that the reply needs
anyway. Probes: Alain and Bengio, arXiv:1610.01644, whose are linear. The mean of the turn beside the last token, more
than one layer, and a hidden layer of the probe's own each made fewer errors on the packaged turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import PreTrainedTokenizerBase

from gatedwarmth.data import Message
from gatedwarmth.errors import RouterError
from gatedwarmth.injection import decoder_layers
from gatedwarmth.prefill import reading
from gatedwarmth.router.base import ReadHidden
from gatedwarmth.router.network import Network
from gatedwarmth.router.storage import Card, softmax_to_last, write_router
from gatedwarmth.router.text import TextWeights
from gatedwarmth.templates import Prompt, pad_left, prompt_of

console = Console(stderr=True)


class ProbeRouter:
    """From the base's hidden states, and optionally the text, to a probability per trait: a small network.

    Parameters
    ----------
    network: from layers · 2 · hidden numbers, in the order of `ReadHidden`, and the text's traits - 1 logits, to
        traits - 1 logits relative to the last trait; standardisation and calibration are folded in.
    layers: states after this many layers, from 1. base: the base's name, for the reader.
    text: weights of text features, whose logits the network takes beside the states; None for the states alone.
    """

    kind = "probe"

    def __init__(
        self,
        network: Network,
        layers: Sequence[int],
        base: str,
        card: Card,
        text: TextWeights | None = None,
    ) -> None:
        self.layers, self.base, self.card, self.text = tuple(layers), base, card, text
        if list(layers) != sorted(set(layers)) or not layers:
            raise RouterError(f"a probe's layers must ascend, as a pass runs through them; found {list(layers)}")
        self.network = Network.of(network.to_tensors(), len(network.in_weight), len(card.traits) - 1)

    @property
    def traits(self) -> tuple[str, ...]:
        return self.card.traits

    @property
    def hidden_size(self) -> int:
        of_text = 0 if self.text is None else len(self.traits) - 1
        return (len(self.network.in_weight) - of_text) // (2 * len(self.layers))

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
        states = read_hidden(self.layers).detach().float().cpu().numpy()
        if states.shape != (len(conversations), len(self.layers), 2, self.hidden_size):
            raise RouterError(
                f"the probe was trained on {self.base} with hidden size {self.hidden_size}, but this base gave states "
                f"of shape {list(states.shape)} for {len(conversations)} conversations; train a probe on this base"
            )
        if not np.isfinite(states).all():
            raise RouterError(
                f"the base's hidden states at layers {self.layers} hold NaN or infinity; try float32 or bfloat16"
            )
        inputs = states.reshape(len(states), -1)
        if self.text is not None:
            inputs = np.hstack([inputs, self.text.logits(conversations)])
        return softmax_to_last(self.network(inputs))

    def save(self, folder: str | Path) -> None:
        settings: dict[str, Any] = {
            "layers": list(self.layers), "base": self.base, "hidden_size": self.hidden_size
        }  # fmt: skip
        tensors = self.network.to_tensors()
        if self.text is not None:
            settings["text"] = self.text.to_json()
            tensors["text_weight"] = self.text.weight
        write_router(Path(folder), self.kind, self.card, settings, tensors)

    def describe(self) -> str:
        return f"{self.card.line(self.kind)}, layers {', '.join(map(str, self.layers))} of {self.base}"

    @classmethod
    def from_parts(cls, card: Card, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> ProbeRouter:
        text, others = None, len(card.traits) - 1
        inputs = len(settings["layers"]) * 2 * settings["hidden_size"]
        if "text" in settings:
            text, inputs = (
                TextWeights.from_parts(tensors["text_weight"], settings["text"], card.traits),
                inputs + others,
            )
        return cls(Network.of(tensors, inputs, others), settings["layers"], settings["base"], card, text)


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    batch: int = 16,
    title: str = "Reading the base's states",
) -> np.ndarray:
    """float32 [n, layers, 2, hidden]: of every layer of the bare base, what `prefill.reading` reads.

    Index k of the second axis is the state after k + 1 layers, before any final norm, as `Prefill.hidden` reads it.
    """
    prompts = [prompt_of(tokenizer, messages) for messages in conversations]
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].response_start)
    found: dict[int, np.ndarray] = {}
    for start in track(range(0, len(order), batch), title, console=console, transient=True):
        chosen = order[start : start + batch]
        states = _states(model, [prompts[index] for index in chosen], int(tokenizer.pad_token_id or 0))
        found.update(zip(chosen, states, strict=True))
    return np.stack([found[index] for index in range(len(prompts))])


def _states(model: nn.Module, prompts: Sequence[Prompt], pad: int) -> np.ndarray:
    """[batch, layers, 2, hidden] of one batch."""
    device = next(model.parameters()).device
    ids, mask = pad_left([prompt.ids[: prompt.response_start] for prompt in prompts], pad)
    starts = [ids.shape[1] - prompt.response_start + prompt.text_start for prompt in prompts]
    with reading(list(decoder_layers(model)), starts) as seen:
        model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
    return torch.stack(seen, dim=1).cpu().numpy()
