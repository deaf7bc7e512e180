"""Routers: round trips, broken folders, decisions that do not depend on the process, calibration and the leak bound."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from gatedwarmth import GatedWarmthModel, bases
from gatedwarmth.bench.subjects import acting_adapter
from gatedwarmth.conversation import Conversation
from gatedwarmth.data import Message, load_turns
from gatedwarmth.errors import DataError, RouterError, TrainingError
from gatedwarmth.prefill import Prefill
from gatedwarmth.router import Card, Network, ProbeRouter, TextRouter, TextSettings, TextWeights, load_router
from gatedwarmth.router.calibration import (
    auroc,
    balanced_accuracy,
    binomial_upper,
    expected_calibration_error,
    fit_calibration,
    metrics,
    threshold_for_leak,
)
from gatedwarmth.router.features import Words, features, word_columns
from gatedwarmth.router.probe import hidden_states
from gatedwarmth.router.storage import softmax_to_last
from gatedwarmth.templates import prompt_of
from gatedwarmth.train import states
from gatedwarmth.train.router import RouterReport, train_router

TURNS = [
    ("social", "My sister called and I am so happy that we talk again"),
    ("social", "I miss my old street and the people in it"),
    ("reasoning", "What is the boiling point of water at 3000 m?"),
    ("reasoning", "Compute 17 * 23 and explain each step"),
    ("humour", "Knock knock, tell a joke about a duck"),
    ("humour", "Make me laugh with a pun about cheese"),
]


def turns_file(path: Path, labels: tuple[str, ...], count: int = 60) -> Path:
    """A small corpus whose classes differ in their words, so that any working router separates them."""
    chosen = [turn for turn in TURNS if turn[0] in labels]
    lines = [
        {"id": f"t-{index:03d}", "text": f"{text} {'and then ' * (index % 3)}", "label": label}
        for index in range(count)
        for label, text in [chosen[(index // 10 + index) % len(chosen)]]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> RouterReport:
    folder = tmp_path_factory.mktemp("router")
    return train_router("text", folder / "text", turns=turns_file(folder / "t.jsonl", ("social", "reasoning")))


def some_conversations() -> list[list[Message]]:
    return [turn.messages for turn in load_turns("test")[:40]]


def asks(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def random_probe(hidden: int = 48, layers: tuple[int, ...] = (1, 3)) -> ProbeRouter:
    rng = np.random.default_rng(0)
    network = Network(rng.normal(size=(4 * hidden, 6)), rng.normal(size=6), rng.normal(size=(6, 1)), np.zeros(1))
    return ProbeRouter(network, layers, "tiny", Card())


# --- text


def test_text_router_separates_what_it_was_taught(report: RouterReport) -> None:
    router = load_router(report.folder)
    assert router.traits == ("warmth", "neutral")
    table = router.probabilities([asks("I miss my sister"), asks("Compute 3 * 4 and explain")], None)
    assert table[0, 0] > 0.5 > table[1, 0]
    assert np.allclose(table.sum(axis=1), 1.0)
    assert report.metrics["balanced_accuracy"] == 1.0


def test_text_router_round_trip(report: RouterReport, tmp_path: Path) -> None:
    router = load_router(report.folder)
    router.save(tmp_path / "copy")
    conversations = some_conversations()
    copy = load_router(tmp_path / "copy")
    assert np.array_equal(router.probabilities(conversations, None), copy.probabilities(conversations, None))
    assert copy.describe() == router.describe()
    assert sorted(path.suffix for path in (tmp_path / "copy").iterdir()) == [".json", ".safetensors"]


def test_a_finished_router_is_kept_and_other_data_is_not(tmp_path: Path) -> None:
    path = turns_file(tmp_path / "t.jsonl", ("social", "reasoning"))
    first = train_router("text", tmp_path / "r", turns=path)
    written = (tmp_path / "r" / "router.safetensors").stat().st_mtime_ns
    second = train_router("text", tmp_path / "r", turns=path)
    assert second.skipped and not first.skipped and second.metrics == first.metrics
    assert (tmp_path / "r" / "router.safetensors").stat().st_mtime_ns == written
    turns_file(path, ("social", "reasoning"), count=70)
    assert not train_router("text", tmp_path / "r", turns=path).skipped


def test_three_classes(tmp_path: Path) -> None:
    path = turns_file(tmp_path / "t.jsonl", ("social", "reasoning", "humour"), count=90)
    traits = ("warmth", "humour", "neutral")
    report = train_router("text", tmp_path / "r", turns=path, traits=traits)
    router = load_router(report.folder)
    table = router.probabilities(
        [asks("I miss my street"), asks("tell a pun"), asks("What is the boiling point")], None
    )
    assert router.traits == traits
    assert table.argmax(axis=1).tolist() == [0, 1, 2]
    assert np.allclose(table.sum(axis=1), 1.0)


def test_decisions_do_not_depend_on_the_process(report: RouterReport) -> None:
    code = (
        "import sys; from gatedwarmth.router import load_router;"
        "conversation = [{'role': 'user', 'content': sys.argv[2]}];"
        "print(repr(load_router(sys.argv[1]).probabilities([conversation])[0, 0].item()))"
    )
    text = "Tú y yo — 雨 again? 3 × 4"
    here = load_router(report.folder).probabilities([asks(text)], None)[0, 0].item()
    there = subprocess.run(
        [sys.executable, "-c", code, str(report.folder), text],
        capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""},
    )  # fmt: skip
    assert float(there.stdout) == here


def test_hashes_are_the_ones_that_saved_routers_rely_on() -> None:
    """A change here breaks every router on disk: raise the schema with it."""
    messages: list[Message] = [{"role": "user", "content": "A cat?"}, {"role": "assistant", "content": "Two."}]
    columns, values = features([*messages, *asks("And a dog, black as coal?")], TextSettings(bits=8, vectors=True))
    assert (int(columns.sum()), round(float(values @ values), 4)) == HASHED


HASHED = (1883839, 6.2415)


def test_features_are_in_range() -> None:
    chosen = TextSettings(bits=6, word_bits=6, vectors=True)
    for conversation in some_conversations():
        columns, values = features(conversation, chosen)
        assert len(columns) == len(values)
        assert columns.min() >= 0 and columns.max() < chosen.columns


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=200))
def test_any_text_has_features(text: str) -> None:
    _, values = features(asks(text), TextSettings(bits=8))
    assert np.isfinite(values).all()


def test_the_turn_before_counts_and_a_long_turn_is_bounded() -> None:
    chosen = TextSettings(bits=8, letters=100)
    last: Message = {"role": "user", "content": "yes"}
    earlier: Message = {"role": "assistant", "content": "Shall I compute it?"}
    assert len(features([earlier, last], chosen)[0]) > len(features([last], chosen)[0])
    long = features(asks("a b " * 100_000), chosen)
    assert len(long[0]) < 1000
    with pytest.raises(RouterError, match="empty"):
        features([], chosen)


def test_the_sentence_that_asks_is_found() -> None:
    told = "We buried him on Monday; the whole street came. How many legs has a crab? He never knew, and laughed."
    assert Words.of(told).asking == (("how", "many", "legs", "has", "a", "crab", "?"), True)
    assert Words.of('She said "why?" and left. Then rain.').asking[1] is False
    assert Words.of("Tell me.\nNow.").asking == (("now", "."), False)
    assert Words.of(" ").asking == ((), False)


def test_the_turn_before_is_read_like_a_turn_and_fades_behind_a_long_one() -> None:
    chosen = TextSettings(bits=16)
    size = 2**chosen.bits  # of the n-grams alone

    def dense(*texts: str, role: Literal["user", "assistant"] = "user") -> np.ndarray:
        earlier: list[Message] = [{"role": role, "content": text} for text in texts[:-1]]
        columns, values = features([*earlier, *asks(texts[-1])], chosen)
        return np.bincount(columns, values, chosen.columns)[:size]

    before, later = "My sister never wrote back", " ".join(["blah zzz"] * 5)
    alone, short, long = dense(before), dense(before, "ok"), dense(before, later)
    assert short @ alone > 1.5  # words, characters and skeleton of the turn before, at full weight
    assert 0.2 < (long @ alone) / (short @ alone) < 0.35  # 10 words: (5 / 10) ** 2, and what the two turns share
    itself, following = dense("ok"), dense(before, "ok", role="assistant")
    assert 0.5 < (following @ itself) / (itself @ itself) < 0.6  # leaning wholly on what came before, it counts half


def test_word_vectors_become_one_number_a_word(llama: object, tokenizer: object, tmp_path: Path) -> None:
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    path = turns_file(tmp_path / "t.jsonl", ("social", "reasoning"))
    report = train_router("text", tmp_path / "r", base=base, turns=path)
    router = load_router(tmp_path / "r")
    assert report.metrics["balanced_accuracy"] == 1.0
    assert isinstance(router, TextRouter) and router.text.settings.vectors
    column = router.text.settings.first_word() + word_columns(["sister"], router.text.settings.word_bits)
    assert (router.text.weight[column] != 0).all()
    half = dataclasses.replace(base, model=copy.deepcopy(base.model).bfloat16())
    assert not train_router("text", tmp_path / "r", base=half, turns=path).skipped  # other vectors
    assert not train_router("text", tmp_path / "r", turns=path).skipped  # without a base it is another router


# --- broken folders and data


def test_truncated_weights(report: RouterReport, tmp_path: Path) -> None:
    load_router(report.folder).save(tmp_path / "r")
    path = tmp_path / "r" / "router.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RouterError, match=r"truncated.*train it again"):
        load_router(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "oracle"}, "kind 'oracle'"),
        ({"schema": 99}, "schema 99"),
        ({"traits": ["warmth"]}, "two or more"),
        ({"traits": ["a", "b", "c"]}, "shape"),
        ({"settings": {"bits": 16}}, "train it again"),
    ],
)
def test_garbled_router_json(report: RouterReport, tmp_path: Path, change: dict[str, object], message: str) -> None:
    load_router(report.folder).save(tmp_path / "r")
    path = tmp_path / "r" / "router.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RouterError, match=message):
        load_router(tmp_path / "r")


def test_no_router_folder(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="no router folder"):
        load_router(tmp_path)
    (tmp_path / "router.json").write_text("{")
    with pytest.raises(RouterError, match="broken"):
        load_router(tmp_path)


def test_nan_weights() -> None:
    chosen = TextSettings(bits=4)
    weight = np.full((chosen.columns, 1), np.nan)
    with pytest.raises(RouterError, match="NaN"):
        TextRouter(TextWeights(weight, chosen), np.zeros(1), Card())


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="kind 'psychic'"):
        train_router("psychic", tmp_path / "r")
    with pytest.raises(TrainingError, match="0 turns of 'humour'"):
        train_router("text", tmp_path / "r", turns=turns_file(tmp_path / "t.jsonl", ("social", "reasoning")),
                     traits=("warmth", "humour", "neutral"))  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"id": "t-001", "text": "hi", "label": "angry"}\n')
    with pytest.raises(DataError, match="'angry'"):
        train_router("text", tmp_path / "r", turns=tmp_path / "bad.jsonl")


# --- probe


def test_probe_round_trip_and_its_errors(tmp_path: Path) -> None:
    probe = random_probe()
    probe.save(tmp_path / "p")
    again = load_router(tmp_path / "p")
    state = torch.randn(3, 2, 2, 48)
    conversations = [asks("hi")] * 3
    assert np.array_equal(
        probe.probabilities(conversations, lambda layers: state),
        again.probabilities(conversations, lambda layers: state),
    )
    with pytest.raises(RouterError, match="hidden size 48"):
        again.probabilities(conversations, lambda layers: torch.randn(3, 2, 2, 64))
    with pytest.raises(RouterError, match="NaN"):
        again.probabilities(conversations, lambda layers: state * float("nan"))
    with pytest.raises(RouterError, match="text router"):
        again.probabilities(conversations, None)


def test_hidden_states_do_not_depend_on_the_batch(llama: torch.nn.Module, tokenizer: object) -> None:
    conversations = [asks("short"), asks("a rather longer turn than that"), asks("mid length")]
    together = hidden_states(llama, tokenizer, conversations, batch=3)  # type: ignore[arg-type]
    alone = hidden_states(llama, tokenizer, conversations, batch=1)  # type: ignore[arg-type]
    assert together.shape == (3, 3, 2, 48)
    assert np.allclose(together, alone, atol=1e-4)


def test_a_trained_probe_reads_what_the_model_hands_it(llama: object, tokenizer: object, tmp_path: Path) -> None:
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    path = turns_file(tmp_path / "t.jsonl", ("social", "reasoning"))
    report = train_router("probe", tmp_path / "p", base=base, turns=path)
    assert report.metrics["balanced_accuracy"] > 0.9
    assert {entry.name for entry in tmp_path.iterdir()} == {"t.jsonl", "p"}
    probe = load_router(tmp_path / "p")
    conversations = [asks(TURNS[0][1]), asks(TURNS[3][1])]
    states = hidden_states(base.model, base.tokenizer, conversations)
    assert isinstance(probe, ProbeRouter) and probe.text is not None
    expected = probe.probabilities(conversations, lambda layers: torch.from_numpy(states[:, [k - 1 for k in layers]]))
    model = GatedWarmthModel(base, {})
    model.router = probe
    got = [list(decision.probabilities.values()) for decision in model.route_many(conversations)]
    assert np.allclose(got, expected, atol=1e-4)


def test_states_read_before_a_kill_are_not_read_again(
    llama: object, tokenizer: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    conversations = [asks(text * times) for times in (3, 1, 2) for _, text in TURNS]
    expected = hidden_states(base.model, base.tokenizer, conversations)
    read: list[int] = []

    def killed_after_two(model: object, tokenizer: object, part: list[list[Message]], title: str) -> np.ndarray:
        read.append(len(part))
        if len(read) == 3:
            raise KeyboardInterrupt
        return hidden_states(base.model, base.tokenizer, part)

    monkeypatch.setattr(states, "PART", 5)
    monkeypatch.setattr(states, "hidden_states", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        states.kept_states(base, conversations, tmp_path)
    assert np.allclose(states.kept_states(base, conversations, tmp_path), expected, atol=1e-4)
    assert read == [5, 5, 5, 5, 3]  # the third was lost, the first two were not read again
    longer = [asks("one more"), *conversations]
    assert np.allclose(states.kept_states(base, longer, tmp_path)[1:], expected, atol=1e-4)
    assert read[5:] == [1]
    other = bases.Base(base.model, base.tokenizer, "made here", "another")
    states.kept_states(other, conversations[:5], tmp_path)
    assert read[6:] == [5]


def test_a_probe_reads_the_last_token_and_the_mean_of_the_turn(llama: object, tokenizer: object) -> None:
    """Against transformers' own hidden states: of the turn's own text, in the first turn and in a later one."""
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    later = [*asks("one"), {"role": "assistant", "content": "two"}, *asks("three, four")]
    for messages in (asks("one"), later):
        prompt = prompt_of(tokenizer, messages)  # type: ignore[arg-type]
        ids = torch.tensor([prompt.ids[: prompt.response_start]])
        states = base.model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].detach()
        text = tokenizer.encode(messages[-1]["content"])  # type: ignore[attr-defined]
        start = next(k for k in range(len(prompt.ids), 0, -1) if prompt.ids[k : k + len(text)] == text)
        found = hidden_states(base.model, base.tokenizer, [messages])[0, 1]
        assert np.allclose(found[0], states[-1], atol=1e-5)
        assert np.allclose(found[1], states[start:].mean(0), atol=1e-5)


def test_a_conversation_hands_a_probe_what_a_fresh_prompt_would(llama: object, tokenizer: object) -> None:
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    model = GatedWarmthModel(base, {})
    talk = Conversation(model)
    talk.say("first turn", {}, max_new_tokens=3, do_sample=False)
    talk.messages.append({"role": "user", "content": "second turn"})
    found = talk._hidden(prompt_of(tokenizer, talk.messages), [1, 3])  # type: ignore[arg-type]
    again = talk._hidden(prompt_of(tokenizer, talk.messages), [1, 3])  # type: ignore[arg-type]
    expected = hidden_states(base.model, base.tokenizer, [talk.messages])[:, [0, 2]]
    assert np.allclose(found, expected, atol=1e-4) and np.allclose(again, expected, atol=1e-4)


def test_an_override_does_not_move_what_a_probe_reads(llama: object, tokenizer: object) -> None:
    base = bases.Base(llama, tokenizer, "made here", "tiny")  # type: ignore[arg-type]
    model = GatedWarmthModel(base, {"warmth": acting_adapter(llama, 4, seed=1)})  # type: ignore[arg-type]
    expected = hidden_states(base.model, base.tokenizer, [asks("hello")])[:, [0, 2]]
    with model.override(warmth=1.0):
        prefill = Prefill(model, [prompt_of(tokenizer, asks("hello"))])  # type: ignore[arg-type]
        assert np.allclose(prefill.hidden([1, 3]), expected, atol=1e-4)
    model.unwrap()


# --- calibration


def test_clopper_pearson_by_hand() -> None:
    assert binomial_upper(0, 10, 0.05) == pytest.approx(1 - 0.05 ** (1 / 10))
    assert binomial_upper(10, 10, 0.05) == 1.0
    upper = binomial_upper(3, 50, 0.1)
    assert binom.cdf(3, 50, upper) == pytest.approx(0.1)


def test_leak_threshold_by_hand() -> None:
    """60 reasoning turns: none may leak at 5 % and 95 % (59 are needed), so the gate opens just above the worst one."""
    reasoning, social = np.linspace(0.0, 0.6115, 60), np.full(20, 0.9)
    table, labels = np.concatenate([reasoning, social]), np.array([False] * 60 + [True] * 20)
    found = threshold_for_leak(table, labels, 0.05, 0.05)
    assert (found.threshold, found.leaks, found.turns, found.needed) == (0.612, 0, 60, 59)
    assert found.bound == pytest.approx(1 - 0.05 ** (1 / 60))
    few = threshold_for_leak(table[2:], labels[2:], 0.05, 0.05)
    assert not few.certified and "too few" in few.line()
    wrong = threshold_for_leak(np.ones(100), np.zeros(100, dtype=bool), 0.05, 0.05)
    assert wrong.threshold is None and wrong.leaks == 100 and "no threshold" in wrong.line()


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=200),
    st.floats(0.01, 0.5),
    st.floats(0.01, 0.5),
)
def test_leak_threshold_is_the_smallest_certified_one(values: list[float], alpha: float, delta: float) -> None:
    table = np.array(values)
    found = threshold_for_leak(table, np.zeros(len(table), dtype=bool), alpha, delta, steps=50)
    bounds = [binomial_upper(int((table >= step / 50).sum()), len(table), delta) for step in range(51)]
    certified = [step / 50 for step, bound in enumerate(bounds) if bound <= alpha]
    assert found.threshold == (min(certified) if certified else None)
    if found.threshold is not None:
        assert found.bound <= alpha and found.leaks == int((table >= found.threshold).sum())


def test_the_leak_bound_holds_as_often_as_it_says() -> None:
    """Routers with a known leak rate above alpha at every threshold under 1: certified at most delta of the time."""
    rng = np.random.default_rng(0)
    alpha, delta, trials = 0.1, 0.2, 400
    wrong = 0
    for _ in range(trials):
        found = threshold_for_leak(rng.random(80), np.zeros(80, dtype=bool), alpha, delta, steps=100)
        wrong += found.threshold is not None and 1 - found.threshold > alpha  # uniform: the true rate at t is 1 - t
    assert wrong / trials < delta + 3 * np.sqrt(delta * (1 - delta) / trials)


def test_metrics_by_hand() -> None:
    table = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
    targets = np.array([0, 0, 1, 1])
    found = metrics(table, targets, [False, True, False, True], ["a", "b", "a", "b"])
    assert found["accuracy"] == 0.75 and found["hard_accuracy"] == 0.5 and found["hard_turns"] == 2
    assert found["brier"] == pytest.approx((0.01 + 0.16 + 0.04 + 0.49) / 4)
    assert found["auroc"] == 0.75
    assert found["patterns"] == {"a": {"turns": 2, "accuracy": 1.0}, "b": {"turns": 2, "accuracy": 0.5}}
    assert balanced_accuracy(np.array([0, 0, 0]), np.array([0, 0, 1])) == 0.5
    assert auroc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert auroc(np.array([0.5]), np.array([True])) is None
    confidence, right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, True, True, False])
    assert expected_calibration_error(confidence, right) == pytest.approx(0.05)


def test_calibration_mends_overconfidence() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 1)) * 2
    targets = (rng.random(4000) > softmax_to_last(true)[:, 0]).astype(int)
    scale, shift = fit_calibration(true * 5 + 1, targets)
    assert scale == pytest.approx(0.2, rel=0.1) and shift[0] == pytest.approx(-0.2, abs=0.15)
