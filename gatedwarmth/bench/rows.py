"""A benchmark's rows and the JSON file that they live in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gatedwarmth.errors import DataError, GatedWarmthError
from gatedwarmth.files import write_json_atomic
from gatedwarmth.hardware import describe
from gatedwarmth.kernels.bench import Measured

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGES = ("gatedwarmth", "torch", "transformers", "peft", "triton")


@dataclass(frozen=True)
class Row:
    """One contender in one case, with all that is needed to read it alone.

    median, low, high: seconds per unit of work and its quartiles; None where the contender failed (`error` says how).
    ratio and its quartiles: to `baseline`, from the interleaved rounds. held, peak: bytes on top of the baseline's.
    """

    benchmark: str
    case: str
    contender: str
    model: str
    dtype: str
    device: str
    threads: int
    processor: str
    torch: str
    n: int
    median: float | None
    low: float | None
    high: float | None
    baseline: str
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    held: int | None = None
    peak: int | None = None
    error: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows comparable; the processor is not part of it, since ratios travel."""
        return (
            self.benchmark,
            self.case,
            self.contender,
            self.model,
            self.dtype,
            self.device.partition(":")[0],
            str(self.threads),
        )


@dataclass(frozen=True)
class Results:
    """One file: where and when it was made, with which settings, and its rows."""

    made: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: tuple[Row, ...] = field(default_factory=tuple)


def row_of(benchmark: str, measured: Measured, model: str, dtype: str, device: str) -> Row:
    """A measurement together with the machine it was made on."""
    seconds, ratio = measured.seconds, measured.ratio
    return Row(
        benchmark=benchmark,
        case=measured.case,
        contender=measured.contender,
        model=model,
        dtype=dtype,
        device=device,
        threads=torch.get_num_threads(),
        processor=str(describe(device)["processor"]),
        torch=str(torch.__version__),
        n=seconds.n if seconds else 0,
        median=seconds.median if seconds else None,
        low=seconds.low if seconds else None,
        high=seconds.high if seconds else None,
        baseline=measured.baseline,
        ratio=ratio.median if ratio else None,
        ratio_low=ratio.low if ratio else None,
        ratio_high=ratio.high if ratio else None,
        held=measured.held,
        peak=measured.peak,
        error=measured.error,
        note=measured.note,
    )


def write_results(path: str | Path, rows: Sequence[Row], settings: Mapping[str, Any], device: str = "cpu") -> None:
    """Write a file that `read_results` reads, whole or not at all."""
    results = Results(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        describe(device),
        _versions(),
        dict(settings),
        tuple(rows),
    )
    write_json_atomic(path, {"schema": SCHEMA, **dataclasses.asdict(results)})


def read_results(path: str | Path) -> Results:
    """Read what `write_results` wrote.

    Raises
    ------
    DataError: no such file, not JSON, another schema, or a row with a field too many or too few.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise DataError(
                path, 0, f"schema {value['schema']!r}, this version reads {SCHEMA}; run the benchmark again"
            )
        rows = tuple(Row(**row) for row in value["rows"])
        return Results(value["made"], value["hardware"], value["versions"], value["settings"], rows)
    except OSError as error:
        raise DataError(path, 0, f"cannot be read ({error}); give a file that `gatedwarmth bench` wrote") from error
    except json.JSONDecodeError as error:
        raise DataError(path, error.lineno, f"not JSON ({error.msg}); run the benchmark again") from error
    except (KeyError, TypeError) as error:
        raise DataError(
            path, 0, f"no benchmark results ({error}); give a file that `gatedwarmth bench` wrote"
        ) from error


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in DTYPES."""
    if name not in DTYPES:
        raise GatedWarmthError(f"unknown dtype {name!r}; the dtypes are {', '.join(DTYPES)}")
    return DTYPES[name]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
