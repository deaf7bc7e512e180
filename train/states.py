"""The base's states of many turns, read in parts of which a kill loses one at most."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from gatedwarmth.bases import Base
from gatedwarmth.data import Message
from gatedwarmth.router.probe import hidden_states

log = logging.getLogger("gatedwarmth")

PART = 512  # turns: about two minutes of a 135M base on two CPU cores


def kept_states(base: Base, conversations: Sequence[Sequence[Message]], folder: Path) -> np.ndarray:
    """`hidden_states` of all conversations, with its parts kept in `folder`, which the caller removes.

    A part is taken from there when the base's name and dtype and every message of it agree.
    """
    order = sorted(range(len(conversations)), key=lambda index: _characters(conversations[index]))
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[int, np.ndarray] = {}
    for number, part in enumerate(parts, start=1):
        title = f"Reading the base's states, part {number} of {len(parts)}"
        found.update(zip(part, _part(base, [conversations[index] for index in part], folder, title), strict=True))
    return np.stack([found[index] for index in range(len(conversations))])


def _part(base: Base, conversations: Sequence[Sequence[Message]], folder: Path, title: str) -> np.ndarray:
    seen = json.dumps([base.name, str(base.model.dtype), list(conversations)], ensure_ascii=False)
    path = folder / f"{hashlib.sha256(seen.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        log.info("%s: already read", title)
        return load_file(path)["states"]
    states = hidden_states(base.model, base.tokenizer, conversations, title=title)
    unfinished = path.with_suffix(".unfinished")
    save_file({"states": states}, unfinished)
    unfinished.replace(path)
    return states


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)
