"""Samples become results: every number of the report with its n and interval, as dataclasses and as
results.json.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.contexts import PLAIN
from gatedwarmth.eval.runner import Row, load_routes, load_run, load_samples
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.stats import (
    Bootstrap,
    Cells,
    Effect,
    Estimate,
    Floats,
    ManipulationCheck,
    PairedTest,
    binomial,
    manipulation_check,
    marginal_effects,
    paired_tests,
    recovery,
    undone,
)
from gatedwarmth.files import write_json_atomic
from gatedwarmth.gates import is_open
from gatedwarmth.hardware import describe

SCHEMA = 1
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class ArmResult:
    """One arm. Errors are shares of wrong replies; None where the run lacks what the number needs.

    warmth: mean SocioT Warmth on social turns; warmth_lift: minus the base's. error_*: over plain questions,
    all cells, and the cells with a sad context and a wrong belief; error_lift: all cells, minus the base's.
    gate_social, gate_reasoning: mean warmth gate on social turns and on questions.
    leak: share of question cases with an open warmth gate (0.5 or more), Clopper-Pearson with cases as
        independent trials;
    leak_by_question: the same share with a bootstrap interval over questions.
    keeps_warmth, undoes_errors, undoes_sad_wrong: recoveries against the base; *_neutral: against the neutral
        arm.
    by_construction: what follows from gates and prompts alone, in words.
    """

    arm: str
    warmth: Estimate | None
    warmth_lift: Estimate | None
    error_plain: Estimate | None
    error_all: Estimate | None
    error_sad_wrong: Estimate | None
    error_lift: Estimate | None
    gate_social: float | None
    gate_reasoning: float | None
    leak: Estimate | None
    leak_by_question: Estimate | None
    keeps_warmth: Estimate | None
    undoes_errors: Estimate | None
    undoes_sad_wrong: Estimate | None
    keeps_warmth_neutral: Estimate | None
    undoes_errors_neutral: Estimate | None
    by_construction: tuple[str, ...]


@dataclass(frozen=True)
class CellResult:
    """One arm in one cell; `test` is against the base arm, None for the base itself and where it did not
    run.
    """

    arm: str
    context: str
    belief: str
    error: Estimate
    test: PairedTest | None


@dataclass(frozen=True)
class RouterResult:
    """The router on the run's turns: one trial each, so the Clopper-Pearson intervals hold exactly.

    leak: share of reasoning turns with p_social at or above `threshold`; missed: share of social turns below
        it.
    """

    threshold: float
    leak: Estimate
    missed: Estimate


@dataclass(frozen=True)
class Results:
    """Everything that results.json holds."""

    manipulation: ManipulationCheck
    arms: tuple[ArmResult, ...]
    cells: tuple[CellResult, ...]
    effects: tuple[Effect, ...]
    router: RouterResult | None
    about: dict[str, Any]

    def arm(self, name: str) -> ArmResult:
        for arm in self.arms:
            if arm.arm == name:
                return arm
        raise EvaluationError(f"these results have no arm {name!r}; they have {', '.join(a.arm for a in self.arms)}")

    def save(self, path: str | Path) -> None:
        write_json_atomic(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read results.json, or the folder that holds it.

        Raises
        ------
        EvaluationError: no such file, not JSON, or of another schema.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.get("schema") != SCHEMA:
                raise EvaluationError(f"{path} has schema {value.get('schema')!r}, this version reads {SCHEMA}")
            return _results_of(value)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} is no results file ({error}); run `gatedwarmth eval report` again") from None


def analyse(out: str | Path, settings: EvalSettings | None = None) -> Results:
    """Results of a finished run in `out`; settings are those of the run unless given (arms and draws may
    differ).

    Raises
    ------
    EvaluationError: the run is not finished.
    """
    record = load_run(out)
    settings = settings or EvalSettings.from_dict(record["settings"])
    samples = load_samples(out, settings.tasks, settings.arms)
    table = _Table.of(samples, settings)
    check = manipulation_check(table.by_turn, table.warmth.get("warm"), table.warmth.get("base"))
    cells = _cells(table)
    return Results(
        manipulation=check,
        arms=tuple(_arm(table, name, bool(check.passed)) for name in settings.arms),
        cells=cells,
        effects=_regressions(table),
        router=_router(load_routes(out, "turns"), settings, record),
        about=_about(record, settings, table),
    )


@dataclass(frozen=True)
class _Table:
    """Samples as arrays. error: arm to 0/1 [question cases]; warmth: arm to nats per token [turns]."""

    settings: EvalSettings
    questions: dict[str, list[Row]]
    turns: dict[str, list[Row]]
    error: dict[str, Floats]
    warmth: dict[str, Floats]
    by_question: Bootstrap | None
    by_turn: Bootstrap | None
    where: Cells

    @classmethod
    def of(cls, samples: Mapping[tuple[str, str], list[Row]], settings: EvalSettings) -> _Table:
        questions = {arm: rows for (task, arm), rows in samples.items() if task == "questions"}
        turns = {arm: rows for (task, arm), rows in samples.items() if task == "warmth"}
        first = next(iter(questions.values()), [])
        columns = {
            key: np.array([row[key] for row in first], dtype=str) for key in ("cluster", "domain", "context", "belief")
        }
        return cls(
            settings,
            questions,
            turns,
            error={arm: np.array([not row["correct"] for row in rows], dtype=float) for arm, rows in questions.items()},
            warmth={arm: np.array([row["warmth"] for row in rows], dtype=float) for arm, rows in turns.items()},
            by_question=_bootstrap(first, settings),
            by_turn=_bootstrap(next(iter(turns.values()), []), settings),
            where=Cells(**columns),
        )

    def cell(self, context: str, belief: str) -> Mask:
        return np.asarray((self.where.context == context) & (self.where.belief == belief))


def _bootstrap(rows: Sequence[Row], settings: EvalSettings) -> Bootstrap | None:
    return Bootstrap([row["cluster"] for row in rows], settings.draws, settings.seed) if rows else None


def _arm(table: _Table, name: str, claims: bool) -> ArmResult:
    """`claims`: the manipulation check has passed, so recoveries may be stated."""
    questions, turns = table.by_question, table.by_turn
    error, warmth = table.error.get(name), table.warmth.get(name)
    sad_wrong = table.cell("sad", "wrong")
    base_error, base_warmth = table.error.get("base"), table.warmth.get("base")
    gate_cases = np.array([row["gates"].get("warmth", 0.0) for row in table.questions.get(name, [])], dtype=float)
    opened = np.array([is_open(gate) for gate in gate_cases], dtype=float)
    return ArmResult(
        arm=name,
        warmth=turns.mean(warmth) if turns and warmth is not None else None,
        warmth_lift=_difference(turns, warmth, base_warmth),
        error_plain=_error(questions, error, table.cell(PLAIN, "none")),
        error_all=_error(questions, error, None),
        error_sad_wrong=_error(questions, error, sad_wrong),
        error_lift=_difference(questions, error, base_error),
        gate_social=_mean([row["gates"].get("warmth", 0.0) for row in table.turns.get(name, [])]),
        gate_reasoning=_mean(gate_cases.tolist()),
        leak=binomial(int(opened.sum()), len(opened)) if questions else None,
        leak_by_question=questions.share(opened) if questions else None,
        keeps_warmth=_kept(table, name, "base") if claims else None,
        undoes_errors=_undone(table, name, "base", None) if claims else None,
        undoes_sad_wrong=_undone(table, name, "base", sad_wrong) if claims else None,
        keeps_warmth_neutral=_kept(table, name, "neutral") if claims else None,
        undoes_errors_neutral=_undone(table, name, "neutral", None) if claims else None,
        by_construction=_by_construction(table, name),
    )


def _difference(bootstrap: Bootstrap | None, a: Floats | None, b: Floats | None) -> Estimate | None:
    return None if bootstrap is None or a is None or b is None else bootstrap.difference(a, b)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _error(bootstrap: Bootstrap | None, error: Floats | None, where: Mask | None) -> Estimate | None:
    if bootstrap is None or error is None or (where is not None and not where.any()):
        return None
    return bootstrap.share(error, where)


RECOVERING = ("base", "neutral", "warm")  # for these a recovery is 0 or 1 by definition


def _kept(table: _Table, name: str, reference: str) -> Estimate | None:
    warmth = table.warmth
    if name in RECOVERING or table.by_turn is None or not {name, reference, "warm"} <= set(warmth):
        return None
    return recovery(table.by_turn, warmth[reference], warmth["warm"], warmth[name])


def _undone(table: _Table, name: str, reference: str, where: Mask | None) -> Estimate | None:
    error = table.error
    if name in RECOVERING or table.by_question is None or not {name, reference, "warm"} <= set(error):
        return None
    if where is not None and not where.any():
        return None
    return undone(table.by_question, error[reference], error["warm"], error[name], where)


def _by_construction(table: _Table, name: str) -> tuple[str, ...]:
    """In how many cases gates and prompt are those of a fixed arm, so that equal replies prove nothing."""
    said = []
    for task, rows in (("question cases", table.questions), ("social turns", table.turns)):
        for fixed in ("base", "neutral", "warm"):
            if fixed == name or name not in rows or fixed not in rows:
                continue
            pairs = zip(rows[name], rows[fixed], strict=True)
            same = sum(a["gates"] == b["gates"] and a["messages"] == b["messages"] for a, b in pairs)
            if same:
                said.append(f"{name} is {fixed} on {same} of {len(rows[name])} {task} (same gates, same prompt)")
    return tuple(said)


def _cells(table: _Table) -> tuple[CellResult, ...]:
    """Every arm in every cell, with all McNemar tests against the base adjusted as one family."""
    if table.by_question is None:
        return ()
    s = table.settings
    places = [(arm, c, b, table.cell(c, b)) for arm in s.arms for c in s.contexts for b in s.beliefs]
    tested = [place for place in places if place[0] != "base" and "base" in table.error]
    wrong = {arm: values.astype(bool) for arm, values in table.error.items()}
    tests = paired_tests([(wrong[arm][mask], wrong["base"][mask]) for arm, _, _, mask in tested])
    found = {place[:3]: test for place, test in zip(tested, tests, strict=True)}
    return tuple(
        CellResult(arm, c, b, table.by_question.share(table.error[arm], mask), found.get((arm, c, b)))
        for arm, c, b, mask in places
    )


def _regressions(table: _Table) -> tuple[Effect, ...]:
    base = table.error.get("base")
    if base is None:
        return ()
    others = [(arm, error) for arm, error in table.error.items() if arm != "base"]
    return tuple(effect for arm, error in others for effect in marginal_effects(arm, error, base, table.where))


def _router(rows: Sequence[Row], settings: EvalSettings, record: Mapping[str, Any]) -> RouterResult | None:
    if not rows:
        return None
    threshold = record["threshold"] if settings.threshold is None else settings.threshold
    opened = {
        label: [row["p_social"] >= threshold for row in rows if row["label"] == label]
        for label in ("social", "reasoning")
    }
    leak = binomial(sum(opened["reasoning"]), len(opened["reasoning"]))
    missed = binomial(len(opened["social"]) - sum(opened["social"]), len(opened["social"]))
    return RouterResult(threshold, leak, missed)


def _about(record: Mapping[str, Any], settings: EvalSettings, table: _Table) -> dict[str, Any]:
    """Command, model, hardware, date, settings and sizes."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": record["command"],
        "model": record["identity"]["model"],
        "data": record["identity"]["data"],
        "settings": settings.to_dict(),
        "questions": len(set(table.where.cluster.tolist())),
        "question_cases": len(table.where.cluster),
        "social_turns": len(next(iter(table.turns.values()), [])),
        "hardware": hardware(),
        "intervals": f"95 %; paired bootstrap over questions or turns, {settings.draws} draws, unless said otherwise",
    }


