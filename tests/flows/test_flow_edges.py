"""Flows on edges against a program of TransformerLens hooks and autograd, where queries, keys and values are patched apart."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets.calculus import full_precision
from tl_jets.interop.circuits import from_transformer_lens, to_transformer_lens

LAYERS = "blocks.{}.hook_{}".format


def models(*names, processing="raw"):
    return [spec for spec in zoo.available(list(names) or None) if spec.processing == processing]


def activations(model, tokens, hooks, *names):
    """Activations by name in a run under hooks, with gradients."""
    found = {}
    savers = [(name, lambda value, hook, name=name: found.__setitem__(name, value.clone())) for name in names]
    with full_precision():
        model.run_with_hooks(tokens, fwd_hooks=[*hooks, *savers])
    return found


def put(name, value):
    return name, lambda old, hook: value.reshape(old.shape)


def heads_by_hand(model, tokens, layer, streams):
    """Each head's product with W_O, for streams of queries, keys and values of their own [head, batch, pos, d_model]."""
    own = [
        activations(model, tokens, [put(LAYERS(layer, "resid_pre"), stream)], f"blocks.{layer}.attn.hook_{name}")
        for name, stream in zip("qkv", streams, strict=True)
    ]
    hooks = [put(name, value) for values in own for name, value in values.items()]
    z = activations(model, tokens, hooks, f"blocks.{layer}.attn.hook_z")[f"blocks.{layer}.attn.hook_z"]
    return torch.einsum("bphd,hdm->hbpm", z, model.blocks[layer].attn.W_O)


def mlp_by_hand(model, tokens, layer, stream):
    hooks = [put(LAYERS(layer, "resid_pre"), stream), put(LAYERS(layer, "attn_out"), torch.zeros_like(stream))]
    return activations(model, tokens, hooks, LAYERS(layer, "mlp_out"))[LAYERS(layer, "mlp_out")]


