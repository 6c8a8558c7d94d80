"""Steering with the detached map of another prompt, against a model whose constants hooks overwrite."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import oracles
import overwritten
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.calculus import full_precision
from tl_jets.detached_map import detached_jacobian
from tl_jets.interventions.steering import steering_hooks

RAW = [spec for spec in zoo.available(["gpt2", "pythia", "llama", "gemma2"]) if spec.processing == "raw"]


def run(model: Any, tokens: Tensor, hooks: list) -> Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("spec", [spec for spec in zoo.available(zoo.CORE) if spec.processing == "raw"], ids=str)
def test_the_hooks_of_every_family_fire(spec):
    model = zoo.build(spec)
    tokens, steer = zoo.tokens(model, batch=1, pos=4), zoo.tokens(model, batch=1, pos=2, seed=1)
    plain, steered = (
        run(model, tokens, []),
        run(model, tokens, steering_hooks(model, steer, output="1_pre", strength=0.5)),
    )
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert float((steered - plain)[:, -1].abs().max()) > 1e-2


@pytest.mark.parametrize("spec", RAW, ids=str)
def test_no_strength_no_change(spec):
    """Bit-equal at strength 0, the same to rounding on its own prompt, and different otherwise."""
    model = zoo.build(spec)
    tokens, steer = zoo.tokens(model, batch=2, pos=6), zoo.tokens(model, batch=1, pos=4, seed=1)
    network = ResidualNetwork(model)
    plain = run(model, tokens, [])
    hooks_before = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    assert torch.equal(run(model, tokens, steering_hooks(network, steer, output="1_pre", strength=0.0)), plain)
    steered = run(model, tokens, steering_hooks(network, steer, output="1_pre", strength=0.5))
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    assert float((steered - plain)[:, -1].abs().max()) > 1e-2
    assert [len(point.fwd_hooks) for point in model.hook_dict.values()] == hooks_before
    assert torch.equal(run(model, tokens, []), plain)
    with full_precision():
        own = run(model, steer, [])
        found = run(model, steer, steering_hooks(network, steer, output="1_pre", strength=0.7))
    assert oracles.relative_error(found, own) < 1e-12


@pytest.mark.parametrize(
    ("spec", "output"),
    [
        (spec, output)
        for spec in overwritten.SPECS
        for output in {
            "gpt2": ["final_post", "1_pre", "1_mlp_out", "0_attn_out"],
            "llama": ["1_mlp_out"],
            "pythia": ["0_attn_out"],
        }.get(spec.name, [])
    ],
    ids=str,
)
def test_it_is_the_mixture_with_the_overwritten_model(spec, output):
    model = zoo.build(spec)
    steer, tokens = zoo.tokens(model, batch=1, pos=5), zoo.tokens(model, batch=2, pos=5, seed=1)
    # TransformerLens' name of the label, written out.
    name = {"final_post": f"blocks.{len(model.blocks) - 1}.hook_resid_post", "1_pre": "blocks.1.hook_resid_pre"}.get(
        output, "blocks." + output.replace("_", ".hook_", 1)
    )
    frozen = overwritten.overwriting(model, steer, spec.name in overwritten.GATED)
    with torch.no_grad(), full_precision():
        _, stream = overwritten.first_stream(model, tokens)
        box: list[Tensor] = []
        for row in stream:
            overwritten.first_stream(model, steer, row[None], [*frozen, (name, lambda own, hook: box.append(own))])
        there = torch.cat([value[:, -1] for value in box])

        def mix(own: Tensor, hook: Any) -> Tensor:
            own = own.clone()
            own[:, -1] = 0.3 * own[:, -1] + 0.7 * there
            return own

        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, mix)])
        found = model.run_with_hooks(tokens, fwd_hooks=steering_hooks(model, steer, output=output, strength=0.7))
    assert oracles.relative_error(found, expected) < 1e-11


@pytest.fixture(params=[spec for spec in RAW if spec.name in ("gpt2", "llama")], ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


@pytest.mark.parametrize(("n", "length"), [(3, 6), (6, 4), (2, 2)])
def test_prompts_of_other_lengths_meet_at_the_end(model, n, length):
    """The first position stands for the first, the others are aligned at the end: written out for every position."""
    network = ResidualNetwork(model)
    steer, tokens = zoo.tokens(model, batch=1, pos=n), zoo.tokens(model, batch=2, pos=length, seed=1)
    J = detached_jacobian(network, steer, output="1_pre", wrt="0_pre", ordinary=False)
    trace = network.trace(tokens)
    own = trace["1_pre"]
    maps, x = J.materialize()[0, 0].transpose(0, 1), trace["0_pre"]
    for start in (None, 0, 2):
        seen: list[Tensor] = []
        hooks = steering_hooks(network, steer, output=1, strength=1.0, start=start)
        with full_precision():
            keep = lambda stream, hook, seen=seen: seen.append(stream.clone())  # noqa: E731
            run(model, tokens, [*hooks, ("blocks.1.hook_resid_pre", keep)])
        for p in range(length):
            if p == 0 or p < (length - 1 if start is None else start):
                assert oracles.relative_error(seen[-1][:, p], own[:, p]) < 1e-12
                continue
            expected = J.bias[0, 0] + x[:, 0] @ maps[0].T
            for j in range(1, n):
                if p - (n - 1) + j >= 1:
                    expected = expected + x[:, p - (n - 1) + j] @ maps[j].T
            assert oracles.relative_error(seen[-1][:, p], expected) < 1e-11


OPTIONS = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}


def generated(model: Any, tokens: Tensor, hooks: list, cached: bool) -> Tensor:
    with model.hooks(fwd_hooks=hooks):
        return model.generate(tokens, use_past_kv_cache=cached, **OPTIONS)


def forgets_the_prompt(model: Any, tokens: Tensor) -> bool:
    """Whether TransformerLens' own generation, with no hooks, says something else with a key-value cache than without."""
    return not torch.equal(generated(model, tokens, [], True), generated(model, tokens, [], False))


