"""What promotes a set of tokens: against logits over the whole vocabulary, forward passes, and a planted neuron."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from test_studies import FAMILIES, V, toy

from tl_jets.core.network import ResidualNetwork
from tl_jets.ngrams.streams import VocabularyStreams
from tl_jets.studies import search
from tl_jets.studies.matched_tokens import frequency_key, matched

SET = [5, 17, 30]
N_TOKENS = 20


def centered_logits(network, writes, *norms):
    """Centered logits of writes after some norms without their scale, by the whole product [..., V]."""
    decoder = network.decoder
    for norm in (*norms, decoder.norm):
        writes = writes - writes.mean(-1, keepdim=True) if norm is not None and norm.kind == "LN" else writes
        writes = writes if norm is None or norm.weight is None else writes * norm.weight.detach()
    logits = decoder.logit_scale * writes.detach().double() @ decoder.W_U.detach().double()
    return logits - logits.mean(-1, keepdim=True)


def in_own_units(logits):
    """[set, ...] -> the score: mean effect on the set over writes [write, V], by their root mean square."""
    return float(logits.mean(0)[SET].mean() / logits.square().mean().sqrt())


def activations(model, layer, words):
    """Of single tokens without attention and positions: head values less those at the zero stream, and the MLP's write."""
    found = {}

    def save(name):
        return lambda x, hook: found.__setitem__(name, x.detach())

    z, mlp = f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"
    # The embedding, and the first MLP's write: later MLPs and all attention write nothing.
    hooks = [(f"blocks.{i}.hook_attn_out", lambda x, hook: x * 0) for i in range(model.cfg.n_layers)]
    hooks += [(f"blocks.{i}.hook_mlp_out", lambda x, hook: x * 0) for i in range(1, layer)]
    if "pos_embed" in ResidualNetwork(model).sources:
        hooks.append(("hook_pos_embed", lambda x, hook: x * 0))
    zero = [(f"blocks.{layer}.hook_resid_pre", lambda x, hook: x * 0), (z, save("zero"))]
    with torch.no_grad(), ResidualNetwork(model).view.precision():
        with model.hooks([*hooks, (z, save("z")), (mlp, save("mlp"))]):
            model(words[:, None])
        with model.hooks(zero):
            model(words[:1, None])
    shape = model.blocks[layer].attn.W_O.shape[:2]
    values = [found[name].reshape(-1, *shape) for name in ("z", "zero")]
    return values[0] - values[1][:1], found["mlp"][:, 0]


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_scores_are_those_of_whole_logits_and_forward_passes(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    found = search(network, SET, n_tokens=N_TOKENS, controls=7, top_k=10**6, seed=4, progress=False)
    scores = dict(zip(found.labels, found.scores.tolist(), strict=True))
    draw = np.random.default_rng(4)
    streams = VocabularyStreams(network, [])
    sets = matched(torch.tensor(SET), frequency_key(streams, None), 7, draw)
    words = torch.from_numpy(draw.permutation(streams.n_tokens)[:N_TOKENS])
    assert len(scores) == sum(found.counts.values())
    for layer in range(model.cfg.n_layers):
        norms = [network.view.post_norm(layer, which) for which in ("attn", "mlp")]
        values, write = activations(model, layer, words)
        assert scores[f"{layer}_mlp"] == pytest.approx(in_own_units(centered_logits(network, write)), rel=1e-9)
        for head in range(model.cfg.n_heads):
            writes = values[:, head] @ model.blocks[layer].attn.W_O[head].detach()
            wanted = in_own_units(centered_logits(network, writes, norms[0]))
            assert scores[f"L{layer}H{head}"] == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        rows = centered_logits(network, model.blocks[layer].mlp.W_out.detach(), norms[1])
        for neuron, row in enumerate(rows):
            place = found.labels.index(f"L{layer}N{neuron}")
            assert scores[f"L{layer}N{neuron}"] == pytest.approx(in_own_units(row[None]), rel=1e-9)
            size = float(row.square().mean().sqrt())
            wanted = [float(row[ids].mean()) / size for ids in sets]
            assert found.controls[place].tolist() == pytest.approx(wanted, rel=1e-9)


def test_a_planted_neuron_is_found_first_and_others_are_chance():
    spec = next(spec for spec in zoo.available(["llama"]) if spec.processing == "raw")
    model = zoo.fresh(spec)
    network = ResidualNetwork(model)
    decoder = network.decoder
    wanted = (decoder.W_U.double() - decoder.W_U.double().mean(1, keepdim=True)).pinverse().T[:, SET].sum(1)
    with torch.no_grad():
        planted = -wanted / decoder.norm.weight
        model.blocks[1].mlp.W_out[3] = planted
    assert torch.equal(model.blocks[1].mlp.W_out[3].detach(), planted.detach())  # the weight itself, not a copy of it
    found = search(network, SET, controls=40, top_k=5, progress=False)
    best = found.top(1, "neuron").iloc[0]
    assert best["component"] == "L1N3" and best["score"] < 0  # suppresses them, as planted
    assert best["chance"] == pytest.approx(1 / 41)
    assert found.top(1)["component"][0] == "L1N3" and len(found.top(3, "head")) == 3
    again = search(network, SET, kinds=["head"], layers=[1], controls=3, top_k=2, progress=False)
    assert again.counts == {"head": model.cfg.n_heads} and len(again.labels) == 2
    few = search(network, SET, controls=5, top_k=1, progress=False)
    assert few.chance.tolist() == [
        (1 + sum(abs(x) >= abs(s) for x in peaks)) / 6
        for s, peaks in zip(few.scores.tolist(), _peaks(network, few), strict=True)
    ]


def _peaks(network, few):
    """The largest score of each control set among all components of a kind, read off the whole result."""
    whole = search(network, SET, controls=5, top_k=10**6, progress=False)
    for kind in few.kinds:
        rows = [i for i, own in enumerate(whole.kinds) if own == kind]
        yield whole.controls[rows].abs().amax(0).tolist()


def test_what_cannot_be_searched_is_refused(as_users_run_it):
    model = zoo.build(FAMILIES[0])
    with pytest.raises(NotImplementedError, match="plain functions"):
        search(toy(), SET)
    for options, message in [({"layers": [9]}, "layers must be"), ({"kinds": []}, "must be components")]:
        with pytest.raises(ValueError, match=message):
            search(model, SET, controls=0, progress=False, **options)
    with pytest.raises(ValueError, match=f"ids in 0..{V - 1}"):
        search(model, [V])
