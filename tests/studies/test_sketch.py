"""The sketch against brute force: attention by hand in loops, weights by scipy, perplexities from whole rows, KN by its formula."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import torch
import zoo

import tl_jets as tj
from tl_jets.ngrams.head_maps import HeadReader
from tl_jets.ngrams.trigrams import TrigramSweep, trigram_parts
from tl_jets.studies import sketch
from tl_jets.studies.counts import KneserNey
from tl_jets.studies.sketches import _Components

TEXTS = torch.randint(3, 20, (6, 7), generator=torch.Generator().manual_seed(3))


def network_of(family):
    spec = next(spec for spec in zoo.available([family]) if spec.processing == "raw")
    return tj.ResidualNetwork(zoo.build(spec).to(torch.float64))


@pytest.fixture(scope="module")
def network():
    return network_of("llama")


def states_by_hand(network, text, layer, distance):
    """A layer's writes from loops over positions, with the scores of skip-trigrams."""
    reader, tokens = HeadReader(network, layer), text.tolist()
    pairs = torch.cartesian_prod(text, text)
    triples = torch.cat([pairs, torch.zeros_like(pairs[:, :1])], dim=1)
    rows = torch.zeros(len(text) - 1, network.decoder.d_model, dtype=torch.float64)
    for head in range(reader.n_heads):
        # "pair" is the log of a key's share of two, of itself and the query's own place.
        shares = trigram_parts(network, layer, head, triples, distance=distance, normalize="pair")[0].exp()
        odds = (shares / (1 - shares)).view(len(text), len(text))  # [key, query]
        value = reader.vectors(text, [head]).value[0]
        for end in range(len(tokens) - 1):
            weights = [*(float(odds[key, end]) for key in range(end)), 1.0]
            moved = sum(weight * value[key] for key, weight in enumerate(weights)) / sum(weights)
            rows[end] += moved @ reader.view.blocks[layer].attn.W_O[head].detach()
    return network.decoder.norm(rows)


@pytest.mark.parametrize("distance", [1, 3])
def test_skip_trigrams_attend_by_scores_of_tokens(network, distance):
    found = _Components(network, ["direct"], [1], distance, False)(TEXTS[:1])[1]
    torch.testing.assert_close(found, states_by_hand(network, TEXTS[0], 1, distance), rtol=1e-7, atol=1e-9)


def test_the_sketch_is_the_best_mixture_and_is_measured_on_the_held_out_text(network):
    fitting, held_out = TEXTS[:3], TEXTS[3:]
    found = sketch(network, fitting, held_out, paths=["direct", "mlps"], layers=[0], corpus=fitting)
    components = _Components(network, ["direct", "mlps"], [0], 1, False)
    decoder, states = network.decoder, components(fitting)
    truth = network.view.model(fitting)[:, :-1].flatten(0, 1).detach()

    def logits(states, weights):
        return decoder.logits(torch.einsum("c,crd->rd", torch.as_tensor(weights), states))

    def loss(weights):
        off = logits(states, weights) - truth
        return float((off - off.mean(-1, keepdim=True)).square().sum())

    ends = {"type": "ineq", "fun": lambda w: 1 - w.sum()}
    options = {"ftol": 1e-12, "maxiter": 500}
    best = scipy.optimize.minimize(
        loss, [0.2] * 3, bounds=[(0, 1)] * 3, constraints=ends, method="SLSQP", options=options
    )
    assert loss(found.weights) <= best.fun * (1 + 1e-6)
    np.testing.assert_allclose(found.weights, best.x, atol=2e-3)

    frame = found.to_dataframe().set_index("predictor")
    whole = network.view.model(held_out)[:, :-1].flatten(0, 1).detach()
    aim, mine = (x.log_softmax(-1) for x in (whole, logits(components(held_out), found.weights)))
    targets = held_out[:, 1:].flatten()
    for name, rows in (("model", aim), ("sketch", mine)):
        assert frame.loc[name, "nats"] == pytest.approx(-float(rows[range(len(targets)), targets].mean()), rel=1e-6)
        kl = torch.nn.functional.kl_div(rows, aim, log_target=True, reduction="none").sum(-1).mean()
        assert frame.loc[name, "kl"] == pytest.approx(float(kl), abs=1e-6)
    row = KneserNey(fitting, decoder.d_vocab, 2).row
    nats = [-math.log(row([one])[two]) for text in held_out.tolist() for one, two in pairwise(text)]
    assert frame.loc["corpus Kneser-Ney bi-gram", "nats"] == pytest.approx(np.mean(nats))
    assert (found.shuffled_weights >= 0).all() and found.weights.sum() <= 1 + 1e-9
    assert 0 < found.unexplained < 1


