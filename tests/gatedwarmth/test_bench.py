"""Benchmarks of whole models on a tiny Llama, their JSON, and comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gatedwarmth import bases
from gatedwarmth.bench import BENCHMARKS, Row, compare, read_results, write_results
from gatedwarmth.bench.cli import app
from gatedwarmth.bench.model import ModelSettings, measure_model
from gatedwarmth.bench.profiling import GATED, ProfileSettings, measure_profile
from gatedwarmth.bench.routers import RouterSettings, measure_router
from gatedwarmth.bench.rows import DTYPES
from gatedwarmth.bench.static import static_table
from gatedwarmth.bench.subjects import BASE, SUBJECTS
from gatedwarmth.bench.training import PEFT, TrainSettings, measure_train, steps_of
from gatedwarmth.errors import DataError, GatedWarmthError


@pytest.fixture
def base(llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> bases.Base:
    return bases.Base(llama, tokenizer, "random", "tiny")


def a_row(**changes: Any) -> Row:
    values: dict[str, Any] = dict(
        benchmark="model", case="prefill", contender="gated", model="tiny", dtype="float32", device="cpu", threads=2,
        processor="a processor", torch="2", n=9, median=1.05, low=1.0, high=1.1, baseline="base", ratio=1.05,
        ratio_low=1.04, ratio_high=1.06,
    )  # fmt: skip
    return Row(**{**values, **changes})


def test_the_registry_names_every_benchmark_and_its_settings() -> None:
    assert list(BENCHMARKS) == ["op", "model", "train", "router", "profile"]
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.summary
        settings = benchmark.settings()
        assert set(settings.dtypes) <= set(DTYPES) and settings.runs >= 9
        json.dumps(dataclasses.asdict(settings))


def test_a_model_benchmark_runs_from_end_to_end(base: bases.Base, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    settings = ModelSettings(runs=3, warmup=1, rank=2, prefill=(4, 16), decode=(1, 2), context=6, steps=2)
    rows = list(measure_model(base, settings, "float32"))
    cases = list(dict.fromkeys(row.case for row in rows))
    assert cases == ["prefill 4×16", "decode, batch 1, after 6 tokens", "decode, batch 2, after 6 tokens"]
    for case in cases:
        assert {row.contender for row in rows if row.case == case} == set(SUBJECTS)
    for row in rows:
        assert (row.model, row.dtype, row.baseline, row.threads) == ("tiny", "float32", BASE, torch.get_num_threads())
        assert row.error or (row.n == 3 and row.median and row.ratio and row.peak is not None), row
    ours = [row for row in rows if row.contender.startswith(("base", "gated"))]
    assert not [row.error for row in ours if row.error]
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    write_results(tmp_path / "rows.json", rows, dataclasses.asdict(settings))
    assert list(read_results(tmp_path / "rows.json").rows) == rows


def test_held_memory_of_a_gated_model_is_its_adapters(base: bases.Base) -> None:
    settings = ModelSettings(
        runs=3, rank=2, prefill=(2, 8), decode=(), contenders=("gated, a gate per row", "PEFT, one adapter")
    )
    rows = {row.contender: row for row in measure_model(base, settings, "float32")}
    gated = rows["gated, a gate per row"]
    adapters = int(gated.note.split()[-2])
    assert gated.held is not None and adapters <= gated.held
    assert rows[BASE].held == 0
    one = rows["PEFT, one adapter"].held
    assert one is not None and one == pytest.approx(adapters / 2, abs=4096)


def test_an_unknown_contender_or_dtype_is_refused() -> None:
    with pytest.raises(GatedWarmthError, match="unknown contender 'peft'"):
        ModelSettings(contenders=("peft",))
    with pytest.raises(GatedWarmthError, match="unknown dtype 'int4'"):
        next(BENCHMARKS["model"].run(ModelSettings(dtypes=("int4",))))


def test_training_steps_of_gated_and_peft_are_the_same_computation(base: bases.Base) -> None:
    """Equal losses while both train: the times are of equal work."""
    settings = TrainSettings(rank=4, batch=2, tokens=12, prompt=5, lr=1e-2)
    steps = steps_of(base, settings)
    for _ in range(4):
        for step in steps.values():
            step()
    peft, gated = steps[PEFT].losses, steps["gated, one trait"].losses
    torch.testing.assert_close(torch.stack(gated), torch.stack(peft), rtol=1e-3, atol=1e-4)
    assert peft[-1] < peft[0]
    assert all(step.losses[-1] < step.losses[0] for step in steps.values())


def test_a_training_benchmark_runs(base: bases.Base) -> None:
    rows = list(measure_train(base, TrainSettings(runs=3, warmup=1, rank=4, batch=2, tokens=12, prompt=5), "float32"))
    assert [row.contender for row in rows][0] == PEFT and len(rows) == 4
    assert all(row.ratio and row.peak is not None and not row.error for row in rows)


def test_a_router_benchmark_runs_and_leaves_the_base_alone(base: bases.Base) -> None:
    before = list(base.model.state_dict())
    settings = RouterSettings(runs=3, warmup=1, rank=2, lengths=(64,))
    rows = list(measure_router(base, ["How are you?", "What is 2 + 2?"], settings, "float32"))
    assert not [row.error for row in rows if row.error]
    found = {(row.case, row.contender): row for row in rows}
    assert found["one decision", "text"].ratio is None
    rides = {row.contender: row for row in rows if row.case.startswith("prefill")}
    assert set(rides) == {"no router", "text", "probe"} and rides["probe"].ratio
    assert list(base.model.state_dict()) == before


def test_a_profile_counts_the_products_that_gating_adds(base: bases.Base) -> None:
    settings = ProfileSettings(runs=3, rank=2, prefill=(4, 32), decode=(2,), context=6, steps=2, share=0.0)
    rows = list(measure_profile(base, settings, "float32"))
    cases = list(dict.fromkeys(row.case for row in rows))
    assert len(cases) == 2 and all(case.endswith(GATED) for case in cases)
    layers, hidden = base.model.config.num_hidden_layers, base.model.config.hidden_size
    prefill = {row.contender: row for row in rows if row.case == cases[0]}
    shrink = prefill[f"mm 128×{hidden} · {hidden}×12"]  # q, k, v: two traits of rank 2 each
    assert shrink.note == f"{layers} calls; base 0 ms, 0 calls" and shrink.ratio is None and shrink.median
    expands = [row for name, row in prefill.items() if name.startswith("addmm_")]
    assert sum(int(row.note.split()[0]) for row in expands) == 7 * layers
    whole = prefill["all operators"].median
    parts = sum(row.median or 0.0 for name, row in prefill.items() if name != "all operators")
    assert whole and parts == pytest.approx(whole, rel=0.5)  # medians do not add up exactly


def test_a_profile_of_a_gpu_is_refused() -> None:
    with pytest.raises(GatedWarmthError, match="found device 'cuda'"):
        ProfileSettings(device="cuda")


@pytest.mark.parametrize("contender", ["nope", "base"])
def test_a_profile_of_nothing_beside_the_base_is_refused(contender: str) -> None:
    with pytest.raises(GatedWarmthError, match=contender):
        ProfileSettings(contender=contender)


def test_results_survive_json(tmp_path: Path) -> None:
    rows = [
        a_row(),
        a_row(contender="X-LoRA", n=0, median=None, low=None, high=None, ratio=None, error="KeyError: 'a'"),
    ]
    path = tmp_path / "rows.json"
    write_results(path, rows, {"runs": 9})
    results = read_results(path)
    assert list(results.rows) == rows and results.settings == {"runs": 9} and results.versions["torch"]
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ('{"schema": 99}', "schema 99"),
        ("{}", "no benchmark results"),
        ('{"schema": 1, "rows": [{}]}', "no benchmark results"),
    ],
)
def test_broken_results_say_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_results(path)


def test_comparison_needs_quartiles_apart() -> None:
    def verdict(**changes: Any) -> str:
        return compare([a_row()], [a_row(**changes)])[0].verdict

    assert verdict(ratio=1.055, ratio_low=1.045, ratio_high=1.07) == "same"
    assert verdict(ratio=1.2, ratio_low=1.1, ratio_high=1.3) == "slower"
    assert verdict(ratio=1.0, ratio_low=0.99, ratio_high=1.01) == "faster"
    assert verdict(median=99.0, low=98.0, high=100.0) == "same", "ratios count, not another machine's seconds"
    assert verdict(n=0, median=None, ratio=None, error="RuntimeError") == "failed"
    assert compare([a_row()], [a_row(ratio=1.26, ratio_low=1.2, ratio_high=1.3)])[0].change == pytest.approx(1.2)


def test_comparison_of_baselines_and_of_rows_that_come_and_go() -> None:
    old, new = a_row(contender="base", ratio=1.0), a_row(contender="base", ratio=1.0, median=2.0, low=1.9, high=2.1)
    assert compare([old], [new])[0].verdict == "slower"
    changes = compare([a_row(case="a"), a_row(case="b")], [a_row(case="b"), a_row(case="c")])
    assert [(c.row.case, c.verdict) for c in changes] == [("b", "same"), ("c", "added"), ("a", "gone")]
    broken = a_row(n=0, median=None, ratio=None, error="x")
    assert compare([broken], [a_row()])[0].verdict == "mended"
    assert compare([broken], [broken])[0].verdict == "same"


def test_the_command_line_writes_and_compares(tmp_path: Path) -> None:
    path = tmp_path / "op.json"
    command = ["op", "--quick", "--only", "1×576→1536 r8×2 soft", "--dtypes", "float32", "--runs", "3", "--no-memory"]
    first = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--out", str(path)], catch_exceptions=False)
    assert first.exit_code == 0 and "einsum" in first.output
    assert {row.contender for row in read_results(path).rows} >= {"linear", "dense", "reference", "loop", "einsum"}
    second = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--compare", str(path)], catch_exceptions=False)
    assert second.exit_code == 0 and "against the older run" in second.output


def test_the_command_line_refuses_an_unknown_shape_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GatedWarmthError, match="no shape's name contains"):
        CliRunner().invoke(app, ["op", "--only", "7×7"], catch_exceptions=False)
    with pytest.raises(DataError, match="cannot be read"):
        CliRunner().invoke(app, ["op", "--compare", str(tmp_path / "none.json")], catch_exceptions=False)


def test_the_static_table_shows_fields_as_columns() -> None:
    table = static_table([{"kernel": "shrink", "tile": {"tokens": 16}, "roofline_us": 1.23456}])
    assert [column.header for column in table.columns] == ["kernel", "tile", "roofline_us"]
    assert table.title and "nothing here was measured on a GPU" in str(table.title)
