"""Choose the tile table on a GPU: `python -m gatedwarmth.kernels.tune [--kernel shrink] [--static]`.

Every kernel and shape class is timed at one representative shape with every candidate, and the fastest is written to
`tiles.json`. Without a GPU nothing can be timed; `--static` then rewrites the table that reasoning alone gives.
None of this has been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gatedwarmth.kernels import tiles
from gatedwarmth.kernels.tiles import KERNELS, Tile

TOKENS = {"few": 8, "some": 128, "many": 4096}
WIDTHS = {"narrow": 1024, "mid": 4096, "wide": 14336}
RANKS = {"low": (8, 8), "mid": (32, 32), "high": (64, 64)}
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}


Table = dict[str, dict[str, Tile]]


def candidates(kernel: str, key: str, table: Table) -> Iterator[Tile]:
    """The table's own configuration first, then its neighbours."""
    now = table[kernel][key]
    yield now
    token_edges = (16,) if key.startswith("few") else (16, 32, 64, 128)
    splits = (1, 2, 4, 8, 16, 32) if kernel in ("shrink", "grad_weight") else (1,)
    widths, ranks = (32, 64, 128, 256), sorted({16, now.rank, 2 * now.rank})
    for tokens, rank, width, split, warps, stages in product(token_edges, ranks, widths, splits, (2, 4, 8), (2, 3, 4)):
        tile = Tile(tokens, rank, width, split, warps, stages)
        # 128 accumulators a thread spill; one that is smaller than a thread's share wastes warps.
        area = {"shrink": tokens * rank, "expand": tokens * width, "grad_shrunk": tokens * rank}.get(
            kernel, rank * width
        )
        if tile != now and area <= 128 * 32 * warps and area >= 4 * 32 * warps:
            yield tile


def timed_call(kernel: str, key: str, table: Table, device: str = "cuda") -> Callable[[Tile], Any]:
    """A function that launches a kernel at the representative shape of a class with a given tile.

    An expand is given as many partial sums as the table's shrink of that class makes, so shrink is tuned first.
    """
    from gatedwarmth.kernels import triton_ops

    tokens_class, width_class, rank_class, dtype_class = key.split("/")
    tokens, width, dtype = TOKENS[tokens_class], WIDTHS[width_class], DTYPES[dtype_class]
    ranks = (RANKS[rank_class],)
    rank = sum(ranks[0])

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    x, a, b, gates = random(tokens, width), random(rank, width), random(width, rank), random(tokens, 2)
    raw, split = random(tokens, rank, kind=torch.float32), table["shrink"][key].split
    s = random(split, tokens, rank, kind=torch.float32) if split > 1 else random(tokens, rank)
    calls: dict[str, Callable[[Tile], Any]] = {
        "shrink": lambda tile: triton_ops.shrink(x, a, gates, ranks, save=False, skip=True, tile=tile),
        "expand": lambda tile: triton_ops.expand(s, gates, [b], [x], ranks, split, dtype, tile=tile),
        "grad_shrunk": lambda tile: triton_ops.grad_shrunk([x], [b], raw, gates, ranks, True, tile=tile),
        "grad_weight": lambda tile: triton_ops.grad_weight(raw, [x], gates, ranks, together=False, tile=tile),
    }
    return calls[kernel]


def fastest(kernel: str, key: str, table: Table) -> tuple[Tile, float]:
    """The fastest candidate and its median time, ms; candidates that a card cannot hold are passed over."""
    import triton
    from triton.runtime.errors import OutOfResources

    call = timed_call(kernel, key, table)
    best: tuple[Tile, float] | None = None
    for tile in candidates(kernel, key, table):
        try:
            time = triton.testing.do_bench(lambda tile=tile: call(tile), return_mode="median")
        except OutOfResources:
            continue
        if best is None or time < best[1]:
            best = tile, time
    assert best is not None, "the table's own configuration must run"
    return best


def main() -> None:
    """Read the arguments, tune, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="tune only this one (may be repeated)")
    parser.add_argument("--static", action="store_true", help="write the table of static reasoning instead")
    options = parser.parse_args()
    if options.static:
        tiles.TABLE.write_text(tiles.table_text(tiles.static_table(), tiles.STATIC_ORIGIN), encoding="utf-8")
        return
    if not torch.cuda.is_available():
        sys.exit("tuning times kernels on a GPU, and torch sees none here; --static writes the untimed table")
    table = {kernel: dict(rows) for kernel, rows in tiles.load_table().items()}
    for kernel, key in tiles.all_keys():
        if kernel in (options.kernel or KERNELS):
            tile, time = fastest(kernel, key, table)
            table[kernel][key] = replace(tile)
            print(f"{kernel} {key} {tile} {time:.4f} ms", flush=True)
    origin = (
        f"timed on {torch.cuda.get_device_name()}, torch {torch.__version__}: {', '.join(options.kernel or KERNELS)}"
    )
    tiles.TABLE.write_text(tiles.table_text(table, origin), encoding="utf-8")


if __name__ == "__main__":
    main()
