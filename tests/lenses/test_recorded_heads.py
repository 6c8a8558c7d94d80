"""Heads at some positions are read off the forward pass: the same as those of a replay at all positions."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import relative_error

from tl_jets import ResidualNetwork, joint_jet_lens


@pytest.fixture(params=zoo.available(["gpt2", "llama", "gemma2", "pythia"]), ids=str)
def model(request):
    return zoo.build(request.param)


def test_heads_at_a_position_are_those_of_a_replay(model):
    network = ResidualNetwork(model, "head")
    tokens = zoo.tokens(model, batch=2, pos=6)
    read, replayed = network.trace(tokens), ResidualNetwork(model).trace(tokens).on(network)
    batch, pos = torch.tensor([0, 1, 1]), torch.tensor([5, 2, 5])
    found = read.components_at(network.components, batch, pos)
    for label, rows in zip(network.components, found, strict=True):
        assert relative_error(rows, replayed[label][batch, pos]) < 1e-10, label


def read_head(trace):
    cell = torch.tensor([3])
    return trace.network.view.recorded_writes(trace.recording, trace.network.stage("L1H0"), cell * 0, cell)


def test_heads_with_a_value_bias_or_a_hook_are_replayed():
    """A head of a llama is zero at the zero stream, and read; one of GPT-2 is not, and one under a hook is not trusted."""
    llama, gpt2 = (
        zoo.build(next(spec for spec in zoo.available([name]) if str(spec) == f"bridge-{name}-raw"))
        for name in ("llama", "gpt2")
    )
    network, tokens = ResidualNetwork(llama, "head"), zoo.tokens(llama, batch=1, pos=6)
    replayed = ResidualNetwork(llama).trace(tokens).on(network)
    assert relative_error(read_head(network.trace(tokens))["L1H0_out"][0], replayed["L1H0_out"][0, 3]) < 1e-10
    with llama.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 0.5)]):
        assert read_head(network.trace(tokens)) is None
    assert read_head(ResidualNetwork(gpt2, "head").trace(tokens)) is None


def test_a_lens_of_one_position_holds_no_head_at_all_positions(model):
    network = ResidualNetwork(model, "head")
    trace = network.trace(zoo.tokens(model, batch=1, pos=6))
    lens = joint_jet_lens(network, trace, linearize="detached", positions=-1)
    whole = joint_jet_lens(network, network.trace(trace.tokens), linearize="detached")
    assert relative_error(lens.effects[:, 0, 0], whole.effects[:, 0, -1]) < 1e-9
