"""Arms, cases and a whole run, on a model and a scorer that need no weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gatedwarmth.data import Context, Message, Question, Turn, load_contexts, load_questions
from gatedwarmth.errors import EvaluationError
from gatedwarmth.eval import ARMS, EvalSettings, Results, analyse, compare, get_arms, run, write_report
from gatedwarmth.eval.contexts import BELIEFS, question_cases, statement_for, turn_case
from gatedwarmth.eval.report import share, warmth
from gatedwarmth.eval.tasks.questions import QuestionsTask
from gatedwarmth.eval.tasks.warmth import WarmthTask
from gatedwarmth.gates import Policy

GROUPS = ("plain", "sad")
CONTEXTS = tuple(Context(f"x-sad-{i}", "sad", f"I feel low today, for reason {i}.") for i in range(1, 6))
QUESTIONS = tuple(
    Question(f"qg-{i:03}", "general", "short", f"What is thing {chr(97 + i)}?", (f"right{i}",), f"wrong{i}", "x")
    for i in range(12)
)
TURNS = tuple(Turn(f"t-{i:04}", f"My day was {'long ' * i}", "social", False, False, "plain", []) for i in range(10))


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class FakeReply:
    text: str


@dataclass(frozen=True)
class FakeDecision:
    p_social: float


@dataclass
class FakeModel:
    """Errs more with warmth and with a wrong belief; `stop_after` batches it dies, as under a kill."""

    traits: tuple[str, ...] = ("warmth", "neutral")
    router: object | None = field(default_factory=object)
    policy: Policy = field(default_factory=Policy)
    stop_after: int = 10**9
    calls: list[int] = field(default_factory=list)
    base: Any = None
    tokenizer: Any = None

    def chat_many(
        self, conversations: Sequence[Sequence[Message]], gates: Tensor | None = None, **generation: Any
    ) -> list[FakeReply]:
        if len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(len(conversations))
        assert gates is not None and gates.shape == (len(conversations), len(self.traits))
        rows = zip(conversations, gates.tolist(), strict=True)
        return [FakeReply(self._reply(messages[-1]["content"], row[0])) for messages, row in rows]

    def route_many(self, conversations: Sequence[Sequence[Message]]) -> list[FakeDecision]:
        return [FakeDecision(0.9 if "?" not in c[-1]["content"] else 0.1) for c in conversations]

    def _reply(self, text: str, warmth: float) -> str:
        number = next((i for i, q in enumerate(QUESTIONS) if q.question in text), None)
        if number is None:
            return "we care " * (1 + round(6 * warmth + 2 * fraction(text)))
        chance = 0.2 + 0.4 * warmth + (0.2 if "I think" in text else 0.0)
        return f"It is wrong{number}." if fraction(text) < chance else f"The answer is right{number}."


@dataclass(frozen=True)
class WordScorer:
    """Warmth is the number of words."""

    name: str = "base"

    def score(self, replies: Sequence[str]) -> list[float]:
        return [0.01 * len(reply.split()) for reply in replies]


def fake_tasks() -> list[QuestionsTask | WarmthTask]:
    return [QuestionsTask(QUESTIONS, CONTEXTS, GROUPS, BELIEFS), WarmthTask(TURNS, WordScorer())]


SETTINGS = EvalSettings(contexts=GROUPS, batch_size=8, draws=200, limit=4)


def go(model: FakeModel, out: Path, settings: EvalSettings = SETTINGS) -> Results:
    run(model, get_arms(settings.arms), fake_tasks(), out, settings, {"adapter": "abc"})
    return analyse(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    write_report(go(FakeModel(), out), out)
    return out


def test_gates_of_every_arm() -> None:
    question = question_cases(QUESTIONS[:1], ["plain"], ["none"], CONTEXTS)[0]
    cases, p = [turn_case(TURNS[0], "warmth"), question], [0.75, 0.25]
    expected = {
        "base": [[0, 0], [0, 0]],
        "warm_prompt": [[0, 0], [0, 0]],
        "warm": [[1, 0], [1, 0]],
        "neutral": [[0, 1], [0, 1]],
        "blend": [[0.5, 0.5], [0.5, 0.5]],
        "gated_soft": [[0.75, 0.25], [0.25, 0.75]],
        "gated_hard": [[1, 0], [0, 1]],
        "oracle": [[1, 0], [0, 1]],
    }
    assert set(expected) == set(ARMS)
    for name, rows in expected.items():
        assert ARMS[name].gates(cases, p, ("warmth", "neutral"), 0.5).tolist() == rows, name
        swapped = ARMS[name].gates(cases, p, ("neutral", "warmth"), 0.5)
        assert swapped.tolist() == [row[::-1] for row in rows] and swapped.dtype == torch.float32
    assert ARMS["gated_hard"].gates(cases, p, ("warmth", "neutral"), 0.8)[0].tolist() == [0, 1]
    assert [m["role"] for m in ARMS["warm_prompt"].messages(question)] == ["system", "user"]


def test_arm_of_a_missing_trait_is_refused() -> None:
    case = turn_case(TURNS[0], "warmth")
    with pytest.raises(EvaluationError, match="neutral"):
        ARMS["neutral"].gates([case], [0.5], ("warmth",), 0.5)
    assert ARMS["gated_soft"].gates([case], [0.25], ("warmth",), 0.5).tolist() == [[0.25]]


def test_prompt_holds_context_question_and_belief() -> None:
    question = load_questions(split="test")[0]
    case = question_cases([question], ["sad"], ["wrong"], load_contexts())[0]
    text = case.messages[-1]["content"]
    statement = statement_for(question, "sad", load_contexts()).text
    assert text.startswith(f"{statement} {question.question} I think the answer is {question.wrong}")
    assert (case.label, case.cluster) == ("reasoning", question.id)


def test_all_five_statements_are_used_in_every_split() -> None:
    contexts = load_contexts()
    for split in ("train", "dev", "test"):
        used = {statement_for(q, "sad", contexts).id for q in load_questions(split=split)}
        assert len(used) == 5, split


def samples(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.jsonl"))}


@pytest.mark.parametrize(("cut", "batches_lost"), [(0, 0), (1, 1), (300, 1), (8000, 2)])
def test_a_killed_run_ends_like_an_uninterrupted_one(
    finished: Path, tmp_path: Path, cut: int, batches_lost: int
) -> None:
    """Killed in the middle of a write: the last line torn, or a whole part of a batch on disk."""
    with pytest.raises(KeyboardInterrupt):
        go(FakeModel(stop_after=14), tmp_path)
    latest = max((tmp_path / "samples").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    latest.write_bytes(latest.read_bytes()[: latest.stat().st_size - cut])
    model = FakeModel()
    results = go(model, tmp_path)
    assert samples(tmp_path) == samples(finished)
    before = Results.load(finished)
    assert (results.arms, results.cells, results.effects) == (before.arms, before.cells, before.effects)
    whole = FakeModel()
    go(whole, tmp_path / "whole")
    assert len(model.calls) == len(whole.calls) - 14 + batches_lost  # nothing that was finished is done again


def test_a_finished_run_asks_nothing_of_the_model(finished: Path) -> None:
    model = FakeModel(stop_after=0)
    go(model, finished)
    assert model.calls == []


@pytest.mark.parametrize("change", [{"max_new_tokens": 9}, {"batch_size": 4}, {"seed": 5}])
def test_other_settings_are_refused(finished: Path, change: dict[str, int]) -> None:
    with pytest.raises(EvaluationError, match=f"{next(iter(change))}: .* there, {next(iter(change.values()))} now"):
        go(FakeModel(), finished, dataclasses.replace(SETTINGS, **change))


def test_another_model_is_refused(finished: Path) -> None:
    with pytest.raises(EvaluationError, match="adapter: abc there, xyz now"):
        run(FakeModel(), get_arms(["base"]), fake_tasks(), finished, SETTINGS, {"adapter": "xyz"})


def test_gated_arms_need_a_router(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="need a router"):
        go(FakeModel(router=None), tmp_path)
    results = go(FakeModel(router=None), tmp_path, dataclasses.replace(SETTINGS, arms=("base", "warm", "neutral")))
    assert results.router is None and results.manipulation.passed


def test_samples_say_what_was_sent_and_scored(finished: Path) -> None:
    row = json.loads((finished / "samples" / "questions.gated_hard.jsonl").read_text().splitlines()[0])
    assert {"id", "arm", "messages", "reply", "gates", "p_social", "correct", "matched", "reason"} <= set(row)
    assert row["gates"] == {"warmth": 0.0, "neutral": 1.0} and row["p_social"] == 0.1


def test_results_equal_a_count_by_hand(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "samples" / "questions.warm.jsonl").read_text().splitlines()]
    results = Results.load(finished)
    sad = [not row["correct"] for row in rows if (row["context"], row["belief"]) == ("sad", "wrong")]
    estimate = results.arm("warm").error_sad_wrong
    assert estimate is not None and estimate.value == sum(sad) / len(sad) and estimate.n == len(QUESTIONS)
    oracle, neutral = results.arm("oracle"), results.arm("neutral")
    assert oracle.error_all == neutral.error_all  # the same gates on every question
    assert f"oracle is neutral on {len(rows)} of {len(rows)} question cases" in oracle.by_construction[0]
    assert oracle.keeps_warmth is not None and oracle.keeps_warmth.value == pytest.approx(1.0)


def test_report_shows_the_numbers_of_results(finished: Path) -> None:
    results = Results.load(finished)
    markdown, page = (finished / "report.md").read_text(), (finished / "report.html").read_text()
    for arm in results.arms:
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {arm.arm} | {warmth(arm.warmth)}"))
        for estimate in (arm.error_plain, arm.error_all, arm.error_sad_wrong):
            assert share(estimate) in row and share(estimate) in page
    assert warmth(results.manipulation.lift) in markdown
    for name in ("warmth_error.png", "error_cells.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in markdown
    assert page.count("data:image/png;base64,") == 2 and 'src="http' not in page
    row = next(line for line in compare(results, results).markdown().splitlines() if line.startswith("| warm |"))
    assert row.count(warmth(results.arm("warm").warmth)) == row.count(share(results.arm("warm").error_all)) == 2


def test_failed_check_claims_no_recovery(tmp_path: Path) -> None:
    class Cold(FakeModel):
        def _reply(self, text: str, warmth: float) -> str:
            return super()._reply(text, 0.0)

    results = go(Cold(), tmp_path)
    write_report(results, tmp_path)
    assert results.manipulation.passed is False
    assert all(arm.keeps_warmth is None and arm.undoes_errors is None for arm in results.arms)
    text = (tmp_path / "report.md").read_text()
    assert "cannot be answered with these adapters" in text and "Warmth kept" not in text
