"""What calls ask of a GPU, counted without one: waits do not grow with layers or positions, nor launches with positions."""

from __future__ import annotations

import pytest
import torch
import zoo
from counting import counted
from two_devices import DEVICES

import tl_jets as tj
import tl_jets.core.changes as changes

SPEC = next(spec for spec in zoo.available(["llama"]) if spec.processing == "raw")

# How often the host may wait for the device, once in the model's own forward pass and once for each look at its weights; none
# depends on the size of anything. `by head` and `flow` look twice: another granularity, and hooks, are calls of their own.
CALLS = {
    "trace": (4, lambda network, tokens: network.trace(tokens)),
    "iterative lens": (8, lambda network, tokens: tj.iterative_jet_lens(network, tokens, order=2)),
    "followed tokens": (10, lambda network, tokens: tj.iterative_jet_lens(network, tokens, targets=[3, 5])),
    "detached lens": (8, lambda network, tokens: tj.iterative_jet_lens(network, tokens, linearize="detached")),
    "joint lens": (10, lambda network, tokens: tj.joint_jet_lens(network, tokens, order=1)),
    "by head": (9, lambda network, tokens: tj.joint_jet_lens(network.at("head"), tokens, linearize="detached")),
    "flow": (16, lambda network, tokens: ablated(network, tokens, nodes=3, tolerance=1e9)),
    "path sums": (10, lambda network, tokens: tj.path_sums(network, tokens)),
    "ablations": (7, lambda network, tokens: tj.ablation_effect(network, tokens)),
    "first order": (7, lambda network, tokens: tj.first_order_effects(network, tokens)),
    "detached map": (8, lambda network, tokens: tj.detached_jacobian(network, tokens, ordinary=False)),
}


def ablated(network, tokens, **options):
    """The flow of an ablation, on tokens of a prompt."""
    return tj.flow(network, tokens, tj.ablation_hooks(network, "0_mlp"), **options)


@pytest.fixture(scope="module")
def counts():
    """By call and number of tokens: what the second call on a network took."""
    found = {}
    for name, (_, call) in CALLS.items():
        for length in (4, 12):
            model = zoo.fresh(SPEC, torch.float32)
            tokens = zoo.tokens(model, 1, length)
            found[name, length] = counted(
                lambda network, tokens=tokens, call=call: call(network, tokens),
                model,
                prepare=lambda model=model: tj.ResidualNetwork(model),
            )
    return found


@pytest.mark.parametrize("name", CALLS)
def test_the_host_waits_a_few_times_whatever_the_prompt(counts, name):
    short, long = counts[name, 4], counts[name, 12]
    assert 0 < long.synchronisations <= CALLS[name][0], long.places
    assert long.places == short.places


@pytest.mark.parametrize("name", CALLS)
def test_launches_do_not_grow_with_positions(counts, name):
    short, long = counts[name, 4], counts[name, 12]
    assert short.dispatches == long.dispatches > 100, long.operations - short.operations


@pytest.mark.parametrize("name", CALLS)
def test_bytes_grow_with_positions_at_most(counts, name):
    assert counts[name, 12].peak_bytes < 4 * counts[name, 4].peak_bytes


def test_a_flow_waits_once_more_each_time_that_nodes_are_chosen(counts):
    """Three nodes are at most doubled to 128, in seven tries; with a fixed number no gap is waited for."""
    model = zoo.fresh(SPEC, torch.float32)
    tokens, found = zoo.tokens(model, 1, 4), []
    adaptive = counted(
        lambda network: found.append(ablated(network, tokens)), model, prepare=lambda: tj.ResidualNetwork(model)
    )
    more = adaptive.places - counts["flow", 4].places
    assert len(more) == 1 and len(found[-1].stages) <= next(iter(more.values())) <= 7 * len(found[-1].stages), more


def test_the_counter_counts_what_waits():
    model = torch.nn.Linear(3, 2)

    def run():
        x = model.weight.detach()
        mask = x > 0
        reads = [x.sum().item(), bool(mask.any()), x.tolist(), x.cpu(), x[mask], mask.nonzero(), float(x[0, 0])]
        x[mask] = torch.ones(1, device=DEVICES[0])  # a fill, which does not wait
        torch.linalg.cholesky(torch.eye(2, device=DEVICES[0]))
        on_host = torch.arange(3.0, device="cpu")
        return reads, on_host.tolist(), float(on_host.sum()), on_host.to(DEVICES[0])

    found = counted(run, model)
    assert found.synchronisations == 9, found.places
    assert found.peak_bytes > 0


def test_weights_are_compared_once_a_call(monkeypatch):
    """At its first look, whatever the layers; storages and versions at every look, and entries again in the next call."""
    looks = []
    own = changes._look
    monkeypatch.setattr(changes, "_look", lambda *given, is_seen: looks.append(is_seen) or own(*given, is_seen=is_seen))
    model = zoo.fresh(SPEC, torch.float32)
    network, tokens = tj.ResidualNetwork(model), zoo.tokens(model, 1, 4)
    trace = network.trace(tokens)
    looks.clear()
    tj.path_sums(network, tokens)
    assert looks.count(False) == 2 + network.n_layers < looks.count(True)  # outside the blocks, blocks, decoder
    with changes.one_look():
        trace.check_model()
        with torch.no_grad():
            model.blocks[0].mlp.out.weight[0, 0] += 1
        trace.check_model(1)
        with pytest.raises(ValueError, match="hooks on the model have changed"):
            trace.check_model(0)
    trace = network.trace(tokens)
    with torch.no_grad():
        model.blocks[1].mlp.out.weight.data[0, 0] += 1
    trace.check_model(0)
    with changes.one_look(), pytest.raises(ValueError, match="hooks on the model have changed"):
        trace.check_model()
