"""Residual networks of plain callables: labels, granularities, traces, and what they refuse."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork

TOKENS = torch.tensor([[1, 2], [0, 3]])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder() -> Decoder:
    return Decoder(norm=Norm("RMS", eps=1e-3), W_U=normal(4, 7, seed=1), b_U=normal(7, seed=2))


def linear(*seeds: int) -> ResidualNetwork:
    stages = [{f"{i}_block": (lambda x, seed=seed: x @ normal(4, 4, seed=seed))} for i, seed in enumerate(seeds)]
    table = normal(5, 4, seed=3)
    return ResidualNetwork(CallableModel(lambda z: table[z], stages, decoder()))


def test_streams_of_a_linear_network_are_matrix_products():
    net = linear(10, 11)
    trace = net.trace(TOKENS)
    A, B = normal(4, 4, seed=10), normal(4, 4, seed=11)
    e = normal(5, 4, seed=3)[TOKENS]
    eye = torch.eye(4, dtype=torch.float64)
    assert oracles.relative_error(trace["1_pre"], e @ (eye + A)) < 1e-12
    assert oracles.relative_error(trace["final_post"], e @ (eye + A) @ (eye + B)) < 1e-12
    h = trace["final_post"]
    wanted = oracles.rms_norm(h, eps=1e-3) @ normal(4, 7, seed=1) + normal(7, seed=2)
    assert oracles.relative_error(trace.logits, wanted) < 1e-12
    assert net.labels == ("embed", "0_block_out", "1_block_out", "0_pre", "1_pre", "final_post")
    assert trace.labels == net.labels and list(trace) == list(net.labels) and "0_pre" in trace


def test_several_sources_and_parallel_writes():
    sources = {"embed": lambda z: normal(5, 4)[z], "pos_embed": lambda z: normal(2, 4, seed=1).expand(2, 2, 4)}
    stages = [{"0_attn": torch.tanh, "0_mlp": torch.sin}]
    net = ResidualNetwork(CallableModel(sources, stages, decoder()))
    trace = net.trace(TOKENS)
    h = trace["embed"] + trace["pos_embed"]
    assert net.sources == ("embed", "pos_embed")
    assert net.stage("0_mlp") is net.stage("0_attn_out") is net.stage("0_pre")
    assert oracles.relative_error(trace["final_post"], h + h.tanh() + h.sin()) < 1e-12
    assert oracles.relative_error(trace.gamma("0_mlp")(2 * h), (2 * h).sin()) < 1e-12
    assert trace.writes(net.stages[0]).shape == (2, 2, 2, 4)


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "pythia", "attn_only"]), ids=str)
def test_labels_of_every_granularity(spec):
    model = zoo.build(spec)
    block, sublayer, head = (ResidualNetwork(model, granularity) for granularity in ("block", "sublayer", "head"))
    n_heads = model.cfg.n_heads
    assert [step.label for step in block.steps][:2] == ["0_block", "1_block"]
    assert block.streams[-1] == "final_post" and block.streams[0] == "0_pre"
    labels = [step.label for step in sublayer.steps]
    if spec.name == "gpt2":
        assert labels[:4] == ["0_attn", "0_mlp", "1_attn", "1_mlp"] and sublayer.streams[1] == "0_mid"
    if spec.name == "pythia":
        assert [step.label for step in sublayer.stages[0].steps] == ["0_attn", "0_mlp"]
        assert "0_mid" not in sublayer.streams
    if spec.name == "attn_only":
        assert labels[:2] == ["0_attn", "1_attn"]
    assert [step.write for step in head.stages[0].steps[: n_heads + 1]] == [
        *(f"L0H{i}_out" for i in range(n_heads)),
        "0_attn_bias",
    ]
    assert head.at("block").granularity == "block" and head.at("block").view is head.view
    # Coarser writes are sums of finer ones.
    tokens = zoo.tokens(model)
    coarse, fine = block.trace(tokens), head.trace(tokens)
    steps = [step for step in head.steps if step.layer == 1]
    total = sum(fine[step.write] for step in steps)
    assert oracles.relative_error(coarse["1_block_out"], total) < 1e-10
    assert "ResidualNetwork" in repr(head) and "Trace" in repr(fine)


@pytest.mark.usefixtures("as_users_run_it")
def test_errors_say_what_must_hold():
    net = linear(1)
    with pytest.raises(ValueError, match="granularity must be one of"):
        ResidualNetwork(net, granularity="layer")
    with pytest.raises(ValueError, match="Step labels must be unique"):
        CallableModel(torch.sin, [{"a": torch.sin}, {"a": torch.cos}], decoder())
    with pytest.raises(ValueError, match="takes neither attention_mask nor cache"):
        net.trace(TOKENS, attention_mask=torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="A model must be a TransformerLens"):
        ResidualNetwork("gpt2")
    trace = net.trace(TOKENS)
    with pytest.raises(ValueError, match="A gamma of this trace takes a stream of shape"):
        trace.gamma("0_block")(torch.zeros(1, 1, 4, dtype=torch.float64))


def test_a_view_whose_replay_is_wrong_is_refused():
    """The self-check compares the replay with what the forward pass wrote, whoever provides the view."""

    class Wrong(CallableModel):
        def writes(self, recording: Any, stage: Any, stream: Tensor) -> Tensor:
            return super().writes(recording, stage, stream) * 1.001

    net = ResidualNetwork(Wrong(lambda z: normal(5, 4)[z], [{"0_block": torch.tanh}], decoder()))
    with pytest.raises(ValueError, match=r"0_block is off by .* not understood"):
        net.trace(TOKENS).gamma("0_block")

    class WrongLogits(CallableModel):
        def record(self, text_or_tokens: Any, attention_mask: Any, cache: Any) -> Any:
            recording = super().record(text_or_tokens, attention_mask, cache)
            recording.logits = recording.logits + normal(7)
            return recording

    net = ResidualNetwork(WrongLogits(lambda z: normal(5, 4)[z], [{"0_block": torch.tanh}], decoder()))
    with pytest.raises(ValueError, match="must reproduce the model's logits"):
        net.trace(TOKENS)
