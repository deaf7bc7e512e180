"""The Triton path: interpreted in a process of its own, and compiled ahead of time for real targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gatedwarmth.kernels import aot, tiles
from gatedwarmth.kernels.aot import CARDS, TARGETS, Launch, Resources, Shape, compile_launch, launches, problems

HERE = Path(__file__).parent


def interpreted(marker: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / "interpreted.py"),
        "-m",
        marker,
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.timeout(900)  # half a minute of work, but machines are shared
def test_interpreted() -> None:
    interpreted("not slow")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_interpreted_at_all_sizes() -> None:
    interpreted("slow")


def test_one_launch_of_every_kernel_compiles_cleanly() -> None:
    """Many tokens: the largest tiles of the table."""
    for kernel, target in zip(tiles.KERNELS, ("sm_90", "sm_90", "sm_80", "gfx942"), strict=True):
        launch = Launch(kernel, tiles.load_table()[kernel]["many/mid/mid/half"], torch.bfloat16)
        assert problems(launch, target) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_of_the_table_compiles_cleanly(target: str) -> None:
    found = {launch: problems(launch, target) for launch in launches()}
    assert not {launch: what for launch, what in found.items() if what}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_float16_compiles_cleanly(kernel: str) -> None:
    for key in ("few/mid/mid/half", "many/wide/high/half"):
        for target in TARGETS:
            assert problems(Launch(kernel, tiles.load_table()[kernel][key], torch.float16), target) == []


def test_a_tile_that_spills_is_found() -> None:
    """Otherwise a change in cuobjdump's output could make the checks above pass for nothing."""
    huge = tiles.Tile(tokens=128, rank=64, width=256, split=1, warps=4, stages=4)
    assert any("spills" in what for what in problems(Launch("expand", huge, torch.bfloat16), "sm_80"))


def test_the_table_is_complete_and_says_where_it_comes_from() -> None:
    table = tiles.load_table()
    assert {(kernel, key) for kernel, rows in table.items() for key in rows} == set(tiles.all_keys())
    text = tiles.TABLE.read_text(encoding="utf-8")
    assert "not tuned on a GPU" in text
    assert text == tiles.table_text(tiles.static_table(), tiles.STATIC_ORIGIN)


@pytest.mark.parametrize(
    "tokens, width, rank, dtype, key",
    [
        (16, 1536, 16, torch.float16, "few/narrow/low/half"),
        (17, 1537, 17, torch.bfloat16, "some/mid/mid/half"),
        (257, 6145, 65, torch.float32, "many/wide/high/float32"),
    ],
)
def test_shape_classes(tokens: int, width: int, rank: int, dtype: torch.dtype, key: str) -> None:
    assert tiles.shape_class(tokens, width, rank, dtype) == key


def test_static_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token through 4096 → 4096 with two traits of rank 8, counted by hand."""
    used = Resources(registers=64, stack=0, spills=0, shared=20 * 1024, tensor_core=1, async_copy=1)
    monkeypatch.setattr(aot, "compile_launch", lambda launch, target: used)
    rows = aot.static_report([Shape(1, 4096, (4096,), (8, 8))])
    assert [(row.kernel, row.card) for row in rows] == [(k, c.name) for c in CARDS for k in ("shrink", "expand")]
    shrink, expand = rows[:2]
    assert shrink.least == 2 * (4096 + 16 * 4096 + 16)
    assert expand.least == 2 * (16 + 16 * 4096 + 2 * 4096)
    assert shrink.programs == 8 and expand.programs == 128
    assert all(row.moved >= row.least for row in rows)
    assert shrink.roofline_us == pytest.approx(1e6 * shrink.least / 2.039e12)
    assert shrink.occupancy == 7 * 4 / 64  # 164 KiB of shared memory hold seven programs of 21 KiB


def test_tuning_without_a_gpu_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gatedwarmth.kernels.tune"],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE,
    )
    assert done.returncode == 1 and "torch sees none here" in done.stderr


def test_resources_are_read() -> None:
    used = compile_launch(Launch("shrink", tiles.load_table()["shrink"]["few/mid/mid/half"], torch.bfloat16), "sm_90")
    assert 16 <= used.registers <= 255 and used.shared > 0
