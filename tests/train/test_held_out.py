"""Which turns a router learns from and which it is measured on: no turn is both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gatedwarmth.data import Message, Turn, load_conversations
from gatedwarmth.train.held_out import HeldOut, read_held_out
from gatedwarmth.train.turns import CHANGED_SUBJECT, labelled, read_turns


def asks(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_a_changed_subject_keeps_label_and_split_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    """Every self-contained test turn is there a second time, and some training turns; turns of three words are not."""
    exchange = [*asks("Is 7 prime?"), {"role": "assistant", "content": "Yes."}]
    written = [
        {"id": f"t-{number:03d}", "label": label, "text": f"{text} {number}", "context": context}
        for number in range(40)
        for label, text, context in [
            ("social", "I miss my old street", []) if number % 3 else ("reasoning", "and 9?", exchange)
        ]
    ]
    written.append({"id": "t-108", "label": "social", "text": "still too short", "context": []})
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in written))
    data = read_turns(path, ("warmth", "neutral"))
    train = [turn for turn in data.turns if turn.pattern == CHANGED_SUBJECT]
    test = list(read_held_out(path, ("warmth", "neutral")).elsewhere["after another subject"].turns)
    alone = {line["id"] for line in written if line["label"] == "social" and line["id"] != "t-108"}
    assert {turn.id for turn in test} == {i for i in alone if i[-1] in "89"}
    assert train and {turn.id for turn in train} < {i for i in alone if i[-1] not in "789"}
    assert all(turn.label == "social" and turn.context == exchange for turn in [*train, *test])
    assert len(data.turns) == len(written) + len(train)


def test_a_test_turn_never_stands_behind_a_training_exchange() -> None:
    learnt = {json.dumps(turn.context) for turn in read_turns(None, ("warmth", "neutral")).turns
              if turn.pattern == CHANGED_SUBJECT}  # fmt: skip
    held = read_held_out(None, ("warmth", "neutral")).elsewhere["after another subject"]
    told = {json.dumps(turn.context) for turn in held.turns}
    assert len(learnt) > 1000 and len(told) > 100 and not learnt & told


def test_what_is_held_out_is_nothing_that_is_learnt() -> None:
    data = read_turns(None, ("warmth", "neutral"))
    held = read_held_out(None, ("warmth", "neutral"))
    learnt = {turn.text for turn in data.part("train").turns}
    assert not learnt & {turn.text for part in (held.as_written, *held.elsewhere.values()) for turn in part.turns}
    talk = load_conversations()[7]
    turns = [turn for turn in held.elsewhere["conversations"].turns if turn.id.startswith(f"{talk.id}-")]
    assert [turn.text for turn in turns] == [*talk.turns, talk.question.question]
    assert [turn.label for turn in turns] == ["social"] * len(talk.turns) + ["reasoning"]
    assert [message["content"] for message in turns[-1].context[::2]] == list(talk.turns)


def test_rates_elsewhere_count_the_turns_of_their_own_set() -> None:
    data = labelled([Turn(f"t-{k}", "x", label, False, False, "plain", []) for k, label in enumerate(
        ["social", "reasoning", "social", "reasoning", "reasoning", "reasoning"])], ("warmth", "neutral"))  # fmt: skip
    held = HeldOut(data.at([0, 1]), {"first": data.at([2, 3, 4]), "second": data.at([5])})
    warmth = np.array([0.9, 0.1, 0.2, 0.7, 0.3, 0.5])
    found = held.metrics(np.stack([warmth, 1 - warmth], axis=1))
    assert found["turns"] == 2 and found["accuracy"] == 1.0
    assert found["elsewhere"] == {
        "first": {"reasoning": 2, "leak_rate": 0.5, "social": 1, "shut_rate": 1.0},
        "second": {"reasoning": 1, "leak_rate": 1.0, "social": 0, "shut_rate": None},
    }
