"""The base's states of many turns, read in parts of which a kill loses one at most."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import track
from safetensors import safe_open
from safetensors.numpy import save_file

from gatedwarmth.bases import Base
from gatedwarmth.data import Message
from gatedwarmth.router.probe import console, hidden_states

PART = 512  # turns: about two minutes of a 135M base on two CPU cores


def kept_states(base: Base, conversations: Sequence[Sequence[Message]], folder: Path) -> np.ndarray:
    """`hidden_states` of all conversations, with its parts kept in `folder`, which the caller removes.

    A conversation whose messages are there already, read from a base of this name and dtype, is not read again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = [_key(base, conversation) for conversation in conversations]
    kept = _read(folder)
    missing = {key: talk for key, talk in zip(keys, conversations, strict=True) if key not in kept}
    order = sorted(missing, key=lambda key: _characters(missing[key]))
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]
    for number, part in enumerate(parts, start=1):
        title = f"Reading the base's states, part {number} of {len(parts)}"
        states = hidden_states(base.model, base.tokenizer, [missing[key] for key in part], title=title)
        _write(folder, part, states)
        kept.update(zip(part, states, strict=True))
    return np.stack([kept[key] for key in keys])


def _key(base: Base, conversation: Sequence[Message]) -> str:
    seen = json.dumps([base.name, str(base.model.dtype), list(conversation)], ensure_ascii=False)
    return hashlib.sha256(seen.encode()).hexdigest()[:32]


def _write(folder: Path, keys: list[str], states: np.ndarray) -> None:
    path = folder / f"{keys[0]}.safetensors"
    unfinished = path.with_suffix(".unfinished")
    save_file({"states": states}, unfinished, metadata={"keys": " ".join(keys)})
    unfinished.replace(path)


def _read(folder: Path) -> dict[str, np.ndarray]:
    """States by key, of all finished parts."""
    found: dict[str, np.ndarray] = {}
    for path in track(sorted(folder.glob("*.safetensors")), "Kept states", console=console, transient=True):
        with safe_open(path, framework="numpy") as part:
            found.update(zip(part.metadata()["keys"].split(), part.get_tensor("states"), strict=True))
    return found


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(message["content"]) for message in messages)
