"""Routers: from a conversation to the probability of each trait for the reply to its last turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gatedwarmth.errors import RouterError
from gatedwarmth.router.base import Decision, ReadHidden, Router
from gatedwarmth.router.features import TextSettings
from gatedwarmth.router.network import Network
from gatedwarmth.router.probe import ProbeRouter
from gatedwarmth.router.storage import AGAIN, Card, read_router
from gatedwarmth.router.text import TextRouter, TextWeights

KINDS: dict[str, Callable[..., Router]] = {
    TextRouter.kind: TextRouter.from_parts,
    ProbeRouter.kind: ProbeRouter.from_parts,
}

__all__ = [
    "Card",
    "Decision",
    "Network",
    "ProbeRouter",
    "ReadHidden",
    "Router",
    "TextRouter",
    "TextSettings",
    "TextWeights",
    "load_router",
    "save",
]


def load_router(folder: str | Path) -> Router:
    """The router that a folder holds.

    Raises
    ------
    RouterError: not a router's folder, a broken or truncated file, or a kind that this version does not know.
    """
    folder = Path(folder).expanduser()
    saved = read_router(folder)
    if saved.kind not in KINDS:
        raise RouterError(
            f"{folder} holds a router of kind {saved.kind!r}; this version knows {', '.join(KINDS)}; {AGAIN}"
        )
    try:
        make: Callable[..., Router] = KINDS[saved.kind]
        return make(saved.card, saved.settings, saved.tensors)
    except (KeyError, TypeError) as error:
        raise RouterError(f"{folder} lacks or garbles {error}; {AGAIN}") from error


def save(router: Router, folder: str | Path) -> None:
    """Write a router's folder, whole or not at all; `load_router` reads it."""
    router.save(folder)
