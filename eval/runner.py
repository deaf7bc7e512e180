"""Runs arms on tasks and leaves one JSON line a reply; a run killed at any moment goes on with the same
command.

Cases stand in a fixed order and fixed batches, so a resumed run computes the very batches that an
uninterrupted one computes. A batch is written at once, flushed and synced; on resume a torn line and the rest
of its batch are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from gatedwarmth.data import LABELS, Message, data_hash, load_turns
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval.arms import Arm
from gatedwarmth.eval.contexts import Case, turn_case
from gatedwarmth.eval.judges import JUDGE_VERSION
from gatedwarmth.eval.settings import EvalSettings
from gatedwarmth.eval.tasks import Task, pick_turns
from gatedwarmth.files import append_lines, read_jsonl, write_json_atomic
from gatedwarmth.gates import Policy

Row = dict[str, Any]


class HasText(Protocol):
    @property
    def text(self) -> str: ...


class HasProbability(Protocol):
    @property
    def p_social(self) -> float: ...


class EvaluatedModel(Protocol):
    """What an evaluation asks of a model; `GatedWarmthModel` has it all."""

    @property
    def traits(self) -> tuple[str, ...]: ...

    @property
    def router(self) -> Any: ...

    @property
    def policy(self) -> Policy: ...

    def chat_many(
        self, conversations: Sequence[Sequence[Message]], gates: Tensor | None = None, **generation: Any
    ) -> Sequence[HasText]: ...

    def route_many(self, conversations: Sequence[Sequence[Message]]) -> Sequence[HasProbability]: ...


def run(
    model: EvaluatedModel,
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    out: str | Path,
    settings: EvalSettings,
    identity: Mapping[str, str] | None = None,
    command: str = "",
) -> None:
    """Reply to every case with every arm and score the replies.

    Leaves run.json, routes/<task>.jsonl and samples/<task>.<arm>.jsonl in `out`. What is finished there is
    kept.

    Parameters
    ----------
    identity: what tells this model from another, such as `identify(folder)`; a resume with another one is
        refused.

    Raises
    ------
    EvaluationError: `out` holds a run of other settings, data or model; or a gated arm without a router.
    """
    out = Path(out)
    routed = model.router is not None
    if not routed and any(arm.rule.needs_router for arm in arms):
        names = ", ".join(arm.name for arm in arms if arm.rule.needs_router)
        raise EvaluationError(f"arms {names} need a router and this model has none; add one or leave them out")
    threshold = model.policy.threshold if settings.threshold is None else settings.threshold
    record = {"settings": settings.to_dict(), "threshold": threshold, "command": command}
    _check_in(out, _identity(model, arms, tasks, settings, identity), record)
    plan = [(task, in_order(task.cases())) for task in tasks]
    router_turns = router_cases(settings) if routed else []
    with _progress() as progress:
        total = sum(len(cases) for _, cases in plan) * len(arms)
        session = _Session(model, out, settings, threshold, progress, progress.add_task("all replies", total=total))
        if router_turns:
            session.routes("turns", router_turns)
        for task, cases in plan:
            p_social = session.routes(task.name, cases) if routed else [None] * len(cases)
            for arm in arms:
                session.samples(task, arm, cases, p_social)


def in_order(cases: Sequence[Case]) -> list[Case]:
    """Longest prompt first, so that batches hold like lengths and memory peaks at once; ids break ties."""
    return sorted(cases, key=lambda case: (-sum(len(m["content"]) for m in case.messages), case.id))


def router_cases(settings: EvalSettings) -> list[Case]:
    """Turns of the split, both labels: what the router is measured on. Routing only, no replies."""
    turns = load_turns(split=settings.split)
    limit = settings.limit_turns or settings.limit
    picked = [t for label in LABELS for t in pick_turns([t for t in turns if t.label == label], limit)]
    return in_order([turn_case(turn, "turns") for turn in picked])


def identify(folder: str | Path) -> dict[str, str]:
    """File name to SHA-256 of every JSON and safetensors file of a model folder."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file())
    if not files:
        raise EvaluationError(f"{folder} holds no .json or .safetensors file; give the folder of a saved model")
    return {p.relative_to(folder).as_posix(): _file_hash(p) for p in files}


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Session:
    """One pass over the work that is left."""

    model: EvaluatedModel
    out: Path
    settings: EvalSettings
    threshold: float
    progress: Progress
    overall: TaskID  # replies of this session; those that were there before are taken off its total
    answered: dict[tuple[str, str], list[Row]] = field(default_factory=dict)  # (task, case) → rows of all arms

    def routes(self, name: str, cases: Sequence[Case]) -> list[float | None]:
        """The router's probability of "social" for every case; kept in routes/<name>.jsonl."""

        def route(batch: Sequence[Case], number: int) -> list[Row]:
            decisions = self.model.route_many([list(case.messages) for case in batch])
            return [
                {
                    "id": case.id,
                    "label": case.label,
                    "domain": case.domain,
                    "p_social": float(decision.p_social),
                }
                for case, decision in zip(batch, decisions, strict=True)
            ]

        rows = self._fill(self.out / "routes" / f"{name}.jsonl", f"route {name}", cases, route)
        return [row["p_social"] for row in rows]

    def samples(self, task: Task, arm: Arm, cases: Sequence[Case], p_social: Sequence[float | None]) -> list[Row]:
        """Replies and scores of one arm on one task; kept in samples/<task>.<arm>.jsonl."""

        def reply(batch: Sequence[Case], number: int) -> list[Row]:
            start = number * self.settings.batch_size
            return self._reply(task, arm, batch, p_social[start : start + len(batch)], number)

        path = self.out / "samples" / f"{task.name}.{arm.name}.jsonl"
        rows = self._fill(path, f"{task.name} · {arm.name}", cases, reply, self.overall)
        for row in rows:
            self.answered.setdefault((task.name, row["id"]), []).append(row)
        return rows

    def _reply(
        self, task: Task, arm: Arm, batch: Sequence[Case], p_social: Sequence[float | None], number: int
    ) -> list[Row]:
        gates = arm.gates(batch, p_social, self.model.traits, self.threshold)
        rows = [
            _row(case, arm, dict(zip(self.model.traits, row, strict=True)), p)
            for case, row, p in zip(batch, gates.tolist(), p_social, strict=True)
        ]
        known = self._known(task.name, rows)
        new = [i for i, row in enumerate(rows) if row["id"] not in known]
        if new:
            with torch.random.fork_rng():
                torch.manual_seed(_seed(self.settings.seed, task.name, number))
                replies = self.model.chat_many(
                    [rows[i]["messages"] for i in new],
                    gates=gates[new],
                    max_new_tokens=self.settings.max_new_tokens,
                    **_sampling(self.settings),
                )
            texts = [reply.text for reply in replies]
            scores = task.score([batch[i] for i in new], texts)
            for i, text, score in zip(new, texts, scores, strict=True):
                rows[i] |= {"reply": text, **score}
        return [row | known.get(row["id"], {}) for row in rows]

    def _known(self, task: str, rows: Sequence[Row]) -> dict[str, Row]:
        """id → reply and score of a case that an earlier arm answered with the same prompt and the same gates.

        Greedy decoding gives the same reply again, so it is not computed twice; `same_as` names the arm.
        """
        if self.settings.temperature:
            return {}
        known: dict[str, Row] = {}
        for row in rows:
            for other in self.answered.get((task, row["id"]), []):
                if other["messages"] == row["messages"] and other["gates"] == row["gates"]:
                    mine = {k: v for k, v in other.items() if k not in row and k != "same_as"}
                    known[row["id"]] = {**mine, "same_as": other.get("same_as", other["arm"])}
        return known

    def _fill(
        self,
        path: Path,
        title: str,
        cases: Sequence[Case],
        work: Callable[[Sequence[Case], int], list[Row]],
        overall: TaskID | None = None,
    ) -> list[Row]:
        """Do the batches that the file lacks and append them one by one; returns all rows."""
        size = self.settings.batch_size
        rows = finished_rows(path, [case.id for case in cases], size)
        bar = self.progress.add_task(title, total=len(cases), completed=len(rows))
        if overall is not None:
            self.progress.update(overall, total=(self.progress.tasks[overall].total or 0) - len(rows))
        for number in range(-(-len(rows) // size), -(-len(cases) // size)):
            new = work(cases[number * size : (number + 1) * size], number)
            append_lines(path, [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in new])
            rows += new
            self.progress.update(bar, completed=len(rows))
            if overall is not None:
                self.progress.advance(overall, len(new))
        self.progress.update(bar, visible=False)
        self.progress.console.print(f"{title}: {len(rows)} done", style="dim", highlight=False)
        return rows


def finished_rows(path: Path, ids: Sequence[str], batch_size: int) -> list[Row]:
    """Rows of the whole batches in a samples file; what follows them, torn by a kill, is cut off the file.

    Raises
    ------
    EvaluationError: the rows are not those of this run's cases.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    ends = [0]
    for line in path.read_bytes().splitlines(keepends=True):
        row = _whole(line)
        if row is None:
            break
        rows.append(row)
        ends.append(ends[-1] + len(line))
    kept = len(rows) if len(rows) == len(ids) else len(rows) // batch_size * batch_size
    if [row.get("id") for row in rows[:kept]] != list(ids[:kept]):
        raise EvaluationError(f"{path} holds replies to other cases than this run's; use another folder or delete it")
    if path.stat().st_size != ends[kept]:
        with path.open("r+b") as file:
            file.truncate(ends[kept])
            os.fsync(file.fileno())
    return rows[:kept]


def _whole(line: bytes) -> Row | None:
    """The object of a complete line, None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _row(case: Case, arm: Arm, gates: dict[str, float], p: float | None) -> Row:
    """A sample before its reply and score."""
    return {
        "id": case.id,
        "arm": arm.name,
        "task": case.task,
        "label": case.label,
        "cluster": case.cluster,
        "domain": case.domain,
        "context": case.context,
        "belief": case.belief,
        "messages": arm.messages(case),
        "gates": gates,
        "p_social": p,
    }


def _sampling(settings: EvalSettings) -> dict[str, Any]:
    shared: dict[str, Any] = {"repetition_penalty": settings.repetition_penalty}
    if not settings.temperature:
        return {"do_sample": False, **shared}
    return {"do_sample": True, "temperature": settings.temperature, "top_p": 1.0, "top_k": 0, **shared}


def _seed(seed: int, task: str, batch: int) -> int:
    """Every arm draws the same random numbers for a batch, whatever ran before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}/{batch}".encode()).digest()[:7], "big")


def _identity(
    model: EvaluatedModel,
    arms: Sequence[Arm],
    tasks: Sequence[Task],
    settings: EvalSettings,
    identity: Mapping[str, str] | None,
) -> dict[str, Any]:
    return {
        "settings": settings.binding(),
        "data": {task.name: data_hash(task.items) for task in tasks},
        "model": {"traits": list(model.traits), "policy": repr(model.policy), **(identity or {})},
        "judge": {"version": JUDGE_VERSION},
        "arms": {arm.name: repr(arm) for arm in arms},
    }


def _check_in(out: Path, mine: dict[str, Any], record: dict[str, Any]) -> None:
    """Write run.json, or compare with the one there. Arms may be added, not changed."""
    path = out / "run.json"
    if path.exists():
        before = load_run(out)["identity"]
        differences = list(_differences(before, mine))
        if differences:
            raise EvaluationError(
                f"{path} belongs to a run that differs in {'; '.join(differences)}. Repeat it with the same "
                f"settings "
                "to go on with it, or give another output folder"
            )
        mine = {**mine, "arms": {**before["arms"], **mine["arms"]}}
    elif (out / "samples").is_dir() and any((out / "samples").iterdir()):
        raise EvaluationError(f"{out} holds samples without a run.json; give another output folder or delete them")
    write_json_atomic(path, {"identity": mine, **record})


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for part, values in now.items():
        old = before.get(part, {})
        keys = set(old) & set(values) if part == "arms" else set(old) | set(values)
        for key in sorted(keys):
            if old.get(key) != values.get(key):
                yield f"{part} {key}: {_brief(old.get(key))} there, {_brief(values.get(key))} now"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def load_run(out: str | Path) -> dict[str, Any]:
    """run.json of a folder."""
    path = Path(out) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} cannot be read ({error}); give the folder of an evaluation run") from None


def load_samples(out: str | Path, tasks: Sequence[str], arms: Sequence[str]) -> dict[tuple[str, str], list[Row]]:
    """(task, arm) to rows.

    Raises
    ------
    EvaluationError: a file is missing or the arms of a task have not seen the same cases.
    """
    samples = {}
    for task in tasks:
        for arm in arms:
            path = Path(out) / "samples" / f"{task}.{arm}.jsonl"
            if not path.exists():
                raise EvaluationError(f"{path} is missing: arm {arm!r} has not run; run the evaluation to its end")
            samples[task, arm] = [row for _, row in read_jsonl(path)]
        ids = {tuple(row["id"] for row in samples[task, arm]) for arm in arms}
        if len(ids) > 1:
            raise EvaluationError(
                f"the arms of task {task!r} have unlike numbers of replies; run the evaluation to its end"
            )
    return samples


def load_routes(out: str | Path, name: str) -> list[Row]:
    """Rows of routes/<name>.jsonl; none where the model has no router."""
    path = Path(out) / "routes" / f"{name}.jsonl"
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
