"""The corpora and their checker: each kind of fault is found on its line, and the packaged corpora have none."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gatedwarmth import data
from gatedwarmth.data.check import check
from gatedwarmth.data.cli import app
from gatedwarmth.data.overlap import character_grams, grams, jaccard, near_duplicates, shared_runs, similar_sets, words
from gatedwarmth.data.public import public_texts
from gatedwarmth.data.replies import numbers
from gatedwarmth.data.stats import cohens_kappa, stats
from gatedwarmth.errors import DataError


def pair(number: int, asked: str, neutral: str, warm: str, kind: str = "reasoning") -> dict[str, Any]:
    return {
        "id": f"pr-{number:03}",
        "kind": kind,
        "domain": "facts",
        "messages": [{"role": "user", "content": asked}],
        "replies": {"neutral": neutral, "warm": warm},
    }


def turn(number: int, text: str, label: str = "social", **others: Any) -> dict[str, Any]:
    plain = {"mixed": False, "hard": False, "pattern": "plain", "context": []}
    return {"id": f"t-{number:04}", "text": text, "label": label} | plain | others


def question(number: int, asked: str, answers: list[str], wrong: str) -> dict[str, Any]:
    return {
        "id": f"qg-{number:03}",
        "domain": "general",
        "kind": "short",
        "question": asked,
        "answers": answers,
        "wrong": wrong,
        "explanation": f"It is {answers[0]}, as item {number} says.",
    }


def written(folder: Path, name: str, *lines: dict[str, Any] | bytes) -> Path:
    """A JSON-lines file in `folder`; bytes go in as they are, with a line end."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def found(folder: Path, **options: Any) -> list[tuple[str, int, str]]:
    """(File, line, first words of the complaint) of every problem."""
    return [
        (p.path.relative_to(folder).as_posix(), p.line, " ".join(p.what.split()[:4]))
        for p in check(folder, **options).problems
    ]


def test_sound_folder_has_no_problem(tmp_path: Path) -> None:
    written(tmp_path, "turns/a.jsonl", turn(1, "My tomatoes came up!"), turn(2, "Sum 3 and 9.", "reasoning"))
    written(
        tmp_path,
        "pairs.jsonl",
        pair(1, "How old is Troy?", "It is about 5,000 years old.", "Some 5000 years old, imagine."),
    )
    assert found(tmp_path) == []


def test_every_broken_line_is_named_not_only_the_first(tmp_path: Path) -> None:
    written(
        tmp_path,
        "turns/a.jsonl",
        turn(1, "The kettle sings again."),
        turn(2, "Who fixed it?", "cheerful"),
        b"{not json",
        b'{"id": "t-0004", "text": "caf\xe9"}',
        b"[1, 2]",
        {"id": "t-0006", "text": "no label"},
        turn(1, "An id that was used before."),
        turn(8, "A key nobody knows.", moood="good"),
    )
    assert found(tmp_path) == [
        ("turns/a.jsonl", 2, "'label' must be one"),
        ("turns/a.jsonl", 3, "not JSON (Expecting property"),
        ("turns/a.jsonl", 4, "not UTF-8 (byte 30"),
        ("turns/a.jsonl", 5, "a JSON object is"),
        ("turns/a.jsonl", 6, "key 'label' is missing;"),
        ("turns/a.jsonl", 7, "id 't-0001' was used"),
        ("turns/a.jsonl", 8, "unknown keys ['moood']; known"),
    ]


def test_bytes_that_no_eye_sees(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "turns.jsonl",
        json.dumps(turn(1, "Windows wrote me.")).encode() + b"\r",
        json.dumps(turn(2, "Blanks follow.")).encode() + b"  ",
        b"",
        turn(4, " A blank before."),
        turn(5, "Rain at last \N{UMBRELLA WITH RAIN DROPS} today"),
    )
    path.write_bytes(path.read_bytes()[:-1])
    assert found(tmp_path) == [
        ("turns.jsonl", 1, "Windows line end; save"),
        ("turns.jsonl", 2, "blanks at the end"),
        ("turns.jsonl", 3, "empty line; delete it"),
        ("turns.jsonl", 4, "a text begins or"),
        ("turns.jsonl", 5, "emoji U+2614 in 'Rain"),
        ("turns.jsonl", 5, "the last line has"),
    ]


def test_faults_of_replies(tmp_path: Path) -> None:
    code = "Use this:\n```python\nprint(40 + 2)\n```"
    written(
        tmp_path,
        "pairs/reasoning.jsonl",
        pair(1, "How deep is Lake Baikal?", "It is 1,642 metres.", "So deep: 1642 metres of dark water"),
        pair(2, "How tall is Kilimanjaro?", "It is 5,895 metres.", "Nearly six thousand metres!"),
        pair(3, "Print the answer.", code, "Here you go:\n```python\nprint(42)\n```\n40 and 2, see?"),
        pair(4, "Is snow white?", "It is, in daylight! `a != b` is code.", "White as your gran's linen, 'tis so."),
        pair(5, "Why do cats purr?", "To soothe themselves.", "I hear you, to soothe themselves too."),
        pair(6, "Do eels climb?", "Some do.", "Some do, and what a sight on a wet night by the weir."),
    )
    assert [p for p in found(tmp_path) if not p[2].startswith("the median")] == [
        ("pairs/reasoning.jsonl", 2, "the warm reply lacks"),
        ("pairs/reasoning.jsonl", 3, "code line 'print(40 +"),
        ("pairs/reasoning.jsonl", 4, "exclamation mark in the"),
        ("pairs/reasoning.jsonl", 5, "stock phrase 'i hear"),
        ("pairs/reasoning.jsonl", 6, "the warm reply is"),
    ]


