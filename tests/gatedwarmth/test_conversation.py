"""One cache over many turns: whatever happens to the conversation, the cache equals a full recompute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer, tiny_llama

from gatedwarmth import GatedWarmthModel
from gatedwarmth.conversation import Conversation
from gatedwarmth.errors import ConversationError
from gatedwarmth.gates import Policy

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model(adapters: dict[str, Path]) -> GatedWarmthModel:
    return GatedWarmthModel.from_pretrained(tiny_llama(), adapters, tokenizer=byte_tokenizer())


def distance_to_recompute(talk: Conversation) -> float:
    """Largest difference between cached keys and values and those of one pass with the same gates per token."""
    fresh = talk.model(torch.tensor([talk.ids]), gates=talk.gates[None], use_cache=True).cache
    pairs = zip(talk.cache.layers, fresh.layers, strict=True)
    return max(max((a.keys - b.keys).abs().max().item(), (a.values - b.values).abs().max().item()) for a, b in pairs)


gate = st.floats(0, 1).map(lambda value: round(value, 2))
step = st.tuples(
    st.sampled_from(["say", "say", "again", "edit", "undo"]), st.text("ab cd?", min_size=1, max_size=12), gate, gate
)


def random_talk(model: GatedWarmthModel, steps: list[tuple[str, str, float, float]]) -> Conversation:
    talk = Conversation(model)
    for kind, text, warmth, neutral in steps:
        gates, text = {"warmth": warmth, "neutral": neutral}, "." + text
        spoken = sum(message["role"] == "user" for message in talk.messages)
        if kind == "say" or not spoken:
            talk.say(text, gates, **GREEDY)
        elif kind == "again":
            talk.regenerate(gates, **GREEDY)
        elif kind == "edit":
            talk.edit(spoken // 2, text, gates, **GREEDY)
        else:
            talk.undo()
    return talk


@given(st.lists(step, min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_any_history_equals_recompute(model: GatedWarmthModel, steps: list[tuple[str, str, float, float]]) -> None:
    assert distance_to_recompute(random_talk(model, steps)) < 1e-4


@pytest.mark.slow
@given(st.lists(step, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_history_equals_recompute_in_two_hundred_cases(
    model: GatedWarmthModel, steps: list[tuple[str, str, float, float]]
) -> None:
    assert distance_to_recompute(random_talk(model, steps)) < 1e-4


def test_a_reply_is_what_the_model_says_to_the_whole_history(model: GatedWarmthModel) -> None:
    talk = Conversation(model)
    gates = {"warmth": 0.5, "neutral": 0.5}
    talk.say("first", gates, **GREEDY)
    spoken = talk.say("second", gates, **GREEDY)
    one_gate = torch.full((1, len(talk.ids), 2), 0.5)
    one_gate[:, talk.gates.eq(0).all(-1).nonzero().flatten()] = 0.0
    assert torch.equal(one_gate[0], talk.gates)
    assert spoken.gates == gates


def test_saved_conversation_goes_on_the_same(model: GatedWarmthModel, tmp_path: Path) -> None:
    talk = Conversation(model)
    talk.say("hello", {"warmth": 0.8}, **GREEDY)
    talk.save(tmp_path / "talk.json")
    resumed = Conversation.load(tmp_path / "talk.json", model)
    replies = [t.say("and then?", {"neutral": 0.9}, **GREEDY) for t in (talk, resumed)]
    assert replies[0] == replies[1]
    assert torch.equal(talk.gates, resumed.gates)


def test_handoff_marks_the_tokens_after_its_opening(adapters: dict[str, Path]) -> None:
    class Undecided:
        traits = ("warmth", "neutral")

        def probabilities(self, conversations: object, read_hidden: object) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]])

        def describe(self) -> str:
            return "always warm"

    model = GatedWarmthModel.from_pretrained(
        tiny_llama(), adapters, Undecided(), Policy("handoff", tokens=3), tokenizer=byte_tokenizer()
    )
    model.base.generation_config.eos_token_id = None
    talk = Conversation(model)
    talk.say("go", max_new_tokens=8, do_sample=False)
    reply = talk.gates[-7:]
    assert reply[:3].tolist() == [[1.0, 0.0]] * 3
    assert reply[3:].tolist() == [[0.0, 1.0]] * 4
    assert distance_to_recompute(talk) < 1e-4


def test_overflow_says_how_and_leaves_the_conversation_alone(model: GatedWarmthModel) -> None:
    talk = Conversation(model)
    talk.say("short", {"warmth": 1.0}, **GREEDY)
    before = list(talk.messages)
    with pytest.raises(ConversationError, match="window=True"):
        talk.say("x" * 600, {"warmth": 1.0}, **GREEDY)
    assert talk.messages == before


def test_window_drops_the_oldest_turns(model: GatedWarmthModel) -> None:
    talk = Conversation(model, window=True)
    for letter in "abcd":
        talk.say(letter * 150, {"warmth": 1.0}, **GREEDY)
    assert talk.messages[0]["content"].startswith("c")
    assert distance_to_recompute(talk) < 1e-4


@pytest.mark.parametrize("text", ["", "   "])
def test_empty_turn_is_refused(model: GatedWarmthModel, text: str) -> None:
    with pytest.raises(ConversationError, match="empty"):
        Conversation(model).say(text, {"warmth": 1.0})


def test_a_text_in_place_of_messages_is_refused(model: GatedWarmthModel) -> None:
    with pytest.raises(ConversationError, match="list of messages"):
        model.chat("hi", gates={"warmth": 1.0})  # type: ignore[arg-type]