def test_the_models_own_generation_is_the_same_with_a_cache(model, request):
    """No code of ours: red if a new release of TransformerLens or transformers breaks it, or mends what is known to be broken."""
    lens, transformers = (tuple(map(int, version(n).split(".")[:2])) for n in ("transformer_lens", "transformers"))
    if lens <= (4, 3) and transformers >= (5, 24) and hasattr(model, "original_model"):
        reason = "TransformerLens up to 4.3 does not fill the cache of transformers 5.24"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    assert not forgets_the_prompt(model, zoo.tokens(model, batch=2, pos=5, seed=3))


@pytest.mark.parametrize("start", [None, 4])
def test_generation_with_and_without_a_cache(model, start):
    """A cache that the model itself makes nothing of is refused, and generation without one goes on."""
    tokens, steer = zoo.tokens(model, batch=2, pos=5, seed=3), zoo.tokens(model, batch=1, pos=3, seed=4)
    plain = generated(model, tokens, [], False)
    hooks = steering_hooks(model, steer, output="1_pre", strength=0.8, start=start)
    texts = {}
    for cached in (True, False):
        if cached and forgets_the_prompt(model, tokens):
            with pytest.raises(ValueError, match="a model that fills it"):
                generated(model, tokens, hooks, cached)
            continue
        texts[cached] = generated(model, tokens, hooks, cached)
        assert texts[cached].shape == (2, 11) and not torch.equal(texts[cached], plain)
        # A second prompt through the same hooks begins anew.
        assert torch.equal(generated(model, tokens, hooks, cached), texts[cached])
    if start is not None:
        # Token by token, the whole prompt each time, by hand: from a fixed position on, a cache changes nothing.
        grown = tokens
        for _ in range(6):
            grown = torch.cat([grown, run(model, grown, hooks)[:, -1:].argmax(-1)], dim=1)
        assert all(torch.equal(text, grown) for text in texts.values())
    assert torch.equal(generated(model, tokens, [], False), plain)