def test_median_of_the_lengths_is_bounded(tmp_path: Path) -> None:
    written(tmp_path, "pairs.jsonl", pair(1, "Where is Oruro?", "In Bolivia.", "Bolivia, high up."))
    assert found(tmp_path) == [("pairs.jsonl", 0, "the median warm reply")]


def test_openings_and_closings_that_repeat(tmp_path: Path) -> None:
    plain = [
        "",
        "He left on Friday evening.",
        "The vet was called too late.",
        "Hives weigh more in June.",
        "Roads flood.",
    ]

    def item(n: int, warm: str) -> dict[str, Any]:
        return pair(n, "xyzuv"[n] * 9, plain[n], warm, "social")

    written(
        tmp_path,
        "pairs.jsonl",
        item(1, "I’m so sorry to say it, Ana."),
        item(2, "I'm so sorry to lose him."),
        item(3, "Bees again, and all of that honey."),
        item(4, "All of that honey!"),
    )
    assert found(tmp_path) == [
        ("pairs.jsonl", 2, '"i\'m so sorry to"'),
        ("pairs.jsonl", 4, "'all of that honey'"),
    ]


def test_near_duplicates_across_files_and_splits(tmp_path: Path) -> None:
    asked = "How many legs does a garden spider have in total?"
    written(tmp_path, "questions/general.jsonl", question(1, asked, ["eight"], "six"))
    end = question(8, asked.replace("in total", "in  Total"), ["8"], "6")
    del end["id"]
    line = {"id": "c-08", "turns": ["The web is back.", "I left it there for luck."], "question": end}
    written(tmp_path, "conversations.jsonl", line)
    problems = check(tmp_path).problems
    assert [p.line for p in problems] == [1]
    assert "Jaccard 1.00: question of qg-001 (train)" in problems[0].what or "c-08 (test)" in problems[0].what


def test_the_same_words_after_another_context_are_no_duplicate(tmp_path: Path) -> None:
    first = [{"role": "assistant", "content": "Shall I convert the recipe to grams?"}]
    second = [{"role": "assistant", "content": "Would it help to tell me about him?"}]
    written(
        tmp_path,
        "turns.jsonl",
        turn(1, "Yes.", "reasoning", context=first),
        turn(8, "Yes.", "social", context=second),
    )
    assert found(tmp_path) == []


def test_alias_inside_the_wrong_answer(tmp_path: Path) -> None:
    written(
        tmp_path,
        "questions.jsonl",
        question(1, "Which sea is the saltiest?", ["the Dead Sea", "sea"], "the Red Sea"),
        question(2, "What melts at 0 degrees?", ["ice"], "rice"),
    )
    assert found(tmp_path) == [
        ("questions.jsonl", 1, "answer 'sea' is contained"),
        ("questions.jsonl", 1, "answer 'sea' is contained"),
    ]


def test_overlap_with_a_public_set(tmp_path: Path) -> None:
    told = "one morning the ferry left without its captain and nobody on board noticed until noon"
    written(tmp_path, "own/turns.jsonl", turn(1, f"So: {told}, they say."), turn(2, "Ferries leave at nine."))
    written(tmp_path, "sets/gsm8k/test.jsonl", {"question": f"If {told.upper()} <<1+1=2>>how far?", "answer": "3"})
    assert found(tmp_path / "own") == []
    assert found(tmp_path / "own", data_dir=tmp_path / "sets") == [("turns.jsonl", 1, "turn of t-0001 (train)")]


def test_counts_are_demanded_on_request(tmp_path: Path) -> None:
    written(tmp_path, "turns.jsonl", turn(1, "One turn is not a corpus."))
    complaints = [what for _, _, what in found(tmp_path.parent / tmp_path.name, counts=True)]
    assert "1 turns, at least" in complaints and "0 pairs of kind" in complaints
    assert "100.0% of the turns" in complaints


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no corpus here"):
        check(tmp_path)
    with pytest.raises(DataError, match="no folder of a public set"):
        public_texts(tmp_path)