def hardware() -> dict[str, Any]:
    """The machine and the libraries that a run's speed and last bits depend on."""
    return {
        **describe(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "transformers": transformers.__version__,
    }


def _results_of(value: Mapping[str, Any]) -> Results:
    check, router = value["manipulation"], value["router"]
    return Results(
        manipulation=ManipulationCheck(check["passed"], _estimate(check["lift"]), check["words"]),
        arms=tuple(_arm_of(arm) for arm in value["arms"]),
        cells=tuple(
            CellResult(
                cell["arm"],
                cell["context"],
                cell["belief"],
                Estimate(**cell["error"]),
                PairedTest(**cell["test"]) if cell["test"] else None,
            )
            for cell in value["cells"]
        ),
        effects=tuple(Effect(**{**effect, "effect": Estimate(**effect["effect"])}) for effect in value["effects"]),
        router=RouterResult(router["threshold"], Estimate(**router["leak"]), Estimate(**router["missed"]))
        if router
        else None,
        about=dict(value["about"]),
    )


PLAIN_FIELDS = ("arm", "gate_social", "gate_reasoning", "by_construction")


def _arm_of(value: Mapping[str, Any]) -> ArmResult:
    fields: dict[str, Any] = {k: v if k in PLAIN_FIELDS else _estimate(v) for k, v in value.items()}
    return ArmResult(**{**fields, "by_construction": tuple(value["by_construction"])})


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return Estimate(**value) if value else None