def kneser_ney_by_formula(text, d_vocab, context, token):
    """Probability of a bi-gram model, by the formulas of Chen and Goodman."""
    pairs = Counter(pairwise(text))
    types = Counter(two for _, two in pairs)

    def discount(counts):
        once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
        return once / max(once + 2 * twice, 1)

    low, high = discount(types), discount(pairs)
    continued = max(types[token] - low, 0) / len(pairs) + low * len(types) / len(pairs) / d_vocab
    after = {two: count for (one, two), count in pairs.items() if one == context}
    if not after:
        return continued
    total = sum(after.values())
    kept = max(after.get(token, 0) - high, 0) / total
    return kept + (1 - sum(max(c - high, 0) for c in after.values()) / total) * continued


def test_kneser_ney_is_its_formula():
    draws = torch.rand(60, generator=torch.Generator().manual_seed(0))
    text = (10 * draws**3).long().tolist()  # some tokens are rare
    model = KneserNey(text, 10, 2)
    for context in range(10):
        row = model.row([5, context])
        assert float(row.sum()) == pytest.approx(1)
        for token in range(10):
            assert float(row[token]) == pytest.approx(kneser_ney_by_formula(text, 10, context, token))
    tri = KneserNey(text, 10, 3)
    assert float(tri.row(text[:2]).sum()) == pytest.approx(1)
    # An unseen first token leaves the lower order, whose counts are of distinct left neighbours.
    torch.testing.assert_close(tri.row([10, 3]), tri.row([3]))


def test_texts_are_checked(network):
    with pytest.raises(ValueError, match="others than the fitting"):
        sketch(network, TEXTS, TEXTS[:1])
    with pytest.raises(ValueError, match="three positions"):
        sketch(network, TEXTS[:, :2], TEXTS[:, 2:4])
    with pytest.raises(ValueError, match="one component"):
        sketch(network, TEXTS[:1], TEXTS[1:], paths=[], layers=[])


def test_induction_keys_are_what_a_head_wrote_of_the_token_before():
    """By loops: the pattern over earlier places from the skip-trigrams of composed heads, moved values of the places themselves."""
    network = network_of("llama")
    compose = {"query": "effective", "key": "effective > L1H3", "value": "effective"}
    found = _Components(network, ["direct"], [], 2, False, [((1, 3), (2, 0))])
    assert found.labels == ["direct", "L1H3, then L2H0"]
    text = TEXTS[0].tolist()
    pairs = torch.cartesian_prod(TEXTS[0], TEXTS[0])
    triples = torch.cat([pairs, torch.zeros_like(pairs[:, :1])], dim=1)
    shares = trigram_parts(network, 2, 0, triples, distance=2, normalize="pair", compose=compose)[0].exp()
    odds = (shares / (1 - shares)).view(len(text), len(text))  # [token before the key, query], against the query's own
    streams = tj.ngrams.VocabularyStreams(network, ["effective > L2H0"])
    writes = streams.stream(streams.embed(TEXTS[0]), "effective > L2H0")
    rows = torch.zeros(len(text) - 1, network.decoder.d_model, dtype=torch.float64)
    plan = TrigramSweep(network, 2, 0, compose=compose, distance=2)
    vectors = plan.reader.vectors(TEXTS[0], [0], plan.compose.reads(2, 0))
    query, key = vectors.query[0], vectors.key[0]
    itself = query @ plan.qk_scores.own_keys(key).T
    for end in range(1, len(text) - 1):
        weights = [float(odds[place - 1, end] * itself[end, end].exp()) for place in range(1, end)]
        weights.append(float(itself[end, end - 1].exp()))
        for weight, place in zip(weights, range(1, end + 1), strict=True):
            rows[end] += weight / sum(weights) * writes[place]
    torch.testing.assert_close(found(TEXTS[:1])[1], network.decoder.norm(rows), rtol=1e-7, atol=1e-9)
