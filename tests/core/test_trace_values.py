"""Traces as plain tensors and their differences, against TransformerLens' own caches of both runs."""

from __future__ import annotations

import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision

SPECS = zoo.available(["gpt2", "llama", "gptj"])


@pytest.fixture(params=SPECS, ids=str)
def model(request):
    return zoo.build(request.param)


def own_cache(model, tokens, hooks=()):
    with torch.no_grad(), full_precision(), model.hooks(fwd_hooks=list(hooks)):
        return model.run_with_cache(tokens)


def test_a_difference_is_that_of_the_models_own_caches(model):
    tokens = zoo.tokens(model)
    other = tokens.flip(0) if len(tokens) > 1 else (tokens + 1) % zoo.D_VOCAB
    network = tj.ResidualNetwork(model, "head")
    change = network.trace(other) - network.trace(tokens)
    (logits, after), (clean, before) = own_cache(model, other), own_cache(model, tokens)
    assert torch.allclose(change.logits, logits - clean, atol=1e-9) and change.is_difference
    cache = tj.to_activation_cache(change)
    assert "ln_final.hook_scale" not in cache and {"blocks.1.hook_resid_post", "blocks.0.hook_attn_out"} <= set(cache)
    for name, value in cache.items():
        if not name.endswith("hook_result"):
            assert torch.allclose(value, after[name] - before[name], atol=1e-9), name
    wanted = after.decompose_resid(-1) - before.decompose_resid(-1)
    assert torch.allclose(cache.decompose_resid(-1), wanted, atol=1e-9)
    first = cache.apply_slice_to_batch_dim(0)
    for call in (lambda: cache.accumulated_resid(-1, apply_ln=True), lambda: first.apply_ln_to_stack(wanted)):
        with pytest.raises(ValueError, match="no norm scale of its own"):
            call()
    assert torch.equal(change["resid_post", -1], change["final_post"]) and ("mlp_out", 0) in change
    assert torch.allclose(change["L0H1_out"], network.trace(other)["L0H1_out"] - network.trace(tokens)["L0H1_out"])
    frame = change.to_dataframe()
    row = frame[(frame.label == "1_pre") & (frame.batch == 0) & (frame.pos == 2)]
    assert row.length.item() == pytest.approx(float((after["resid_pre", 1] - before["resid_pre", 1])[0, 2].norm()))


def test_frozen_values_are_those_of_the_trace_and_need_no_model(model, tmp_path):
    trace = tj.ResidualNetwork(model).trace(zoo.tokens(model))
    frozen = trace.freeze()
    assert not frozen.is_difference and frozen.labels == trace.labels
    assert all(torch.equal(frozen[label], trace[label]) for label in trace.labels)
    same = tj.to_activation_cache(frozen), tj.to_activation_cache(trace)
    assert set(same[0]) == set(same[1]) and all(torch.equal(same[0][name], same[1][name]) for name in same[1])
    loaded = tj.load(frozen.save(tmp_path / "trace.safetensors"))
    assert loaded.network is None and torch.equal(loaded["mlp_out", 1], trace["1_mlp_out"])
    assert not bool((loaded - trace)["final_post"].any())
    with pytest.raises(ValueError, match="needs the model, which a loaded result does not have"):
        tj.to_activation_cache(loaded)
    with pytest.raises(ValueError, match="read from the traces themselves"):
        frozen["L0N3_out"]
    trace["final_post"].zero_()
    assert bool(frozen["final_post"].any())


def test_runs_under_hooks_are_subtracted_with_what_hooks_add(model):
    tokens = zoo.tokens(model)
    network = tj.ResidualNetwork(model)
    clean = network.trace(tokens)
    push = lambda value, hook: value + 1.0  # noqa: E731
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", push)]):
        change = network.trace(tokens) - clean.freeze()
    edits = [label for label in change if label.startswith("edit:")]
    assert len(edits) == 1 and torch.allclose(change[edits[0]], torch.ones_like(change["1_pre"]))
    back = clean - network.trace(tokens)
    assert not bool(back["1_pre"].any()) and bool(change["1_pre"].any())


def test_what_is_not_of_one_shape_is_refused(model):
    network = tj.ResidualNetwork(model)
    tokens = zoo.tokens(model)
    trace = network.trace(tokens)
    with pytest.raises(ValueError, match="the same numbers of prompts and tokens"):
        trace - network.trace(tokens[:, :-1])
    with pytest.raises(ValueError, match="the same labels and width"):
        trace - network.at("head").trace(tokens)
    with pytest.raises(TypeError):
        trace - 3
