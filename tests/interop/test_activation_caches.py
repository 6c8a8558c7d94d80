"""Traces and terms as TransformerLens' own caches, compared with what its `run_with_cache` and hooks give."""

from __future__ import annotations

import pytest
import torch
import transformer_lens.patching as patching
import zoo
from transformer_lens import ActivationCache

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.interop import to_activation_cache

SPECS = zoo.available(["gpt2", "llama", "gptj"])


@pytest.fixture(params=SPECS, ids=str)
def model(request):
    return zoo.build(request.param)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def own_cache(model, tokens):
    with torch.no_grad(), full_precision():
        return model.run_with_cache(tokens)


def test_a_trace_is_the_models_own_cache(model):
    tokens = zoo.tokens(model)
    cache, (_, own) = to_activation_cache(tj.ResidualNetwork(model).trace(tokens)), own_cache(model, tokens)
    assert isinstance(cache, ActivationCache)
    assert {"hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "ln_final.hook_scale"} <= set(cache)
    for name, value in cache.items():
        same(value, own[name])
    same(cache["resid_post", -1], own["resid_post", -1])
    trace = tj.ResidualNetwork(model).trace(tokens)
    for name in ("z0", "ln_final.hook_scale"):
        same(trace[name], own[name])
    for n_kept in (1, model.cfg.n_layers):
        same(cache.decompose_resid(n_kept), own.decompose_resid(n_kept))
        same(cache.accumulated_resid(n_kept), own.accumulated_resid(n_kept))
    same(cache.accumulated_resid(-1, apply_ln=True), own.accumulated_resid(-1, apply_ln=True))
    # What a norm inside a block divides by is read when it is asked for.
    same(cache.accumulated_resid(1, apply_ln=True), own.accumulated_resid(1, apply_ln=True))
    if "blocks.1.ln2.hook_scale" in own:
        found, wanted = (each.decompose_resid(1, mlp_input=True, apply_ln=True) for each in (cache, own))
        same(found, wanted)
    sliced = cache.apply_slice_to_batch_dim([0])
    with pytest.raises((KeyError, IndexError)):
        sliced.accumulated_resid(0, apply_ln=True)


def test_heads_are_stacked(model):
    """As TransformerLens stacks them; unless folded, up to what biases give at every position alike, which is in `attn_bias`."""
    tokens = zoo.tokens(model)
    trace = tj.ResidualNetwork(model, granularity="head").trace(tokens)
    cache, (_, own) = to_activation_cache(trace), own_cache(model, tokens)
    found, labels = cache.stack_head_results(return_labels=True)
    with full_precision():
        wanted, own_labels = own.stack_head_results(return_labels=True)
    constant = (wanted - found)[:, :1, :1]
    same(found + constant, wanted)
    assert labels == own_labels
    b_O = getattr(model.blocks[0].attn, "b_O", None)
    left = trace["0_attn_bias"] - (0 if b_O is None else b_O)
    same(constant[: model.cfg.n_heads].sum(0).expand_as(left), left)


def test_logit_attributions_are_right_or_refused(model):
    """On folded weights they sum to the logits; a gain of the final norm, which TransformerLens leaves out, is refused."""
    tokens = zoo.tokens(model)
    trace = tj.ResidualNetwork(model).trace(tokens)
    cache, answers = to_activation_cache(trace), tokens
    stack = cache.decompose_resid()
    if not cache.gain_is_folded:
        with pytest.raises(ValueError, match="gain of ln_final"):
            cache.logit_attrs(stack, answers)
        with pytest.raises(ValueError, match="gain of ln_final"):
            cache.apply_slice_to_batch_dim((0, 1)).logit_attrs(stack, answers)
        return
    norm, W_U = trace.decoder.norm, model.W_U
    logits = norm(trace["final_post"]) @ W_U
    logits = logits - (0 if norm.bias is None else norm.bias @ W_U)
    same(cache.logit_attrs(stack, answers).sum(0), logits.gather(-1, answers[..., None])[..., 0])


@pytest.mark.parametrize("step", ["0_attn", "0_mlp"])
def test_terms_stand_where_the_stream_stands(model, step):
    """The model with one term, without the others: as by a hook that is written by hand."""
    tokens, network = zoo.tokens(model), tj.ResidualNetwork(model)
    step = step if step in {s.label for s in network.steps} else "0_block"
    stage = network.stage(step)
    terms = tj.jet_expand(network, step, centers=list(network.sources), order=1, center_scale="match")(tokens)
    path, following = terms.labels[0], network.next_stream(stage)
    mid = following == "0_mid"
    key = ("resid_mid", 0) if mid else ("resid_pre", 1)
    every = to_activation_cache(terms)
    same(every[key], terms.stack().sum(0))
    same(to_activation_cache(terms, include_remainder=True)[key], network.trace(tokens)[following])
    one = to_activation_cache(terms, paths=[path])
    same(one[key], terms[path])
    same(one["mlp_out", 1], network.trace(tokens)["mlp_out", 1])  # everything else is the run's own
    if mid:
        return
    same(one["resid_post", 0], terms[path])
    metric = lambda logits: logits[0, -1, 3]  # noqa: E731
    with torch.no_grad(), full_precision():
        table = patching.get_act_patch_resid_pre(model, tokens, one, metric)

        def by_hand(stream, hook):
            stream = stream.clone()
            stream[:, 2] = terms[path][:, 2]
            return stream

        wanted = metric(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", by_hand)]))
    same(table[1, 2].double(), wanted.float().double())
    assert abs(float(table[1, 2] - metric(model(tokens)))) > 1e-6


def test_slices_keep_their_cells():
    model = zoo.build(zoo.available(["gpt2"])[0])
    tokens = zoo.tokens(model)
    terms = tj.jet_expand(model, "0_mlp", centers=["embed"], order=0)(tokens)
    part = terms.apply_slice_to_batch_dim([1]).apply_slice_to_pos_dim([0, 4])
    cache = to_activation_cache(part, include_remainder=True)
    same(cache["resid_pre", 1], tj.ResidualNetwork(model).trace(tokens)["1_pre"][1:2, [0, 4]])
    same(cache["attn_out", 1], tj.ResidualNetwork(model).trace(tokens)["1_attn_out"][1:2, [0, 4]])


def test_what_has_no_hook_is_refused():
    model = zoo.build(zoo.available(["gpt2"])[0])
    tokens = zoo.tokens(model)
    trace = tj.ResidualNetwork(model).trace(tokens)
    decoded = tj.jet_expand(model, "ln_final", centers=["embed"], linearize="detached")(trace)
    terms = tj.jet_expand(model, "0_mlp", centers=["embed"], order=0)(trace)
    with pytest.raises(ValueError, match="terms of the decoder"):
        to_activation_cache(decoded)
    with pytest.raises(ValueError, match="a cache of shape"):
        to_activation_cache(terms.apply_slice_to_batch_dim(0))
    with pytest.raises(KeyError, match="No term"):
        to_activation_cache(terms, paths=["pos_embed"])
    with pytest.raises(TypeError, match="A trace has no terms"):
        to_activation_cache(trace, paths=["embed"])


def test_other_results_are_refused(as_users_run_it):
    model = zoo.build(zoo.available(["gpt2"])[0])
    with pytest.raises(TypeError, match="Trace or a JetCache"):
        to_activation_cache(tj.iterative_jet_lens(model, zoo.tokens(model)))
