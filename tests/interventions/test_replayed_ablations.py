"""Ablations that are stacked along the batch and start at the ablated stage, against one hooked forward pass each."""

from __future__ import annotations

import pytest
import torch
import zoo

from tl_jets import ResidualNetwork
from tl_jets.calculus import full_precision
from tl_jets.interventions import replays
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.interventions.hooks import ablation_hooks

NAMES = ["gpt2", "llama", "gemma2", "pythia", "bloom", "sandwich"]
FAMILIES = [spec for spec in zoo.available(NAMES) if spec.processing == "raw"]
STEPS = ["1_mlp", "L0H2", "0_attn", "L1H1", "0_mlp", "0_block", "L1N7", "1_attn"]


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by one at every forward pass of a model."""

    def count(model):
        found, forward = [], type(model).forward
        monkeypatch.setattr(type(model), "forward", lambda *args, **given: found.append(1) or forward(*args, **given))
        return found

    return count


def by_hand(model, tokens, mask, runs):
    """Changes of logits before a softcap at each prompt's last real token, by one hooked pass per run."""
    last = (torch.arange(tokens.shape[1]) * mask).argmax(1)

    def run(hooks):
        box = []
        handle = model.unembed.register_forward_hook(lambda module, args, out: box.append(out))
        with torch.no_grad(), full_precision():
            model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
        handle.remove()
        return box[-1][torch.arange(len(tokens)), last]

    clean = run([])
    return torch.stack([run(hooks) - clean for hooks in runs])


def batch(model):
    """Three prompts, one of them padded, of which one ends early."""
    tokens = zoo.tokens(model, batch=3, pos=7)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return tokens, mask


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_they_are_what_hooked_passes_give(spec, passes):
    model = zoo.build(spec)
    net, (tokens, mask) = ResidualNetwork(model), batch(model)
    where = torch.zeros(3, 7, dtype=torch.bool)
    where[:, 2] = True
    trace = net.trace(tokens, attention_mask=mask)
    for place in (None, where):
        wanted = by_hand(model, tokens, mask, [ablation_hooks(model, step, positions=place) for step in STEPS])
        count = passes(model)
        found = ablation_effect(net, trace, STEPS, targets=[3, 11], ablated_positions=None if place is None else 2)
        assert found.labels == STEPS
        # One finds what heads write at a zero stream. Bloom's position biases on a bridge, [batch * head, ...], take no stack.
        assert len(count) == (9 if str(spec) == "bridge-bloom-raw" else 1)
        torch.testing.assert_close(found.logit[:, :, 0], wanted[..., [3, 11]], rtol=0, atol=1e-9)
        assert place is not None or (found.logit.abs() > 1e-4).all()


@pytest.mark.parametrize("spec", [spec for spec in FAMILIES if spec.name in ("gpt2", "llama")], ids=str)
@pytest.mark.parametrize("tokens_at_once", [1, 22, 60])
def test_a_small_stack_gives_the_same(spec, tokens_at_once, monkeypatch):
    model = zoo.build(spec)
    tokens, mask = batch(model)
    whole = ablation_effect(model, tokens, STEPS, attention_mask=mask)
    monkeypatch.setattr(replays, "STACKED_TOKENS", tokens_at_once)
    monkeypatch.setattr(replays, "STACKED_LOGITS", 1)
    parts = ablation_effect(model, tokens, STEPS, attention_mask=mask)
    for name in ("logit", "centered", "kl"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", [spec for spec in FAMILIES if spec.name in ("gpt2", "llama")], ids=str)
def test_the_users_hooks_act_in_ablated_runs(spec, passes):
    """A stream that is doubled by a hook is doubled in every ablated run, of which it is not a constant."""
    model = zoo.build(spec)
    net, (tokens, mask) = ResidualNetwork(model), batch(model)
    own = [("blocks.1.hook_resid_pre", lambda stream, hook: 2 * stream)]
    with model.hooks(fwd_hooks=own):
        hooks = [ablation_hooks(model, step) for step in ("0_mlp", "1_attn")]
        wanted = by_hand(model, tokens, mask, hooks)
        count = passes(model)
        found = ablation_effect(net, tokens, ["0_mlp", "1_attn"], targets=[3, 11], attention_mask=mask)
        assert len(count) == 3
    torch.testing.assert_close(found.logit[:, :, 0], wanted[..., [3, 11]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("broken", ["clean run", "shape"])
def test_what_does_not_take_a_stack_is_run_one_at_a_time(broken, monkeypatch, passes):
    spec = next(spec for spec in FAMILIES if spec.name == "llama")
    model = zoo.build(spec)
    net, (tokens, mask) = ResidualNetwork(model), batch(model)
    wanted = ablation_effect(net, tokens, STEPS, attention_mask=mask)
    writes, view = type(net.view).writes, type(net.view)

    def other(self, recording, stage, stream):
        if broken == "shape" and len(stream) > len(recording.streams["0_pre"]):
            raise RuntimeError("a shape that depends on the batch")
        found = writes(self, recording, stage, stream)
        return found.flip(1) if broken == "clean run" and len(stream) > 3 else found

    monkeypatch.setattr(view, "writes", other)
    count = passes(model)
    found = ablation_effect(net, tokens, STEPS, attention_mask=mask)
    assert len(count) > len(STEPS)
    torch.testing.assert_close(found.logit, wanted.logit, rtol=0, atol=1e-9)
