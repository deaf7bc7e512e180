"""Which tile configuration a launch takes: a table in `tiles.json`, keyed by kernel and shape class.

A key reads `tokens/width/rank/dtype`, for instance `few/mid/low/half`. `python -m gatedwarmth.kernels.tune` writes the
table; `static_tile` is what it holds until someone has run the tuner on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("tiles.json")
KERNELS = ("shrink", "expand", "grad_shrunk", "grad_weight")
TOKENS = {"few": 16, "some": 256, "many": 1 << 62}
WIDTHS = {"narrow": 1536, "mid": 6144, "wide": 1 << 62}
RANKS = {"low": 16, "mid": 64, "high": 1 << 62}
DTYPES = ("half", "float32")
EXPAND_REGISTERS = 168  # three programs of four warps a multiprocessor
FIELDS = ("tokens", "rank", "width", "split", "warps", "stages")


@dataclass(frozen=True)
class Tile:
    """One launch configuration: tile edges, partial sums (a power of two), warps, pipeline stages."""

    tokens: int
    rank: int
    width: int
    split: int
    warps: int
    stages: int


def shape_class(tokens: int, width: int, rank: int, dtype: torch.dtype) -> str:
    """The key of a shape: `tokens/width/rank/dtype`."""
    kind = "float32" if dtype == torch.float32 else "half"
    return f"{_class(TOKENS, tokens)}/{_class(WIDTHS, width)}/{_class(RANKS, rank)}/{kind}"


def _class(classes: dict[str, int], value: int) -> str:
    return next(name for name, most in classes.items() if value <= most)


def all_keys() -> Iterator[tuple[str, str]]:
    """Every (kernel, key) a table must hold."""
    for kernel, *parts in product(KERNELS, TOKENS, WIDTHS, RANKS, DTYPES):
        yield kernel, "/".join(parts)


@lru_cache(maxsize=4096)
def tile_for(kernel: str, tokens: int, width: int, rank: int, dtype: torch.dtype) -> Tile:
    """The table's configuration for a kernel at a shape (rank: the columns the kernel loops over)."""
    return load_table()[kernel][shape_class(tokens, width, rank, dtype)]


@lru_cache(maxsize=1)
def load_table() -> dict[str, dict[str, Tile]]:
    """kernel → key → Tile."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["tiles"]
    return {kernel: {key: Tile(*row) for key, row in rows.items()} for kernel, rows in table.items()}


def table_text(tiles: dict[str, dict[str, Tile]], origin: str) -> str:
    """The JSON of a table, one configuration a line; origin says how its values were found."""
    header: dict[str, Any] = {
        "origin": origin,
        "key": f"tokens {_limits(TOKENS)} / width {_limits(WIDTHS)} / rank {_limits(RANKS)} / dtype {DTYPES}",
        "fields": FIELDS,
    }
    lines = ["{"] + [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in header.items()] + [' "tiles": {']
    for i, (kernel, rows) in enumerate(tiles.items()):
        body = [f"   {json.dumps(key)}: {json.dumps(astuple(tile))}" for key, tile in rows.items()]
        closing = "  }" if i == len(tiles) - 1 else "  },"
        lines += [f"  {json.dumps(kernel)}: {{", ",\n".join(body), closing]
    return "\n".join([*lines, " }", "}", ""])


def _limits(classes: dict[str, int]) -> str:
    return ", ".join(name if most > 1 << 60 else f"{name} to {most}" for name, most in classes.items())


def launch_options(kernel: str, tile: Tile, amd: bool) -> dict[str, int]:
    """Triton's compile options. On AMD two stages, which is what fits in 64 KiB of shared memory.

    maxnreg caps nothing that expand reaches. Left alone, ptxas rounds its registers down for occupancy and puts 8 to 24
    bytes on the stack (seen in about a tenth of expand's launches, Triton 3.7.1); with any cap it takes what it needs.
    """
    if amd:
        return {"num_warps": tile.warps, "num_stages": min(tile.stages, 2)}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return options | {"maxnreg": EXPAND_REGISTERS} if kernel == "expand" else options


def static_tile(kernel: str, key: str) -> Tile:
    """A configuration from reasoning alone.

    Few tokens: 16-token tiles (the least a tensor core takes) and enough programs, by narrow tiles or partial sums, for
    the 108 to 132 multiprocessors of a card. Many tokens: the accumulator stays at 32 registers a thread, so that it
    does not spill, and all pipeline stages fit in 64 KiB of shared memory. float32 multiplies on the plain cores, where
    large tiles only cost registers.
    """
    tokens, width, rank, dtype = key.split("/")
    if dtype == "float32":
        return _static_float32(kernel, tokens, width, rank)
    columns = 16 if rank == "low" else 32
    split = {"narrow": 4, "mid": 8, "wide": 16}[width]
    if kernel == "shrink":
        if tokens == "few":
            return Tile(16, columns, 128, split, 4, 3)
        if tokens == "some":
            return Tile(32, columns, 128, split // 2, 4, 3)
        return Tile(64, 16 if rank == "low" else 64, 64, 1, 4, 3)
    if kernel == "expand":  # one stage for few tokens: a loop of one or two turns has nothing to overlap
        if tokens == "few":
            return Tile(16, columns, 32, 1, 4, 1)
        return Tile(32, columns, 32, 1, 4, 1) if tokens == "some" else Tile(64, columns, 128, 1, 8, 2)
    if kernel == "grad_shrunk":
        edge = {"few": 16, "some": 32, "many": 64}[tokens]
        return Tile(edge, columns, 64, 1, 4, 3)
    split = {"few": 1, "some": 1, "many": 4}[tokens]
    return Tile(16 if tokens == "few" else 64, columns, 64, split, 4, 2)


def _static_float32(kernel: str, tokens: str, width: str, rank: str) -> Tile:
    edge = 16 if tokens == "few" else 32
    columns = 16 if rank == "low" else 32
    split = 1
    if kernel == "shrink" and tokens != "many":
        split = {"narrow": 2, "mid": 8, "wide": 16 if tokens == "few" else 8}[width]
    if kernel == "grad_weight" and tokens == "many":
        split = 4
    return Tile(edge, columns, 32, split, 4, 1 if kernel == "expand" else 2)


def static_table() -> dict[str, dict[str, Tile]]:
    """`static_tile` for every key."""
    tiles: dict[str, dict[str, Tile]] = {kernel: {} for kernel in KERNELS}
    for kernel, key in all_keys():
        tiles[kernel][key] = static_tile(kernel, key)
    return tiles


STATIC_ORIGIN = (
    "static reasoning (registers, shared memory, number of programs), checked by ahead-of-time compilation; "
    "not tuned on a GPU: run python -m gatedwarmth.kernels.tune on one"
)