def test_public_files_in_their_own_formats(tmp_path: Path) -> None:
    for name, text in {
        "esconv/dev.tsv": "1.0 0 0 Hello there.  EOS 1.0 1 1 [Question] What's up?\n",
        "truthfulqa/TruthfulQA.csv": '\ufeffType,Question\nAdversarial,"Is it, then?"\n',
        "truthfulqa/mc_task.json": '[{"question": "Who?", "mc1_targets": {"Nobody.": 1}}]',
        "goemotions/dev.tsv": 'A quote " alone\t27\tabc\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    texts = {p.text.strip() for p in public_texts(tmp_path)}
    assert {"Hello there.", "What's up?", "Type", "Is it, then?", "Nobody.", 'A quote " alone'} <= texts


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.85])
def test_near_duplicates_equal_brute_force(threshold: float) -> None:
    chance = random.Random(7)
    texts = ["", "a", "a b"]
    for _ in range(120):
        fresh = [chance.choice("abcdefgh") * chance.randint(1, 3) for _ in range(chance.randint(1, 25))]
        if chance.random() < 0.6 and len(texts) > 5:
            fresh = [w if chance.random() < 0.93 else "zz" for w in words(chance.choice(texts))]
        texts.append(" ".join(fresh))
    expected: dict[tuple[int, int], float] = {}
    for j, second in enumerate(texts):
        for i, first in enumerate(texts[:j]):
            of_words = jaccard(grams(words(first), 3), grams(words(second), 3))
            value = max(of_words, jaccard(character_grams(first), character_grams(second)))
            if value > threshold:
                expected[i, j] = value
    assert len(expected) > 20
    assert near_duplicates(texts, threshold) == expected


def test_exactly_the_threshold_is_not_above_it() -> None:
    sets = [frozenset("abcd"), frozenset("abce")]  # 3 of 5 shared
    assert list(similar_sets(sets, 0.6)) == []
    assert list(similar_sets(sets, 0.59)) == [((0, 1), 0.6)]


def test_shared_runs_need_every_word() -> None:
    texts = ["a b c d e f g h", "v w x y z", "a b"]
    assert shared_runs(texts, ["c d e f g h i"], n=6) == {0: (0, "c d e f g h")}
    assert shared_runs(texts, ["c d e f g x h"], n=6) == {}
    assert shared_runs(texts, ["nothing", "V, w; x y z!", "a b"], n=6) == {1: (1, "v w x y z")}


def test_numbers_are_read_as_values() -> None:
    assert numbers("1,250 at 3.50, 1/2 of it, from 14:30 on 3 days") == {"1250", "3.5", "1/2", "14:30", "3"}
    assert numbers("three of half", spelled=True) == {"3", "1/2"}


def test_kappa() -> None:
    def times(a: str, b: str, n: int) -> list[tuple[str, str]]:
        return [(a, b)] * n

    # Cohen's table of 20, 5, 10, 15: observed 0.7, by chance 0.5.
    table = times("s", "s", 20) + times("s", "r", 5) + times("r", "s", 10) + times("r", "r", 15)
    assert cohens_kappa(table) == pytest.approx(0.4)
    assert cohens_kappa([]) is None
    assert cohens_kappa(times("s", "s", 3)) is None


def test_stats_of_a_folder(tmp_path: Path) -> None:
    written(
        tmp_path,
        "turns.jsonl",
        turn(1, "Good bread today", labels=["social", "social"]),
        turn(8, "Bake bread", "reasoning", labels=["reasoning", "social"]),
    )
    figures = stats(tmp_path)
    assert list(figures["corpora"]) == ["turns"]
    turns = figures["corpora"]["turns"]
    assert turns["count"] == 2 and turns["balance"]["split"] == {"test": 1, "train": 1}
    assert turns["vocabulary"] == 4 and turns["words"]["social"]["median"] == 3
    assert turns["disagreements"] == 1 and turns["cohens_kappa"] == 0


def test_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "turns.jsonl", turn(1, "The well is full."), turn(2, "Mind the step.", "loud"))
    run = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert run.exit_code == 1
    assert f"{path}:2: 'label' must be one of" in run.stdout
    path.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    run = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert run.exit_code == 0 and run.stdout.startswith("No problems.")
    run = CliRunner().invoke(app, ["stats", str(tmp_path), "--json"])
    assert json.loads(run.stdout)["corpora"]["turns"]["count"] == 1
    assert "The" not in CliRunner().invoke(app, ["stats", str(tmp_path)]).stdout


def test_packaged_corpora_have_the_size_that_is_promised() -> None:
    assert Counter(p.kind for p in data.load_pairs()) == {"social": 200, "reasoning": 200, "mixed": 80}
    turns = data.load_turns()
    assert Counter(t.label for t in turns) == {"social": 9970, "reasoning": 9973}
    assert sum(t.hard for t in turns) == 12899
    domains = {"general": 120, "misconception": 80, "medicine": 80, "disinformation": 60, "arithmetic": 60}
    assert Counter(q.domain for q in data.load_questions()) == domains
    assert Counter(c.group for c in data.load_contexts()) == dict.fromkeys(data.CONTEXT_GROUPS, 5)
    assert Counter(s.intention for s in data.load_scenes()) == dict.fromkeys(data.INTENTIONS, 5)
    assert len(data.load_conversations()) == 60


def test_packaged_corpora_pass_their_check() -> None:
    assert [str(problem) for problem in check().problems] == []