def edges_by_hand(model, tokens, other, tokens_to_compare, count):
    """Flows by edge of a logit difference, with `count` nodes in every stage; and the effect."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    names = [LAYERS(layer, kind) for layer in range(n_layers) for kind in ("resid_pre", "attn_out", "mlp_out")]
    last = LAYERS(n_layers - 1, "resid_post")
    with torch.no_grad():
        runs = [activations(model, x, [], *names, last) for x in (tokens, other)]

        def writes(run, x):
            found = {"embed": run[LAYERS(0, "resid_pre")]}
            for layer in range(n_layers):
                heads = heads_by_hand(model, x, layer, [run[LAYERS(layer, "resid_pre")]] * 3)
                found |= {f"L{layer}H{head}": heads[head] for head in range(n_heads)}
                found[f"{layer}_mlp"] = run[LAYERS(layer, "mlp_out")]
            return found

        clean, changed = writes(runs[0], tokens), writes(runs[1], other)
    change = {name: changed[name] - clean[name] for name in clean}
    places, weights = np.polynomial.legendre.leggauss(count)

    def mean_gradients(function, before, after, inputs=1):
        """Of the values function(x, ..., x) on the segment, in each argument [value, argument, ...]."""
        total = 0.0
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            xs = [(before + place * (after - before)).requires_grad_(True) for _ in range(inputs)]
            values = function(*xs).reshape(-1)
            total += weight * torch.stack([torch.stack(torch.autograd.grad(v, xs, retain_graph=True)) for v in values])
        return total

    def value(stream):
        with full_precision():
            logits = model.run_with_hooks(tokens, fwd_hooks=[put(last, stream)])[:, -1]
        return (logits[:, tokens_to_compare[0]] - logits[:, tokens_to_compare[1]]).sum()

    def stream(run, layer, kind):
        own = run[LAYERS(layer, "resid_pre")]
        return own + run[LAYERS(layer, "attn_out")] if kind == "mid" else own

    edges = {}

    def read(reader, covector, writers):
        edges.update({(w, reader): (covector * change[w]).sum((1, 2)) for w in writers})

    order = list(change)
    g = mean_gradients(value, runs[0][last], runs[1][last])[0, 0]
    read("ln_final", g, order)
    for layer in reversed(range(n_layers)):
        before = order[: order.index(f"{layer}_mlp")]
        ends = [stream(run, layer, "mid") for run in runs]
        own = mean_gradients(lambda x, g=g, layer=layer: (g * mlp_by_hand(model, tokens, layer, x)).sum(), *ends)[0, 0]
        read(f"{layer}_mlp", own, before)
        g, ends = g + own, [stream(run, layer, "pre") for run in runs]

        def head_values(*xs, g=g, layer=layer):
            return (g * heads_by_hand(model, tokens, layer, xs)).sum((1, 2, 3))

        found = mean_gradients(head_values, *ends, inputs=3)
        for head, apart in enumerate(found):
            for name, own in zip("qkv", apart, strict=True):
                read(f"L{layer}H{head}_{name}", own, before[: before.index(f"L{layer}H0")])
        g = g + found.sum((0, 1))
    effect = value(runs[1][last]) - value(runs[0][last])
    return edges, effect


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_edges_are_those_of_a_program_of_hooks_and_autograd(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    other = tokens.clone()
    other[:, 2], other[0, 4] = 7, 9
    wanted, effect = edges_by_hand(model, tokens, other, (5, 11), 2)
    options = {"targets": 5, "against": 11, "granularity": "head", "nodes": 2, "tolerance": 1e9}
    found = tj.flow(model, tokens, other, edges=True, **options)
    assert float(found.effect.sum()) == pytest.approx(float(effect), abs=1e-9)
    table = found.edges().set_index(["writer", "reader"])
    scale = max(float(values.abs().max()) for values in wanted.values())
    seen = 0
    for edge, values in wanted.items():
        own = table.loc[[edge]] if edge in table.index else None
        for row, value in enumerate(values.tolist()):
            chosen = [] if own is None else own["flow"][own["batch"] == row].tolist()
            assert sum(chosen) == pytest.approx(value, abs=1e-9 * scale), edge
            seen += abs(value) > 1e-3 * scale
    bias = table.index.get_level_values("writer").str.endswith("_attn_bias")
    assert seen > 50 and set(table.index[~bias]) <= set(wanted)
    assert table["flow"][bias].abs().sum() < 1e-9 * scale  # attention's constant does not change


@pytest.mark.parametrize("spec", models(), ids=str)
def test_flow_is_conserved_at_every_component_of_every_family(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    hooks = tj.ablation_hooks(model, "0_attn", mode="mean", reference=tokens)
    if spec.name == "opt" and spec.world == "bridge":
        with pytest.raises(NotImplementedError, match=r"A replay calls the mlp component of block [01]"):
            tj.flow(model, tokens, hooks, edges=True)
        return
    options = {"targets": 5, "nodes": 2, "tolerance": 1e9, "granularity": "head"}
    found, plain = tj.flow(model, tokens, hooks, edges=True, **options), tj.flow(model, tokens, hooks, **options)
    scale = float(found.flow.abs().max())
    assert torch.allclose(found.flow, plain.flow, atol=1e-9 * scale)
    assert torch.allclose(found.gap, plain.gap, atol=1e-9 * scale) and found.nodes == plain.nodes
    assert torch.allclose(found.edge_flow.sum(0), found.flow, atol=1e-9 * scale)  # what a component sends
    balance = found.balance()
    assert np.allclose(balance["received"] + balance["edit"] - balance["flow"], balance["gap"])
    gaps = balance.groupby(["batch"])["gap"].sum()  # components' errors are the stages', divided
    assert np.allclose(gaps, found.gap.sum(0)[:, 0, 0], atol=1e-9 * scale)
    heads = {reader for reader in found.readers if reader.startswith("L")}
    apart = {f"L{layer}H{head}_{name}" for layer in range(1, model.cfg.n_layers) for head in range(4) for name in "qkv"}
    first = {reader for reader in heads if reader.startswith("L0H")}  # a stage whose stream changes is read
    assert heads - first == apart


@pytest.mark.parametrize("spec", models("llama", "pythia", "gemma2"), ids=str)
def test_edges_of_heads_neurons_and_blocks_are_parts_of_those_of_sublayers(spec):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=2)
    options = {"targets": [5, 9], "nodes": 3, "tolerance": 1e9, "positions": [2, -1], "edges": True}
    hooks = tj.ablation_hooks(model, "0_mlp")
    whole = tj.flow(model, tokens, hooks, granularity="sublayer", **options)
    heads = tj.flow(model, tokens, hooks, granularity="head", **options)
    neurons = tj.flow(tj.ResidualNetwork(model, "sublayer", ["L1N3", "L1N8"]), tokens, hooks, **options)
    blocks = tj.flow(model, tokens, hooks, granularity="block", **options)
    assert blocks.edges()["writer"].iloc[0] == "0_block" and torch.allclose(blocks.edge_flow.sum(0), blocks.flow)

    def sublayer(label):
        label = label.removesuffix("_out").removesuffix("_bias").removesuffix("_rest")
        return f"{label[1]}_{'attn' if 'H' in label else 'mlp'}" if label.startswith("L") else label

    def summed(found, named=sublayer):
        total = {}
        for r, reader in enumerate(found.readers):
            for w, writer in enumerate(found.labels):
                edge = named(writer), named(reader)
                total[edge] = total.get(edge, 0.0) + found.edge_flow[r, w]
        return {edge: flow for edge, flow in total.items() if float(flow.abs().max()) > 1e-12}

    wanted = summed(whole)
    for finer in (heads, neurons):
        total = summed(finer)
        assert len(wanted) > 5 and total.keys() == wanted.keys()
        assert all(torch.allclose(total[edge], wanted[edge], atol=1e-9) for edge in wanted)
    alone = tj.flow(model, tokens[1:], hooks, granularity="head", **options)
    own, both = summed(alone, str), summed(heads, str)
    assert own.keys() == both.keys() and all(torch.allclose(own[e][0], both[e][1], atol=1e-9) for e in own)


@pytest.mark.parametrize("spec", models("gpt2", "llama"), ids=str)
def test_padding_sends_and_receives_nothing(spec):
    if spec in zoo.NAN_UNDER_LEFT_PADDING:
        pytest.skip("this model gives NaN under left padding in float64")
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    hooks = tj.ablation_hooks(model, "0_mlp")
    options = {"targets": 5, "nodes": 2, "tolerance": 1e9, "granularity": "head", "edges": True}
    found = tj.flow(model, tokens, hooks, attention_mask=mask, **options)
    for row in range(len(tokens)):
        alone = tj.flow(model, tokens[row : row + 1, mask[row].bool()], hooks, **options)
        assert alone.readers == found.readers
        assert torch.allclose(found.edge_flow[:, :, row], alone.edge_flow[:, :, 0], atol=1e-9)


@pytest.fixture(scope="module")
def tinydocs():
    return tj.load_tinydocs()


@pytest.fixture(scope="module")
def found(tinydocs):
    """Two prompts and two others, at granularity `"head"`."""
    clean = ["This function is available on Unix and", "This module is available on Unix and"]
    other = ["This function is available on Windows and", "This module is available on Windows and"]
    options = {"targets": [" Unix", " the"], "against": [" Windows", " a"], "granularity": "head"}
    return tj.flow(tinydocs, clean, other, edges=True, **options)


def mean_edges(found, target=0):
    """Mean flows by writer and reader, from the table alone."""
    table = found.edges()
    table = table[table["target"] == found.target_names[target]]
    return (table.groupby(["writer", "reader"], sort=False)["flow"].sum() / len(found.effect)).to_dict()


def test_effects_are_closed_component_by_component(found):
    assert bool(found.closed.all())
    gaps = found.balance().assign(gap=lambda frame: frame["gap"].abs()).groupby(["batch", "target"])["gap"].sum()
    for (batch, target), gap in gaps.items():
        effect = float(found.effect[batch, 0, found.target_names.index(target)])
        share = float(found.gap_share[batch, 0, found.target_names.index(target)])
        assert gap / abs(effect) == pytest.approx(share) and gap <= found.tolerance * abs(effect)


def test_the_largest_edges_of_every_effect(found):
    top, every = found.edges(top=3), found.edges()
    for cell, own in every.groupby(["batch", "pos", "target"]):
        chosen = top.set_index(["batch", "pos", "target"]).loc[[cell]]
        assert chosen["flow"].abs().tolist() == own["flow"].abs().nlargest(3).tolist()
        effect = float(found.effect[cell[0], 0, found.target_names.index(cell[2])])
        assert np.allclose(chosen["share"], chosen["flow"] / effect)


@pytest.mark.parametrize("target", [0, 1])
def test_the_graph_conserves_flow_at_every_node(found, target):
    graph = found.graph(target)
    effect = float(found.effect[..., target].mean())
    assert networkx.is_directed_acyclic_graph(graph) and graph.nodes["ln_final"]["flow"] == pytest.approx(effect)
    for node, own in graph.nodes(data=True):
        received = sum(edge["flow"] for _, _, edge in graph.in_edges(node, data=True))
        sent = sum(edge["flow"] for _, _, edge in graph.out_edges(node, data=True))
        assert received + own["edit"] == pytest.approx(own["flow"], abs=found.tolerance * abs(effect))
        assert node == "ln_final" or sent == pytest.approx(own["flow"], abs=1e-5 * abs(effect))
    edges = mean_edges(found, target)
    assert graph.edges["0_mlp", "L2H3"]["v"] == pytest.approx(edges["0_mlp", "L2H3_v"])
    assert graph.edges["0_mlp", "L2H3"]["flow"] == pytest.approx(sum(edges["0_mlp", f"L2H3_{i}"] for i in "qkv"))


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_the_smallest_circuits_are_the_smallest(found, share):
    edges = mean_edges(found)
    sizes = np.sort(np.abs(list(edges.values())))[::-1]
    fewest = next(k for k in range(1, len(sizes) + 1) if sizes[:k].sum() >= share * sizes.sum() * (1 - 1e-12))
    circuit = found.to_circuit(share)
    assert len(circuit.edges) == fewest
    assert [abs(score) for _, _, score in circuit.edges] == pytest.approx(sizes[:fewest])
    assert all(score == pytest.approx(edges[writer, reader]) for writer, reader, score in circuit.edges)
    assert circuit.to_dot().startswith("digraph")
    nodes = found.to_circuit(share, level="node").nodes
    flows = found.flow[..., 0].mean((-1, -2)).abs()
    fewest = next(
        k
        for k in range(1, len(flows) + 1)
        if flows.sort(descending=True)[0][:k].sum() >= share * flows.sum() * (1 - 1e-12)
    )
    wanted = {found.labels[i].removesuffix("_out") for i in flows.argsort(descending=True)[:fewest]}
    assert set(nodes) == wanted


def test_circuits_go_to_transformer_lens_and_back(found, tinydocs):
    circuit = found.to_circuit(0.5)
    if zoo.MAJOR < 4:
        with pytest.raises(NotImplementedError, match="Update TransformerLens"):
            to_transformer_lens(circuit, tinydocs, 8)
        return
    edges = to_transformer_lens(circuit, tinydocs, 8)
    again = from_transformer_lens(edges)
    total = {}
    for writer, reader, score in again.edges:
        total[writer, reader] = total.get((writer, reader), 0.0) + score
    assert total == pytest.approx({(w, r): score for w, r, score in circuit.edges})


def test_open_effects_have_no_edges(tinydocs):
    hooks = tj.ablation_hooks(tinydocs, "0_mlp")
    with pytest.warns(UserWarning, match="1 of 1 effects stay open"):
        found = tj.flow(tinydocs, "This function is available on Unix and", hooks, nodes=1, edges=True)
    assert len(found.balance()) > 5  # which says where
    for refused in (found.edges, found.graph, found.to_circuit):
        with pytest.raises(ValueError, match=r"Flows explain an effect if their gap is at most 1\.00% of it"):
            refused()


def test_what_was_not_asked_for_is_refused(as_users_run_it, found, tinydocs):
    plain = tj.flow(tinydocs, "This function is available on Unix and", tj.ablation_hooks(tinydocs, "0_mlp"))
    for refused in (plain.edges, plain.balance, plain.graph, plain.to_circuit):
        with pytest.raises(ValueError, match="Pass edges=True to flow"):
            refused()
    with pytest.raises(ValueError, match="top must be an integer >= 1"):
        found.edges(top=0)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        found.to_circuit(90)
    with pytest.raises(ValueError, match="level must be one of"):
        found.to_circuit(level="head")
    with pytest.raises(ValueError, match="target is the index of one of the targets"):
        found.graph(2)


def test_an_intervention_without_effect_has_no_edges(tinydocs):
    found = tj.flow(tinydocs, "This is", [("blocks.0.hook_mlp_out", lambda write, hook: write)], edges=True)
    assert found.edges().empty and not found.labels and found.readers == ["ln_final"]


def test_attention_that_a_hook_cuts_off_is_one_reader(tinydocs):
    """Queries that do not depend on the stream."""
    with tinydocs.hooks(fwd_hooks=[("blocks.2.attn.hook_q", lambda q, hook: torch.ones_like(q))]):
        found = tj.flow(
            tinydocs, "This function is on", tj.ablation_hooks(tinydocs, "0_mlp"), granularity="head", edges=True
        )
    assert "L2H1" in found.readers and "L3H1_q" in found.readers and bool(found.closed.all())
