"""What is given is used or refused: no argument is dropped, and a trace answers for the model that was traced only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets.calculus import full_precision

TOKENS = torch.tensor([[1, 3, 2], [4, 0, 2]])
# Norms whose weights a network holds itself, and one whose weights it holds copies of (1 + Gemma's own, in a bridge).
SHARED = [spec for spec in zoo.available(["gpt2", "llama", "gemma2"]) if spec.processing == "raw"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def callables() -> tj.ResidualNetwork:
    maps, table = normal(2, 4, 4, seed=1), normal(5, 4, seed=2)
    stages = [{"0_mlp": lambda x: torch.tanh(x @ maps[0])}, {"1_mlp": lambda x: torch.tanh(x @ maps[1])}]
    decoder = tj.Decoder(tj.Norm("RMS", eps=1e-3), normal(4, 7, seed=3), normal(7, seed=4))
    return tj.ResidualNetwork(tj.CallableModel(lambda tokens: table[tokens], stages, decoder))


# A trace

CALLED = {
    "expansion": lambda net: tj.jet_expand(net, "1_mlp", centers=["embed"]),
    "decoder": lambda net: tj.jet_expand(net, "ln_final", centers=["embed"]),
    "reorganized": lambda net: tj.paths.reorganized_expansion(net),
    "paths": lambda net: tj.exponential_expansion(net, linearize="detached"),
}


@pytest.mark.parametrize("make", CALLED.values(), ids=CALLED)
def test_a_trace_already_holds_its_mask(make: Callable[[Any], Any]):
    net = callables()
    expansion, trace = make(net), net.trace(TOKENS)
    expansion(trace)
    for given in ({"attention_mask": torch.ones_like(TOKENS)}, {"cache": {}}):
        with pytest.raises(ValueError, match="already holds its attention mask and streams"):
            expansion(trace, **given)
    with pytest.raises(TypeError, match="nonsense"):
        expansion(trace, nonsense=3)


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "lens": tj.iterative_jet_lens,
    "joint": tj.joint_jet_lens,
    "interactions": tj.paths.interactions,
    "expansion": lambda net, trace: tj.jet_expand(net, "ln_final", centers=["embed"])(trace),
    "paths": lambda net, trace: tj.exponential_expansion(net, linearize="detached", max_length=1)(trace),
    "sums": tj.path_sums,
    "jacobian": tj.detached_jacobian,
    "ablation": lambda net, trace: tj.ablation_effect(net, trace, "1_mlp"),
    "path ablation": lambda net, trace: tj.path_ablation(net, trace, "embed > ln_final"),
    "without path": lambda net, trace: tj.interventions.without_path(net, trace, "embed"),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_trace_is_of_the_hooks_under_which_it_was_made(read: Callable[[Any, Any], Any]):
    net = tj.ResidualNetwork(zoo.build(SHARED[0]))
    model, tokens = net.view.model, zoo.tokens(net.view.model)  # type: ignore[attr-defined]
    hooks = [("blocks.0.hook_mlp_out", lambda write, hook: 0 * write)]
    plain = net.trace(tokens)
    with model.hooks(hooks):
        hooked = net.trace(tokens)
        read(net, hooked)
        with pytest.raises(ValueError, match="under the hooks under which it was made"):
            read(net, plain)
    read(net, plain)
    with pytest.raises(ValueError, match="under the hooks under which it was made"):
        read(net, hooked)


def test_an_ablation_inside_hooks_is_of_the_hooked_model():
    net = tj.ResidualNetwork(zoo.build(SHARED[0]))
    model, tokens = net.view.model, zoo.tokens(net.view.model)  # type: ignore[attr-defined]

    def zero(write: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(write)

    def answer(*names: str) -> Tensor:
        with full_precision():
            return model.run_with_hooks(tokens, fwd_hooks=[(name, zero) for name in names])[:, -1]

    first, second = "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"
    with model.hooks([(first, zero)]):
        found = tj.ablation_effect(net, net.trace(tokens), "1_mlp", targets=[5])
    torch.testing.assert_close(found.logit[0, :, 0], (answer(first, second) - answer(first))[:, [5]])
    assert (found.logit[0, :, 0] - (answer(second) - answer())[:, [5]]).abs().max() > 1e-3


# Weights


def change(model: Any) -> None:
    """Other weights in place, as an optimizer's step leaves them."""
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            if weight.is_floating_point():
                weight.mul_(1 + 0.1 * normal(*weight.shape, seed=i).to(weight))


