"""Merged stretches: equal to the gated layers up to rounding, the base's own bits back afterwards."""

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from gatedwarmth import GatedWarmthModel
from gatedwarmth.bench.subjects import acting_adapter
from gatedwarmth.gates import GateSchedule
from gatedwarmth.injection import fresh_adapter

GATES = torch.tensor([[0.7, 0.2]])


def model_of(dtype=torch.float32, **settings):
    base = tiny_llama().to(dtype)
    adapters = {"warmth": acting_adapter(base, 4, seed=1), "neutral": acting_adapter(base, 3, seed=2)}
    model = GatedWarmthModel.from_pretrained(base, adapters, tokenizer=byte_tokenizer(), **settings)
    model.merging.after = 3
    return model


@pytest.fixture
def ids():
    return torch.randint(4, 250, (2, 6), generator=torch.Generator().manual_seed(0))


def logits_of(model, ids, gates, steps=9):
    """Logits of every step, and at which steps the base was merged."""
    seen = []
    handle = model.base.register_forward_hook(lambda m, i, o: seen.append(model.merging.merged))
    schedule = GateSchedule(gates.expand(len(ids), -1), start=4)
    out = model.generate_with(
        schedule, ids.shape[1], input_ids=ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    handle.remove()
    return torch.stack(out.logits), seen


# in bfloat16 the base without its traits is 5e-2 away, so 8e-3 tells whether the traits are in
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_equals_the_gated_layers_and_restores_every_bit(ids, dtype, close):
    model, plain = model_of(dtype), model_of(dtype, merge=False)
    before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    merged, seen = logits_of(model, ids, GATES)
    expected, never = logits_of(plain, ids, GATES)
    assert seen == [False] * 4 + [True] * 5  # the prompt, three steps, then merged to the end
    assert not any(never)
    assert (merged - expected).abs().max() < close * expected.abs().max().clamp(min=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.base.state_dict().items())


def test_rows_with_gates_of_their_own_are_never_merged(ids):
    _, seen = logits_of(model_of(), ids, torch.tensor([[0.7, 0.2], [0.6, 0.3]]))
    assert not any(seen)


def test_an_error_in_the_middle_gives_the_weights_back(ids):
    model = model_of()
    before = [p.detach().clone() for p in model.base.parameters()]

    def stop(input_ids, scores):
        if model.merging.merged:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        schedule = GateSchedule(GATES.expand(2, -1), start=4)
        model.generate_with(schedule, 6, input_ids=ids, max_new_tokens=9, min_new_tokens=9, logits_processor=[stop])
    assert not model.merging.merged
    assert all(torch.equal(p, own) for p, own in zip(model.base.parameters(), before, strict=True))


def test_a_tied_weight_is_left_alone(ids):
    """A gated output layer that shares its weight with the embeddings: merging it would change what tokens mean."""
    base = tiny_llama()
    adapter = fresh_adapter(base, 2, 4.0, ["lm_head", "q_proj"])
    model = GatedWarmthModel.from_pretrained(base, {"warmth": adapter}, tokenizer=byte_tokenizer())
    model.merging.after = 1
    _, seen = logits_of(model, ids, torch.tensor([[0.5]]))
    assert not any(seen)


def test_too_little_memory_means_no_merging(ids, monkeypatch):
    monkeypatch.setattr("gatedwarmth.merging.free_bytes", lambda device: 1000)
    _, seen = logits_of(model_of(), ids, GATES)
    assert not any(seen)
