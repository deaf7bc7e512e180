"""Compile every kernel ahead of time, without a GPU, and read what it would use of one.

`python -m gatedwarmth.kernels.aot` prints a line for each launch of the tile table and target. Registers, stack and
spills come from the compiled binary (cuobjdump on NVIDIA, the assembly's metadata on AMD), instructions from PTX or
amdgcn.
Times in `static_report` are computed from datasheet figures: none is a measurement.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gatedwarmth.kernels import triton_kernels
from gatedwarmth.kernels.tiles import KERNELS, Tile, launch_options, load_table, tile_for

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The most shared memory one program may ask for, bytes: A100 and H100 with opt-in, MI300's LDS.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
TRITON_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
LAYERS, ALIGN, TRAITS = 3, 8, 2


@dataclass(frozen=True)
class Launch:
    """One compiled variant: split is the number of partial sums that expand reads (for the others, the tile's)."""

    kernel: str
    tile: Tile
    dtype: torch.dtype
    split: int = 1


@dataclass(frozen=True)
class Resources:
    """What one program of a launch uses on a target; bytes, and registers a thread."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    async_copy: int


@dataclass(frozen=True)
class Card:
    """Datasheet figures: bytes a second, operations a second (a multiply-add is two), bytes a multiprocessor shares."""

    name: str
    target: str
    bandwidth: float
    half_flops: float
    shared: int


CARDS = (
    Card("A100 SXM 80 GB", "sm_80", 2.039e12, 312e12, 164 * 1024),
    Card("H100 SXM", "sm_90", 3.35e12, 989e12, 228 * 1024),
)


@dataclass(frozen=True)
class StaticRow:
    """One kernel at one shape on one card. moved: bytes asked of memory and caches; least: each operand once.

    roofline_us is computed, not measured: the larger of least / bandwidth and the arithmetic at the card's peak.
    """

    kernel: str
    shape: str
    tile: Tile
    card: str
    registers: int
    shared: int
    occupancy: float
    programs: int
    moved: int
    least: int
    roofline_us: float


def launches(dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32)) -> Iterator[Launch]:
    """Every distinct launch that the tile table can lead to."""
    seen: set[Launch] = set()
    for kernel in KERNELS:
        for key, tile in load_table()[kernel].items():
            for dtype in dtypes:
                if (key.endswith("float32")) != (dtype == torch.float32):
                    continue
                splits = {1}
                if kernel == "expand":  # reads what the shrink of as many tokens leaves
                    tokens = key.split("/")[0]
                    rows = load_table()["shrink"].items()
                    splits = {max(t.split for k, t in rows if k.startswith(tokens) and k.endswith(key.split("/")[3]))}
                for launch in (Launch(kernel, tile, dtype, split) for split in splits | {1}):
                    if launch not in seen:
                        seen.add(launch)
                        yield launch


def _arguments(launch: Launch) -> dict[str, Any]:
    """Name → Triton type; a value that is no string is a compile-time constant."""
    t, tile = "*" + TRITON_NAMES[launch.dtype], launch.tile
    gates: dict[str, Any] = {"gates": t, "gates_stride_t": "i32", "gates_stride_e": 1}
    sizes = {"tokens": "i32", "rank": "i32"}
    columns = {"traits": "*i32", "offsets": ("i32",) * (LAYERS + 1)}
    widths = ("i32",) * LAYERS
    many = (t,) * LAYERS
    constants: dict[str, Any] = {"BLOCK_T": tile.tokens, "BLOCK_R": tile.rank, "BLOCK_W": tile.width}
    if launch.kernel == "shrink":
        scaled = None if tile.split > 1 else t
        flags = {"SKIP": True, "STORE_RAW": True, "STORE_SCALED": tile.split == 1, "SPLIT": tile.split}
        named: dict[str, Any] = {"x": t, "a": t, "traits": "*i32", "raw": "*fp32", "scaled": scaled, "width": "i32"}
        return gates | sizes | constants | flags | named | {"x_stride_t": "i32", "x_stride_w": 1}
    if launch.kernel == "expand":
        flags = {"LAYERS": LAYERS, "ALIGN": ALIGN, "SPLIT": launch.split}
        named = {"s": "*fp32" if launch.split > 1 else t, "starts": "*i32", "traits": "i32", "segments": "i32"}
        strides = {"b_strides_w": widths, "b_strides_r": (1,) * LAYERS, "residual_strides_t": widths}
        operands = {"b": many, "residuals": many, "y": many, "widths": widths}
        return gates | sizes | constants | flags | named | strides | operands
    if launch.kernel == "grad_shrunk":
        flags = {"LAYERS": LAYERS, "TRAITS": TRAITS, "SKIP": False}
        named = {"dy": many, "b": many, "raw": "*fp32", "grad_scaled": t, "grad_gates": "*fp32", "widths": widths}
        return gates | sizes | columns | constants | flags | named
    flags = {"LAYERS": LAYERS, "SCALE": True, "SPLIT": tile.split}
    out = ("*fp32",) * LAYERS if tile.split > 1 else many
    named = {"s": "*fp32", "z": many, "out": out, "widths": widths}
    strides = {"z_strides_t": widths, "z_strides_w": (1,) * LAYERS}
    strides |= {"out_strides_r": (1,) * LAYERS, "out_strides_w": widths}
    return gates | sizes | columns | constants | flags | named | strides


# Sizes the tests choose freely; every other integer and pointer is taken to be a multiple of 16, as in real models.
UNALIGNED = ("tokens", "gates_stride_t", "traits", "segments")


def source(launch: Launch) -> ASTSource:
    """The kernel with the types and constants of a launch."""
    function = getattr(triton_kernels, f"{launch.kernel}_kernel")
    arguments = _arguments(launch)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def add(path: tuple[int, ...], name: str, value: Any) -> Any:
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if name not in UNALIGNED or value.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]
        return value

    for i, name in enumerate(function.arg_names):
        value = arguments[name]
        if isinstance(value, tuple):
            signature[name] = tuple(add((i, j), name, part) for j, part in enumerate(value))
        else:
            signature[name] = add((i,), name, value)
    return ASTSource(function, signature, constants, attributes)


@lru_cache(maxsize=1024)
def compile_launch(launch: Launch, target: str) -> Resources:
    """Compile for a target of TARGETS and read what it uses."""
    options = launch_options(launch.kernel, launch.tile, amd=target.startswith("gfx"))
    compiled = triton.compile(source(launch), target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        return _amd_resources(compiled.asm["amdgcn"], compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    usage = _cuobjdump(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"],
        spills=usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_core=ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
        async_copy=len(re.findall(r"cp\.async\.c[ag]", ptx)),
    )


def _cuobjdump(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def _amd_resources(assembly: str, shared: int) -> Resources:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no .{name} in the assembly's metadata"
        return int(found.group(1))

    return Resources(
        registers=field("vgpr_count"),
        stack=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count") + field("sgpr_spill_count"),
        shared=shared,
        tensor_core=assembly.count("v_mfma"),
        async_copy=0,
    )


def problems(launch: Launch, target: str) -> list[str]:
    """What is wrong with a launch on a target; empty where it is as it should be.

    Asynchronous copies belong in the long loops. expand has none to hide: it goes once over a few rank columns.
    """
    used = compile_launch(launch, target)
    found = []
    if used.spills or used.stack:
        found.append(f"{used.spills} bytes or registers of spills, {used.stack} bytes of stack")
    if used.shared > SHARED_LIMIT[target]:
        found.append(f"{used.shared} bytes of shared memory, {SHARED_LIMIT[target]} at most")
    if launch.dtype != torch.float32 and not used.tensor_core:
        found.append("no tensor-core instruction")
    if target.startswith("sm") and launch.kernel != "expand" and not used.async_copy:
        found.append("no asynchronous copy")
    return found


def occupancy(used: Resources, warps: int, card: Card) -> float:
    """Share of a multiprocessor's 64 warps that can be resident (65,536 registers, 32 programs, the shared memory)."""
    registers = -(-used.registers * 32 // 256) * 256 * warps
    by_registers = 65536 // registers
    by_shared = card.shared // (used.shared + 1024)  # the system takes 1 KiB a program
    return min(by_registers, by_shared, 64 // warps, 32) * warps / 64


@dataclass(frozen=True)
class Shape:
    """Layers of one input: widths in and out, tokens, the rank of every trait."""

    tokens: int
    width: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]


MODELS = ((4096, (4096, 1024, 1024)), (4096, (14336, 14336)), (14336, (4096,)), (3584, (18944, 18944)))
SHAPES = tuple(
    Shape(tokens, width, outs, ranks)
    for tokens in (1, 16, 64, 256, 1024, 8192)
    for width, outs in MODELS
    for ranks in ((8, 8), (32, 32))
)


def static_report(shapes: Sequence[Shape] = SHAPES) -> list[StaticRow]:
    """Shrink and expand in bfloat16 at every shape on every card of CARDS. Computed, not measured."""
    return [row for shape in shapes for card in CARDS for row in (_shrink_row(shape, card), _expand_row(shape, card))]


def _shrink_row(shape: Shape, card: Card) -> StaticRow:
    rank = sum(shape.ranks) * len(shape.outs)
    tile = tile_for("shrink", shape.tokens, shape.width, rank, torch.bfloat16)
    token_tiles, column_tiles = triton.cdiv(shape.tokens, tile.tokens), triton.cdiv(rank, tile.rank)
    x, a, s = 2 * shape.tokens * shape.width, 2 * rank * shape.width, shape.tokens * rank
    moved = x * column_tiles + a * token_tiles + (2 if tile.split == 1 else 4 * tile.split) * s
    flops = 2 * shape.tokens * shape.width * rank
    launch = Launch("shrink", tile, torch.bfloat16)
    return _row(launch, shape, card, token_tiles * column_tiles * tile.split, moved, x + a + 2 * s, flops)


def _expand_row(shape: Shape, card: Card) -> StaticRow:
    rank = sum(shape.ranks)
    split = tile_for("shrink", shape.tokens, shape.width, rank * len(shape.outs), torch.bfloat16).split
    tile = tile_for("expand", shape.tokens, max(shape.outs), rank, torch.bfloat16)
    token_tiles = triton.cdiv(shape.tokens, tile.tokens)
    out_tiles = sum(triton.cdiv(out, tile.width) for out in shape.outs)
    s, b, y = shape.tokens * rank, 2 * rank * sum(shape.outs), 2 * shape.tokens * sum(shape.outs)
    moved = (2 if split == 1 else 4 * split) * s * out_tiles + b * token_tiles + 2 * y
    flops = 2 * shape.tokens * rank * sum(shape.outs)
    least = 2 * s * len(shape.outs) + b + 2 * y
    return _row(
        Launch("expand", tile, torch.bfloat16, split), shape, card, token_tiles * out_tiles, moved, least, flops
    )


def _row(launch: Launch, shape: Shape, card: Card, programs: int, moved: int, least: int, flops: int) -> StaticRow:
    used = compile_launch(launch, card.target)
    return StaticRow(
        kernel=launch.kernel,
        shape=f"{shape.tokens}×{shape.width}→{'/'.join(map(str, shape.outs))} r{'+'.join(map(str, shape.ranks))}",
        tile=launch.tile,
        card=card.name,
        registers=used.registers,
        shared=used.shared,
        occupancy=occupancy(used, launch.tile.warps, card),
        programs=programs,
        moved=moved,
        least=least,
        roofline_us=1e6 * max(least / card.bandwidth, flops / card.half_flops),
    )


def main() -> None:
    """Print every launch's resources on every target, and what is wrong with it."""
    for launch in launches():
        for target in TARGETS:
            found = problems(launch, target)
            print(target, launch, compile_launch(launch, target), *(found or ["ok"]), sep="  ", flush=True)


if __name__ == "__main__":
    main()