@pytest.mark.parametrize("spec", SHARED, ids=str)
def test_a_kept_network_follows_weights_that_change_in_place(spec):
    model = zoo.fresh(spec)
    kept, tokens = tj.ResidualNetwork(model), zoo.tokens(model)
    trace, before = kept.trace(tokens), tj.iterative_jet_lens(kept, tokens)
    change(model)
    found, wanted = tj.iterative_jet_lens(kept, tokens), tj.iterative_jet_lens(model, tokens)
    for (name, value), (_, own), (_, old) in zip(
        found.measures.items(), wanted.measures.items(), before.measures.items(), strict=True
    ):
        assert torch.equal(value, own), name
        assert name == "top1_agreement" or (value - old)[:-1].abs().max() > 1e-3
    weights = [tj.joint_jet_lens(net, tokens, granularity="block").weights for net in (kept, model)]
    assert torch.equal(*weights)
    for read in (tj.iterative_jet_lens, tj.path_sums, lambda net, trace: tj.ablation_effect(net, trace, "0_mlp")):
        with pytest.raises(ValueError, match="or its weights"):
            read(kept, trace)


# Options

IGNORED = {
    "an order": ({"order": 3, "linearize": "detached"}, "order, renormalize, .* are options of jets"),
    "a rank": ({"rank": "effect"}, "got rank='effect' without top"),
    "targets of no rank": ({"top": 3, "targets": [2]}, r"targets are what rank='effect' with top= reads; got \[2\]"),
    "targets of nothing": ({"linearize": "detached", "targets": [2]}, "targets are what rank='effect' with top= reads"),
}


@pytest.mark.parametrize(("options", "message"), IGNORED.values(), ids=IGNORED)
def test_options_of_paths_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tj.exponential_expansion(callables(), **options)


def test_an_objective_of_no_weights_is_refused():
    net = callables()
    options: dict[str, Any] = {"centers": ["embed", "0_mlp_out"], "objective": "kl"}
    for step, weights, said in (
        ("1_mlp", "optimal", "optimal"),
        ("ln_final", None, "uniform"),
        ("ln_final", [0.5, 0.5], "given"),
    ):
        with pytest.raises(ValueError, match=f"got 'kl' at '{step}' with {said} weights"):
            tj.jet_expand(net, step, weights=weights, **options)
    assert tj.jet_expand(net, "ln_final", weights="optimal", **options).objective == "kl"


def test_the_order_of_paths(as_users_run_it):
    net = callables()
    assert tj.exponential_expansion(net).order == tj.exponential_expansion(net, 1).order == 1
    assert tj.exponential_expansion(net, linearize="detached").order == 0
    with pytest.raises(ValueError, match="order must be an integer >= 0; got -1"):
        tj.exponential_expansion(net, -1)
    for order in (True, 1.0):
        with pytest.raises(TypeError, match="order must be an integer >= 0"):
            tj.exponential_expansion(net, order)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "draw",
    [
        lambda net, tokens, seed: tj.iterative_jet_lens(net, tokens, seed=seed),
        lambda net, tokens, seed: tj.joint_jet_lens(net, tokens, seed=seed),
        lambda net, tokens, seed: tj.paths.interactions(net, tokens, seed=seed),
        lambda net, tokens, seed: tj.ablation_hooks(net, "0_mlp", mode="resample", reference=tokens, seed=seed),
    ],
    ids=["lens", "joint", "interactions", "ablation"],
)
def test_a_seed_is_an_integer(draw, as_users_run_it, request):
    net = tj.ResidualNetwork(zoo.build(SHARED[0]))
    tokens = zoo.tokens(net.view.model)  # type: ignore[attr-defined]
    wrong = ["3", 1.5] if "lens" in request.node.callspec.id else [None, "3", 1.5]
    for seed in wrong:
        with pytest.raises(TypeError, match=f"seed must be an integer >= 0, .*got {seed!r}"):
            draw(net, tokens, seed)
    with pytest.raises(ValueError, match="seed must be an integer >= 0; got -1"):
        draw(net, tokens, -1)
    draw(net, tokens, 3)
