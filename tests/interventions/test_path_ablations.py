"""Ablation of single paths, against overwritten streams of the model itself, and against frozen paths where they agree."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import relative_error
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork, detached_jacobian, exponential_expansion
from tl_jets.calculus import full_precision
from tl_jets.interventions import replays
from tl_jets.interventions.path_ablations import path_ablation

FAMILIES = zoo.available(["gpt2", "llama", "gemma2"])
D = 5


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*functions, norm: str = "none") -> ResidualNetwork:
    embed = torch.nn.Embedding(7, D, _weight=normal(7, D, seed=1))
    stages = [{f"{i}_mlp": function} for i, function in enumerate(functions)]
    return ResidualNetwork(CallableModel(embed, stages, Decoder(Norm(norm), normal(D, 9, seed=2), normal(9, seed=3))))


@pytest.mark.parametrize("where", [None, [1, -2]])
@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_it_is_what_overwriting_the_streams_gives(spec, where):
    """embed > 0_mlp > 1_mlp, by three runs whose streams hooks overwrite; from all positions, or from some."""
    model = zoo.build(spec)
    net = ResidualNetwork(model)
    tokens = zoo.tokens(model, batch=2, pos=6)
    trace = net.trace(tokens)
    mids = "blocks.{}.ln2.hook_in" if spec.world == "bridge" else "blocks.{}.hook_resid_mid"
    outs, last = "blocks.{}.hook_mlp_out", f"blocks.{len(model.blocks) - 1}"

    def write(layer: int, stream: Tensor) -> Tensor:
        box: list[Tensor] = []
        hooks = [
            (mids.format(layer), lambda own, hook: stream),
            (outs.format(layer), lambda own, hook: box.append(own)),
        ]
        with torch.no_grad(), full_precision():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        return box[-1]

    def logits(stream: Tensor) -> Tensor:
        """Before the softcap, which is what the unembedding itself gives."""
        box: list[Tensor] = []
        hooks = [(f"{last}.hook_resid_post", lambda own, hook: stream)]
        handle = model.unembed.register_forward_hook(lambda module, args, out: box.append(out))
        with torch.no_grad(), full_precision():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        handle.remove()
        return box[-1]

    h0, h1 = trace["0_mid"], trace["1_mid"]
    source = torch.zeros_like(trace["embed"])
    chosen = slice(None) if where is None else where
    source[:, chosen] = trace["embed"][:, chosen]
    first = write(0, h0) - write(0, h0 - source)
    second, other = (write(1, h1) - write(1, h1 - sent) for sent in (first, source))
    final = trace["final_post"]
    paths = ["embed > 0_mlp > 1_mlp > ln_final", "embed > 1_mlp > ln_final", "embed > 0_mlp > ln_final"]
    found = path_ablation(net, trace, paths, positions=[-2, -1], ablated_positions=where, targets=[3, 11])
    for row, sent in enumerate((second, other, first)):
        change = (logits(final - sent) - logits(final))[:, -2:]
        assert relative_error(found.logit[row], change[..., [3, 11]]) < 1e-9
        assert relative_error(found.centered[row], (change - change.mean(-1, keepdim=True))[..., [3, 11]]) < 1e-9


@pytest.mark.parametrize("granularity", ["sublayer", "head"])
@pytest.mark.parametrize("spec", [spec for spec in FAMILIES if spec.processing == "raw"], ids=str)
def test_prefixes_that_are_evaluated_together_are_those_one_by_one(spec, granularity, monkeypatch):
    model = zoo.build(spec)
    net = ResidualNetwork(model, granularity)
    tokens = zoo.tokens(model)
    steps = ["L0H1", "L0H3", "0_mlp"] if granularity == "head" else ["0_attn", "0_mlp"]
    last = ["L1H0", "1_mlp"] if granularity == "head" else ["1_attn", "1_mlp"]
    paths = [f"embed > {a} > {b} > ln_final" for a in steps for b in last]
    together = path_ablation(net, tokens, paths)
    alone = torch.cat([path_ablation(net, tokens, path).logit for path in paths])
    assert relative_error(together.logit, alone) < 1e-9
    monkeypatch.setattr(replays, "check_clean", refuse)
    assert relative_error(path_ablation(net, tokens, paths).logit, alone) < 1e-9


def refuse(*args):
    raise replays.NotReplayedError


@pytest.mark.parametrize("spec", zoo.available(["gpt2"]), ids=str)
def test_a_bias_is_what_the_frozen_step_writes_at_zero(spec):
    """Not b_out, which a trace calls by the same name."""
    net = ResidualNetwork(zoo.build(spec))
    trace = net.trace(zoo.tokens(net.view.model, batch=2, pos=6))
    bias = detached_jacobian(net, trace, output="0_mlp_out", wrt="0_mid", positions=None).bias
    assert relative_error(bias, trace["0_mlp_bias"].expand_as(bias)) > 0.1
    final, decoder = trace["final_post"], net.decoder
    change = decoder.logits(decoder.norm(final - bias)) - decoder.logits(decoder.norm(final))
    found = path_ablation(net, trace, "0_mlp_bias > ln_final", targets=[5])
    assert relative_error(found.logit[0], change[:, -1:, [5]]) < 1e-9


def test_frozen_paths_of_an_affine_network_are_its_path_ablations():
    maps = [normal(D, D, seed=10 + i) for i in range(3)]
    biases = [normal(D, seed=20 + i) for i in range(3)]
    net = network(*(lambda x, A=A, b=b: x @ A + b for A, b in zip(maps, biases, strict=True)))
    trace = net.trace(torch.tensor([[0, 4, 2]]))
    paths = exponential_expansion(net, linearize="detached", through="mlp")(trace, positions=-1)
    found = path_ablation(net, trace, paths.labels, targets=[0, 8])
    expected = torch.stack([paths.logits(path)[..., [0, 8]] for path in paths.labels])
    assert len(paths) == 11 and relative_error(-found.logit, expected) < 1e-12


def test_gates_respond():
    """A relu that another source holds open closes with the path: hand-computed."""
    net = network(lambda x: torch.relu(x - 1))
    trace = net.trace(torch.tensor([[3]]))
    embed = trace["embed"]
    decode = net.decoder.logits
    expected = decode(trace["final_post"] - torch.relu(embed - 1)) - decode(trace["final_post"])
    found = path_ablation(net, trace, "embed > 0_mlp", targets=[1])
    assert torch.allclose(found.logit[0], expected[..., [1]], atol=1e-12)


def test_paths_that_are_none_are_refused():
    net = network(torch.relu, torch.tanh)
    tokens = torch.tensor([[1, 2]])
    for paths, message in [
        ("embed > 1_mlp > 0_mlp", "later and later stages"),
        ("embed > 7_mlp", "later and later stages"),
        ("nowhere > 0_mlp", "starts at one of"),
        ("embed>0_mlp", "is written `embed > 0_mlp > ln_final`; got 'embed>0_mlp'"),
        ("1_mlp_bias > 0_mlp", "after its source"),
        ("1_mlp_out > ln_final", "starts at one of"),
        ("ln_final_bias", "starts at one of"),
        ([], "at least one path"),
    ]:
        with pytest.raises(ValueError, match=message):
            path_ablation(net, tokens, paths)