def test_a_cache_that_attention_does_not_fill_is_refused(monkeypatch):
    """What TransformerLens does with transformers 5.24, brought about with any: attention makes nothing of its cache."""
    model = zoo.build(next(spec for spec in RAW if spec.name == "llama" and spec.world == "bridge"))
    tokens, steer = zoo.tokens(model, batch=2, pos=5, seed=3), zoo.tokens(model, batch=1, pos=3, seed=4)
    for block in model.blocks:
        monkeypatch.setattr(block.attn, "_update_kv_cache", lambda k, v, **kwargs: (k, v))
    assert forgets_the_prompt(model, tokens)
    hooks = steering_hooks(model, steer, output="1_pre", strength=0.8, start=4)
    with pytest.raises(ValueError, match=r"a model that fills it.*use_past_kv_cache=False.*transformers<5\.24"):
        generated(model, tokens, hooks, True)
    grown = tokens
    for _ in range(6):
        grown = torch.cat([grown, run(model, grown, hooks)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated(model, tokens, hooks, False), grown)


def test_a_prompt_of_one_token_is_no_cache(model):
    """Where the model fills its cache, generation from one token is steered from the second on, again and again."""
    tokens, steer = zoo.tokens(model, batch=2, pos=1, seed=3), zoo.tokens(model, batch=1, pos=3, seed=4)
    hooks = steering_hooks(model, steer, output="1_pre", strength=0.8, start=1)
    if forgets_the_prompt(model, zoo.tokens(model, batch=2, pos=5, seed=3)):
        with pytest.raises(ValueError, match="from two tokens or more"):
            generated(model, tokens, hooks, False)
        return
    for cached in (True, False, True):
        grown = tokens
        for _ in range(6):
            grown = torch.cat([grown, run(model, grown, hooks)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(generated(model, tokens, hooks, cached), grown)


def test_gradients_pass(model):
    tokens, steer = zoo.tokens(model, batch=1, pos=4), zoo.tokens(model, batch=1, pos=3, seed=1)
    hooks = steering_hooks(model, steer, output="1_pre", strength=1.0)
    _, stream = overwritten.first_stream(model, tokens)
    stream = stream.detach().clone().requires_grad_()
    seen: list[Tensor] = []
    with model.hooks([("blocks.0.hook_resid_pre", lambda own, hook: stream), *hooks]):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda own, hook: seen.append(own))])
    J = detached_jacobian(model, steer, output="1_pre", wrt="0_pre", ordinary=False)
    (gradient,) = torch.autograd.grad(seen[0][0, -1, 5], stream)
    assert oracles.relative_error(gradient[0, -1], J.materialize()[0, 0, 5, -1]) < 1e-12


def test_what_is_refused(model):
    steer, tokens = zoo.tokens(model, batch=1, pos=3), zoo.tokens(model, batch=1, pos=4)
    for options, message in (
        ({"output": "1_mid"}, "Steering reads and writes the streams '0_pre'"),
        ({"output": "L1H0_out"}, "Steering reads and writes"),
        ({"output": 9}, "layers must be"),
        ({"output": 1, "wrt": "2_pre"}, "Steering reads|must come after"),
        ({"output": 1, "start": -1}, "start must be"),
        ({"output": 1, "strength": float("nan")}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            steering_hooks(model, steer, **{"strength": 0.5} | options)
    for bad in (zoo.tokens(model, batch=2, pos=3), zoo.tokens(model, batch=1, pos=1)):
        with pytest.raises(ValueError, match="one prompt of at least two tokens"):
            steering_hooks(model, bad, output=1, strength=0.5)
    decoder = Decoder(Norm("none"), torch.eye(4), torch.zeros(4))
    with pytest.raises(NotImplementedError, match="plain callables has none"):
        steering_hooks(
            CallableModel(torch.nn.Embedding(5, 4), [{"0_mlp": torch.tanh}], decoder), steer, output=1, strength=1.0
        )
    read, pattern, mix = (function for _, function in steering_hooks(model, steer, output=1, strength=0.5))
    stream = ResidualNetwork(model).trace(tokens)["0_pre"]
    read(stream[:, -1:], None)
    with pytest.raises(ValueError, match="cache must be filled under the steering hooks"):
        pattern(torch.zeros(1, 4, 1, 4), None)
    with pytest.raises(ValueError, match="did not fire"):
        mix(stream[:, -1:], None)


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_a_trained_model_leaves_its_answer_with_the_strength():
    model = zoo.load_stories("bridge")
    tokens = model.to_tokens("Once upon a time, there was a little")
    plain = run(model, tokens, [])[0, -1].log_softmax(-1)
    divergences = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        hooks = steering_hooks(model, "The big red dog was very happy and", output=3, strength=strength)
        steered = run(model, tokens, hooks)[0, -1].log_softmax(-1)
        divergences.append(float((plain.exp() * (plain - steered)).sum()))
    assert divergences[0] == 0 and divergences == sorted(divergences) and divergences[-1] > 1
