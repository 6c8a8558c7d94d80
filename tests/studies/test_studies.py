"""Studies against brute force: the whole V x V matrix in float64, counting by hand, forward passes under hooks."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections import Counter
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import scipy.stats
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_jets
from tl_jets.adapters.callables import CallableModel
from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.intervals import bootstrap_intervals, central
from tl_jets.core.network import ResidualNetwork
from tl_jets.ngrams import jet_bigrams
from tl_jets.ngrams.streams import mlp_steps
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import jet_trigrams
from tl_jets.pretrained import load_tinydocs
from tl_jets.studies import (
    AblationCheck,
    TextComparison,
    ablation_check,
    ablation_checks,
    best_joint,
    bootstrap_interval,
    compare_with_counts,
    diff,
    hit_ratio,
    mass,
    ngram_counts,
    pair_scores,
    pseudo_joint,
    roles,
    track,
    track_by_path,
    unigram_probabilities,
)
from tl_jets.studies.differences import RowChanges
from tl_jets.studies.pairs import RowScores
from tl_jets.studies.text_comparison import NO_MODEL, _best_products
from tl_jets.studies.vocabularies import check_vocabulary

V = 61
FAMILIES = [spec for spec in zoo.available(["gpt2", "llama", "gemma2", "pythia"]) if spec.processing == "raw"]
GPT2 = zoo.available(["gpt2"])[0]


def toy(seed=0, d_vocab=V, d_model=6, size=1.0):
    """A network of plain functions whose bi-grams are written down by `toy_log_probs`."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    embed = torch.nn.Embedding.from_pretrained(draw(d_vocab, d_model))
    W = [draw(d_model, d_model) for _ in range(2)]
    decoder = Decoder(Norm("RMS", weight=draw(d_model), eps=1e-3), size * draw(d_model, d_vocab), draw(d_vocab) - 20)
    stages = [
        {"0_attn": torch.tanh},
        {"0_mlp": lambda x: torch.sin(x @ W[0]) + 0.3},
        {"1_mlp": lambda x: torch.tanh(x @ W[1])},
    ]
    return CallableModel(embed, stages, decoder)


def toy_log_probs(model, path="direct"):
    """Log-probabilities of all pairs by hand [V, V]."""
    x = model.embeds["embed"].weight.detach()
    first, second = (model.gammas[i][f"{i - 1}_mlp"] for i in (1, 2))
    stream = {
        "direct": lambda: x,
        "0_mlp": lambda: first(x),
        "1_mlp": lambda: second(x),
        "mlps": lambda: x + first(x) + second(x + first(x)),
    }[path]()
    decoder = model.decoder
    normed = stream / (stream.pow(2).mean(-1, keepdim=True) + decoder.norm.eps).sqrt() * decoder.norm.weight
    logits = normed @ decoder.W_U + decoder.b_U
    return logits - logits.exp().sum(-1, keepdim=True).log()


def forward_log_probs(model, path):
    """The model's own log-probabilities of all pairs, by forward passes without attention [V, V]."""
    network = ResidualNetwork(model)
    hooks = [(f"blocks.{layer}.hook_attn_out", lambda x, hook: x * 0) for layer in range(model.cfg.n_layers)]
    if path == "direct":
        hooks += [(f"blocks.{step.split('_')[0]}.hook_mlp_out", lambda x, hook: x * 0) for step in mlp_steps(network)]
    if "pos_embed" in network.sources:
        hooks.append(("hook_pos_embed", lambda x, hook: x * 0))
    with torch.no_grad(), network.view.precision(), model.hooks(hooks):
        return model(torch.arange(V)[:, None], return_type="logits")[:, 0].double().log_softmax(-1)


def random_pairs(n, seed=0, size=V):
    return torch.randint(0, size, (n, 2), generator=torch.Generator().manual_seed(seed))


def ordered(values, keep=None):
    """All pairs [pair, 2] by value, best first, ties by ids."""
    values = np.asarray(values)
    row, column = np.nonzero(np.ones_like(values, dtype=bool) if keep is None else keep)
    order = np.lexsort((column, row, -np.round(values[row, column], 11)))
    return np.stack([row[order], column[order]], axis=1), values[row, column][order]


def named(ids, scores, **options):
    ids = torch.as_tensor(ids)
    names = {int(i): f"w{i}" for i in ids.unique()} | options.pop("names", {})
    return NgramTable.ranked(ids, torch.as_tensor(scores).double(), names=names, **{"path": "direct"} | options)


# --- scores of given pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
@pytest.mark.parametrize("path", ["direct", "mlps"])
def test_pair_scores_are_those_of_forward_passes(spec, path):
    model, pairs = zoo.build(spec), random_pairs(300)
    expected = forward_log_probs(model, path)
    table = pair_scores(model, pairs, path=path)
    given_order = table.parts["given"].long()
    assert torch.equal(table.ids, pairs[given_order])
    assert sorted(given_order.tolist()) == list(range(300))
    torch.testing.assert_close(table.scores, expected[table.ids[:, 0], table.ids[:, 1]], atol=1e-10, rtol=1e-10)
    assert (table.scores.diff() <= 1e-11).all()


def test_pair_scores_are_those_of_tables():
    for dtype in (torch.float64, torch.float32):
        model = zoo.fresh(GPT2, dtype)
        for score in ("logprob", "logit"):
            table = jet_bigrams(model, "0_mlp", top_k=200, score=score)
            found = pair_scores(model, table, path="0_mlp", score=score)
            assert torch.equal(found.ids, table.ids)
            torch.testing.assert_close(found.scores, table.scores, atol=1e-6, rtol=0)
            if score == "logprob":
                normalizers = [x.parts["log_normalizer"] for x in (found, table)]
                torch.testing.assert_close(*normalizers, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", ["direct", "0_mlp", "1_mlp", "mlps"])
def test_more_first_tokens_than_are_held_at_a_time(path):
    model = toy(d_vocab=300)
    pairs = random_pairs(2000, size=300)
    table = pair_scores(model, pairs, path=path)
    expected = toy_log_probs(model, path)[table.ids[:, 0], table.ids[:, 1]]
    torch.testing.assert_close(table.scores, expected, atol=1e-10, rtol=1e-10)


def test_pairs_as_texts():
    model = zoo.build(GPT2)
    by_text = pair_scores(model, [("w5", "w17"), ("w3", 60), (4, 4)])
    assert by_text.digest == pair_scores(model, torch.tensor([[5, 17], [3, 60], [4, 4]])).digest
    assert by_text.names[17] == jet_bigrams(model, top_k=1, columns=[17]).names[17]


def test_what_is_no_pair_is_refused(as_users_run_it):
    model = zoo.build(GPT2)
    for pairs, message in [
        ([("w5", "w6 w7")], "must be one token; 'w6 w7' is 2"),
        (["w5"], "two tokens; got 'w5'"),
        ([(1, 2, 3)], "two tokens"),
        ([], "one at least"),
        (torch.tensor([[1.0, 2.0]]), "must be ids"),
        ([(0, V)], r"second tokens of pairs must be ids in 0..60; got 61"),
        ([(-1, 0)], "first tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            pair_scores(model, pairs)
    with pytest.raises(ValueError, match="the model has none"):
        pair_scores(toy(), [("a", "b")])
    with pytest.raises(ValueError, match="score must be"):
        pair_scores(model, [(1, 2)], score="p")
    broken = toy()
    broken.embeds["embed"].weight.data[7, 0] = math.nan
    with pytest.raises(ValueError, match=r"those of tokens \[7\] are not"):
        pair_scores(broken, [(6, 0), (7, 0)])


# --- files ---


def same(found, wanted):
    """Whether two values are equal, NaN where NaN is."""
    if isinstance(wanted, torch.Tensor):
        return found.dtype == wanted.dtype and torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    if isinstance(wanted, float) and math.isnan(wanted):
        return math.isnan(found)
    if is_dataclass(wanted):
        return all(same(getattr(found, field.name), getattr(wanted, field.name)) for field in fields(wanted))
    if isinstance(wanted, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return type(found) is type(wanted) and len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


def test_results_come_back_from_a_file(tmp_path):
    model, pairs = toy(), random_pairs(6)
    counts = ngram_counts(sampled_text(toy_log_probs(model), 300))
    results = [
        pair_scores(model, pairs),
        mass(model, pairs, controls=3),
        diff(model, toy(1), top_k=5),
        track({1: model, "end": toy(1)}, pairs=pairs, reference="last", n=5, controls=2),
        track({1: model}, pairs=pairs),
        roles(model, n=5),
        compare_with_counts(model, counts, n=5, controls=2),
        checked(-3, 0),
    ]
    for result in results:
        loaded = tl_jets.load(result.save(tmp_path / "file"))
        assert type(loaded) is type(result) and same(loaded, result) and repr(loaded) == repr(result)
        assert loaded.to_dataframe().equals(result.to_dataframe())
        assert same(result.to("cpu"), result)
    assert not same(results[1], replace(results[1], interval=(0.0, 1.0))), "the comparison sees a field"


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_bootstrap_is_scipys(reduce):
    values = torch.from_numpy(np.random.default_rng(1).exponential(size=37))
    statistic = {"mean": np.mean, "sum": np.sum}[reduce]
    expected = scipy.stats.bootstrap(
        (values.numpy(),),
        statistic,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(5),
    ).confidence_interval
    found = bootstrap_interval(values, resamples=4000, seed=5, reduce=reduce)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found != bootstrap_interval(values, resamples=4000, seed=6, reduce=reduce)
    assert np.isnan(bootstrap_interval(values[:1])).all() and np.isnan(bootstrap_interval(values, resamples=0)).all()


def test_another_draw_is_outside_of_the_central_95_percent_in_5_of_100():
    assert central(np.arange(79.0)) == (1.0, 77.0) and central(np.arange(39.0)) == (0.0, 38.0)
    assert central(np.arange(20.0)) == (0.0, 19.0) and np.isnan(central(np.empty(0))).all()
    draw = np.random.default_rng(0)
    for m, expected in ((20, 2 / 21), (39, 0.05), (200, 0.05)):
        others = draw.exponential(size=(4000, m))
        low, high = np.array([central(row) for row in others]).T
        new = draw.exponential(size=4000)
        assert np.mean((new < low) | (new > high)) == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_units_are_drawn_again_whole(reduce):
    draw = np.random.default_rng(2)
    values, units = draw.normal(size=(3, 30)), draw.integers(0, 8, 30) * 1000 - 3
    groups = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    found = bootstrap_intervals(
        torch.from_numpy(values), units=torch.from_numpy(units), resamples=500, seed=4, reduce=reduce
    )
    draw = np.random.default_rng(4)
    resamples = [np.concatenate([groups[i] for i in row]) for row in draw.integers(0, len(groups), (500, len(groups)))]
    for series, (low, high) in zip(values, found.T.tolist(), strict=True):
        drawn = [getattr(series[rows], reduce)() for rows in resamples]
        assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), rel=1e-9)
        alone = {"units": torch.from_numpy(units), "resamples": 500, "seed": 4, "reduce": reduce}
        assert bootstrap_interval(torch.from_numpy(series), **alone) == pytest.approx((low, high), rel=1e-12)
    assert bootstrap_intervals(torch.zeros(2, 5), units=torch.full((5,), 7)).isnan().all(), "one unit has no spread"


def test_intervals_of_units_cover_what_they_should():
    """Values that share half of their variance with their unit: of independent ones 95% is promised, and not kept."""
    draw = np.random.default_rng(0)
    covered = {None: 0, "units": 0}
    units = torch.arange(25).repeat_interleave(6)
    for seed in range(200):
        values = torch.from_numpy(draw.normal(size=25).repeat(6) + draw.normal(size=150))
        for key in covered:
            low, high = bootstrap_interval(values, units=units if key else None, resamples=300, seed=seed)
            covered[key] += low <= 0 <= high
    assert covered["units"] > 0.88 * 200 and covered[None] < 0.75 * 200


# --- mass -----------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    size=st.integers(1, 40),
    reduce=st.sampled_from(["mean", "sum"]),
    joint=st.booleans(),
    path=st.sampled_from(["direct", "0_mlp", "mlps"]),
)
@settings(max_examples=15)
def test_mass_is_what_the_whole_matrix_says(seed, size, reduce, joint, path):
    model = toy(seed)
    pairs = random_pairs(size, seed)
    unigram = torch.rand(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unigram /= unigram.sum()
    found = mass(model, pairs, path=path, reduce=reduce, unigram=unigram if joint else None, controls=7, seed=seed)
    matrix = toy_log_probs(model, path).exp() * (unigram[:, None] if joint else 1)
    distinct = sorted(set(map(tuple, pairs.tolist())))
    shares = np.array([float(matrix[i, j]) for i, j in distinct])
    total = {"mean": np.mean, "sum": np.sum}[reduce]
    assert found.value == pytest.approx(total(shares), rel=1e-10)
    assert (found.mean, found.sum) == pytest.approx((shares.mean(), shares.sum()), rel=1e-10)
    assert (found.size, found.repeated, found.skipped) == (len(distinct), size - len(distinct), 0)
    draw = np.random.default_rng(seed)
    second = np.array([j for _, j in distinct])
    for control in found.controls.tolist():
        shuffled = second[draw.permutation(len(second))]
        expected = total([float(matrix[i, j]) for (i, _), j in zip(distinct, shuffled, strict=True)])
        assert control == pytest.approx(expected, rel=1e-10)
    assert found.rank == 1 + sum(x >= found.value * (1 - 1e-12) for x in found.controls.tolist())
    again = mass(
        model, pairs.flip(0), path=path, reduce=reduce, unigram=unigram if joint else None, controls=7, seed=seed
    )
    assert again.to_dataframe().equals(found.to_dataframe())


def dominated():
    """Token i is followed by token i + 1 (in the list: even i) with probability near one."""
    d = V
    W_U = torch.zeros(d, d, dtype=torch.float64)
    for i in range(0, 40, 2):
        W_U[i, i + 1] = 9.0
    embed = torch.nn.Embedding.from_pretrained(torch.eye(d, dtype=torch.float64))
    return CallableModel(
        embed, [{"0_mlp": torch.tanh}], Decoder(Norm("none"), W_U, torch.zeros(d, dtype=torch.float64))
    )


def test_mass_of_a_list_that_dominates():
    pairs = [(i, i + 1) for i in range(0, 40, 2)]
    found = mass(dominated(), pairs, controls=200)
    p = math.exp(9) / (math.exp(9) + V - 1)
    assert found.value == pytest.approx(p, rel=1e-12)
    assert found.interval == pytest.approx((p, p), rel=1e-12)
    # A shuffled list of 20 has one bi-gram in its place, on average.
    assert 0.5 < found.control_mean * 20 / p < 1.6
    assert found.rank == 1 and len(found.controls) == 200
    # A list whose second tokens are all the same is its own control.
    same = mass(dominated(), [(0, 1), (2, 1), (4, 1)], controls=5)
    assert same.rank == 6 and same.controls.tolist() == pytest.approx([same.value] * 5)
    assert "rank 6 of 6" in repr(same)


def test_mass_of_words():
    model = zoo.build(GPT2)
    found = mass(model, ["w5 w6 w7", "w8", ("w5", "w6"), (3, 4)], controls=3)
    assert (found.skipped, found.repeated, found.size) == (1, 1, 3)
    assert sorted(found.table.ids.tolist()) == [[3, 4], [5, 6], [6, 7]]
    assert found.sha256 == mass(model, torch.tensor([[6, 7], [3, 4], [5, 6]])).sha256
    assert found.sha256 != mass(model, torch.tensor([[6, 7], [3, 4]])).sha256
    assert "1 words of one token skipped" in repr(found)
    letters = mass(model, ["ab", "c"], tokenize=lambda word: [ord(x) - 90 for x in word])
    assert letters.table.ids.tolist() == [[7, 8]] and letters.skipped == 1
    assert math.isnan(letters.interval[0]) and letters.rank == 101  # one bi-gram: every shuffle is the list itself
    assert found.fingerprint == jet_bigrams(model, top_k=1).fingerprint


def test_bi_grams_of_a_word_are_one_unit():
    """The bootstrap of a list of words, by hand: words are drawn again, not bi-grams; sharing one makes two words one."""
    model = zoo.build(GPT2)
    words = ["w5 w6 w7 w8", "w9 w10", "w20 w21 w22", "w7 w8 w30", ("w40", "w41")]
    found = mass(model, words, controls=0, seed=3, bootstrap=400)
    share = {tuple(row): float(x) for row, x in zip(found.table.ids.tolist(), found.table.parts["mass"], strict=True)}
    units = [[(5, 6), (6, 7), (7, 8), (8, 30)], [(9, 10)], [(20, 21), (21, 22)], [(40, 41)]]
    drawn = np.random.default_rng(3).integers(0, 4, (400, 4))
    means = [np.mean([share[pair] for i in row for pair in units[i]]) for row in drawn]
    assert found.interval == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-9)
    assert mass(model, words[::-1], controls=0, seed=3, bootstrap=400).interval == found.interval
    values = torch.tensor([share[pair] for pair in sorted(share)])
    alone = mass(model, found.table, controls=0, seed=3, bootstrap=400)
    assert alone.interval == pytest.approx(bootstrap_interval(values, seed=3, resamples=400), rel=1e-6)


def test_mass_refuses(as_users_run_it):
    model = zoo.build(GPT2)
    for words, options, message in [
        (["w5", "w6"], {}, "none of its 2 words"),
        ("w5 w6", {}, "Put it in a list"),
        ([(1, 2)], {"reduce": "max"}, "reduce must be"),
        ([(1, 2)], {"controls": -1}, "controls must be an integer >= 0; got -1"),
        ([(1, 2)], {"unigram": torch.full((V,), 1.0)}, "sum to 1"),
        ([(1, 2)], {"unigram": torch.full((V + 1,), 1 / (V + 1))}, r"\(61\)"),
        ([(1, 2)], {"unigram": torch.tensor([2.0, -1.0] + [0.0] * (V - 2))}, "none negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            mass(model, words, **options)
    with pytest.raises(ValueError, match="the model has none"):
        mass(toy(), ["ab"])


# --- pseudo-joint and hit ratio -------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10**6),
    per=st.sampled_from(["global", "row"]),
    top_k=st.integers(1, V),
    sharp=st.sampled_from([0.1, 1.0, 4.0]),
    rows=st.booleans(),
    columns=st.booleans(),
)
@settings(max_examples=25)
def test_the_pseudo_joint_knows_how_far_it_is_exact(seed, per, top_k, sharp, rows, columns):
    model = toy(seed % 5, size=0.5)
    source = torch.Generator().manual_seed(seed)
    unigram = (sharp * torch.randn(V, generator=source, dtype=torch.float64)).softmax(0)
    unigram[3] = 0
    unigram /= unigram.sum()
    chosen = [list(range(0, V, 2)) if rows else None, list(range(5, V, 3)) if columns else None]
    table = jet_bigrams(model, top_k=top_k, per=per, rows=chosen[0], columns=chosen[1])
    joint = pseudo_joint(table, unigram)
    keep = np.zeros((V, V), dtype=bool)
    keep[np.ix_(*(range(V) if x is None else x for x in chosen))] = True
    keep[3] = False
    whole = toy_log_probs(model) + unigram.log()[:, None]
    best, scores = ordered(whole, keep)
    exact = joint.settings["exact_top"]
    assert joint.ids[:exact].tolist() == best[:exact].tolist()
    np.testing.assert_allclose(joint.scores[:exact], scores[:exact], atol=1e-10)
    np.testing.assert_allclose(joint.scores, whole[joint.ids[:, 0], joint.ids[:, 1]], atol=1e-10)
    assert joint.settings["left_out"] == int((table.ids[:, 0] == 3).sum()) == len(table) - len(joint)
    if per == "row" and top_k == V:
        assert exact == len(joint)
    # It promises all that follows: a pair left out is at most the last one kept (of its row), times a probability.
    n_rows, n_columns = (V if x is None else len(x) for x in chosen)
    last = dict(zip(table.ids[:, 0].tolist(), table.scores.tolist(), strict=True))  # best first: the worst of each
    prior = unigram.log().tolist()
    if per == "global":
        most = table.scores[-1].item() + max(prior) if top_k < n_rows * n_columns else -math.inf
    else:
        most = max(score + prior[token] for token, score in last.items()) if top_k < n_columns else -math.inf
    assert exact >= int((joint.scores > most + 1e-9).sum())
    np.testing.assert_allclose(joint.parts["logprob"] + unigram.log()[joint.ids[:, 0]], joint.scores)
    if per == "row" and not rows:  # whole rows were cut away: what they held is not known
        few = pseudo_joint(table.where(id_1=list(range(4, 30))), unigram)
        exact = few.settings["exact_top"]
        assert few.ids[:exact].tolist() == best[:exact].tolist()
    # A table that was cut promises nothing but what it holds.
    cut = pseudo_joint(table.where(id_2=int(table.ids[0, 1])), unigram) if (table.ids[0, 0] != 3) else joint
    if len(cut) < len(joint):
        assert cut.settings["exact_top"] == 0


def test_the_pseudo_joint_refuses(as_users_run_it):
    table = jet_bigrams(toy(), top_k=20)
    for unigram, message in [
        (torch.full((V - 30,), 1 / (V - 30)), "at least"),
        (torch.full((V,), 1.0), "sum to 1"),
        (torch.full((V, 1), 1 / V), "sum to 1"),
        (torch.full((V,), math.nan), "sum to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            pseudo_joint(table, unigram)
    with pytest.raises(ValueError, match="by log-probability"):
        pseudo_joint(jet_bigrams(toy(), top_k=20, score="logit"), torch.full((V,), 1 / V))


@pytest.mark.parametrize("n", [1, 50, 3000])
def test_the_best_of_a_pseudo_joint(n):
    model = toy(size=0.3)
    unigram = torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(3).softmax(0)
    unigram[torch.arange(0, V, 5)] = 0
    unigram /= unigram.sum()
    for path, table in best_joint(model, ["direct", "mlps"], unigram, n).items():
        keep = np.broadcast_to(unigram.numpy()[:, None] > 0, (V, V))
        best, scores = ordered(toy_log_probs(model, path) + unigram.log()[:, None], keep)
        assert table.ids.tolist() == best[:n].tolist()
        np.testing.assert_allclose(table.scores, scores[:n], atol=1e-10)


def test_hit_ratio_counts_what_is_shared():
    reference = named([[i, i] for i in range(10)], [-float(i) for i in range(10)])
    table = named([[i, i] for i in (1, 0, 20, 21, 4, 5, 6)], [-float(i) for i in range(7)])
    assert [hit_ratio(table, reference, n) for n in (1, 2, 3, 5)] == [0.0, 1.0, 2 / 3, 3 / 5]
    assert hit_ratio(reference, table, 5) == 3 / 5
    with pytest.raises(ValueError, match="rows of both tables, 7 and 10; got 8"):
        hit_ratio(table, reference, 8)
    with pytest.raises(ValueError, match="one vocabulary; 1 of 2 shared ids"):
        hit_ratio(named([[0, 1]], [0.0], names={0: "other"}), reference, 1)
    with pytest.raises(ValueError, match="of one length; got 3 and 2"):
        hit_ratio(named([[0, 1, 2]], [0.0]), reference, 1)


# --- counts ---------------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.lists(st.integers(0, 6), max_size=30), min_size=1, max_size=5),
    n=st.integers(1, 5),
    score=st.sampled_from(["logcount", "logprob"]),
    min_count=st.integers(1, 3),
)
@settings(max_examples=30)
def test_counts_are_those_of_counting(texts, n, score, min_count):
    expected = Counter(tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1))
    kept = {gram: count for gram, count in expected.items() if count >= min_count}
    if not kept:
        with pytest.raises(ValueError, match=r"at least|occurs"):
            ngram_counts(texts, n=n, score=score, min_count=min_count)
        return
    table = ngram_counts(texts, n=n, score=score, min_count=min_count)
    contexts = Counter()
    for gram, count in expected.items():
        contexts[gram[:-1]] += count
    found = {tuple(row): i for i, row in enumerate(table.ids.tolist())}
    assert found.keys() == kept.keys() and table.settings["total"] == sum(expected.values())
    for gram, i in found.items():
        assert table.parts["count"][i] == kept[gram]
        assert table.parts["context_count"][i] == contexts[gram[:-1]]
        value = kept[gram] / (contexts[gram[:-1]] if score == "logprob" else 1)
        assert table.scores[i].item() == pytest.approx(math.log(value), abs=1e-12)


def test_counts_of_tensors_and_large_ids(as_users_run_it):
    ids = torch.tensor([[5, 2**40, 5, 2**40], [2**40, 5, 5, 5]])
    table = ngram_counts(ids)
    assert table.ids.tolist() == [[5, 5], [5, 2**40], [2**40, 5]] and table.parts["count"].tolist() == [2, 2, 2]
    assert table.digest == ngram_counts(ids.tolist()).digest
    assert ngram_counts(ids[0]).settings["sha256"] != table.settings["sha256"]
    assert ngram_counts([1, 2, 3], tokenizer=zoo.tokenizer()).names[1].strip() == "<s>"
    for tokens, message in [([[1]], "2 tokens at least"), ([0.5, 1.5], "token ids"), ([-1, 2], "none negative")]:
        with pytest.raises(ValueError, match=message):
            ngram_counts(tokens)


def test_unigrams():
    found = unigram_probabilities([[0, 3], [3]], 5, add=1)
    assert found.tolist() == pytest.approx([2 / 8, 1 / 8, 1 / 8, 3 / 8, 1 / 8])
    with pytest.raises(ValueError, match=r"ids in 0\.\.2"):
        unigram_probabilities([0, 3], 3)


def sampled_text(log_probs, length, seed=0):
    """A text that a bi-gram model writes: each token drawn after the one before."""
    source = torch.Generator().manual_seed(seed)
    text, rows = [0], log_probs.exp()
    for _ in range(length):
        text.append(int(torch.multinomial(rows[text[-1]], 1, generator=source)))
    return text


def test_a_text_that_the_direct_path_wrote_is_found_there():
    model = toy(size=1.5)
    text = sampled_text(toy_log_probs(model), 20000)
    counts = ngram_counts(text)
    found = compare_with_counts(model, counts, n=100, controls=10)
    assert found.labels == ["direct", "0_mlp", "1_mlp", "mlps", "unigram (no model)"]
    frame = found.to_dataframe().set_index("path")
    assert frame.loc["direct", "hit_ratio"] > 0.85 and frame.loc["direct", "correlation"] > 0.95
    assert frame.loc["direct", "hit_control"] < 0.5
    assert frame.loc[["0_mlp", "1_mlp"], "hit_ratio"].max() < 0.6
    assert frame.loc["unigram (no model)", "hit_ratio"] < 0.7
    # By hand: the 100 most frequent, the 100 best by P(z2|z1) u(z1), ranks of conditional log-probabilities.
    real = Counter(itertools.pairwise(text))
    frequent = sorted(real, key=lambda pair: (-real[pair], pair))[:100]
    first = np.bincount(text[:-1], minlength=V) / (len(text) - 1)
    with np.errstate(divide="ignore"):
        joint = toy_log_probs(model).numpy() + np.log(first)[:, None]
    best = set(map(tuple, ordered(joint)[0][:100].tolist()))
    assert found.hit_ratio[0] == pytest.approx(len(best & set(frequent)) / 100)
    conditional = [real[i, j] / np.sum(np.array(text[:-1]) == i) for i, j in frequent]
    expected = scipy.stats.spearmanr([toy_log_probs(model)[i, j] for i, j in frequent], conditional).statistic
    assert float(found.correlation[0]) == pytest.approx(expected, abs=1e-9)
    second = np.bincount(text[1:], minlength=V)
    independent = set(map(tuple, ordered(first[:, None] * second)[0][:100].tolist()))
    assert found.hit_ratio[-1] == pytest.approx(len(independent & set(frequent)) / 100)
    assert found.verdicts["direct"] == "hits and order" and list(found.verdicts) == found.labels[:-1]


@given(seed=st.integers(0, 10**6), size=st.integers(1, 12), n=st.integers(1, 150))
@settings(max_examples=40)
def test_the_best_products_of_two_tokens_are_those_of_all_pairs(seed, size, n):
    draw = np.random.default_rng(seed)
    first, second = (torch.from_numpy(draw.integers(1, 5, size)).double() / 64 for _ in range(2))  # ties everywhere
    every = sorted(itertools.product(range(size), repeat=2), key=lambda pair: (-first[pair[0]] * second[pair[1]], pair))
    assert list(map(tuple, _best_products(first, second, n).tolist())) == every[:n]


@pytest.mark.parametrize(
    ("hit", "order", "verdict"),
    [
        (0.9, 0.9, "hits and order"),
        (0.9, 0.39, "hits only"),  # below the shuffled lists' 97.5th percentile (0.4), above frequencies (0.1)
        (0.29, 0.9, "order only"),  # below frequencies (0.3), above shuffled lists (0.2)
        (0.3, 0.41, "order only"),  # not above frequencies
        (0.19, -0.9, "neither"),
    ],
)
def test_a_path_is_above_both_controls_in_both_measures_or_said_not_to_be(hit, order, verdict):
    # Of 79 values 2.5% of further ones exceed the last but one: 2 of 80 gaps.
    shuffled = torch.arange(79.0, dtype=torch.float64)[torch.randperm(79, generator=torch.Generator().manual_seed(0))]
    above = 0.01 * (shuffled - 77)
    found = TextComparison(
        labels=["0_mlp", "1_mlp", NO_MODEL],
        hit_ratio=torch.tensor([hit, 0.1, 0.3]).double(),
        correlation=torch.tensor([order, -1.0, 0.1]).double(),
        hit_control=torch.stack([0.2 + above, above, above + 7]),
        correlation_control=torch.stack([0.4 + above, above, above + 7]),
        n=100,
        tables={},
        text={"total": 1234},
    )
    assert found.verdicts == {"0_mlp": verdict, "1_mlp": "neither"}
    frame, summary = found.to_dataframe(), found.summary()
    assert frame["verdict"].tolist() == summary["verdict"].tolist() == [verdict, "neither", ""]
    assert frame["hit_control_high"][0] == pytest.approx(0.2) and verdict in repr(found)
    assert summary.loc[0].tolist()[:2] == ["0_mlp", f"{hit:.2f}"] and len(summary.columns) == 6
    low, mean = 0.2 + 0.01 * (1 - 77), 0.2 + float(above.mean())
    assert summary["hit ratio, shuffled"][0] == f"{mean:.2f} [{low:.2f}, 0.20]"
    shown = found._repr_html_()
    assert shown.count('<th scope="col"') == 6 and f"{mean:.2f} [{low:.2f}, 0.20]" in shown and f">{verdict}<" in shown
    # Nothing to judge by: no shuffled lists, or a correlation that is not defined.
    none = replace(found, hit_control=found.hit_control[:, :0], correlation_control=found.correlation_control[:, :0])
    assert none.verdicts == {} and none.summary()["hit ratio, shuffled"].tolist() == ["n/a"] * 3 and repr(none)
    unknown = replace(found, correlation=torch.tensor([math.nan, 0.2, 0.1]).double())
    assert unknown.verdicts == {"1_mlp": "order only"} and unknown.to_dataframe()["verdict"][0] == ""


def test_texts_of_another_vocabulary_or_cut_ones_are_refused():
    counts = ngram_counts([1, 2, 3, 1, 2])
    for table, message in [
        (counts[:2], "all bi-grams"),
        (ngram_counts([1, 2, 3, 1, 2], min_count=2), "min_count=1"),
        (ngram_counts([1, 2, 3], n=3), "3-grams"),
        (jet_bigrams(toy(), top_k=3), "all bi-grams"),
        (ngram_counts([1, V]), "vocabulary of 61"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare_with_counts(toy(), table)


def test_every_study_takes_the_path_of_a_table():
    """A label of several steps means what the list means; a path that is given twice is one."""
    model, steps, label = toy(), ["0_mlp", "1_mlp"], "0_mlp > 1_mlp"
    counts = ngram_counts(sampled_text(toy_log_probs(model), 300))
    studies = [
        lambda path: pair_scores(model, [(1, 2)], path=path).digest,
        lambda path: mass(model, [(1, 2), (3, 4)], path=path).to_dataframe().to_dict(),
        lambda path: track(models, pairs=[(1, 2)], reference="last", n=20, path=path).to_dataframe().to_dict(),
        lambda path: diff(model, models[1], path=path, top_k=5).rises.digest,
        lambda path: compare_with_counts(model, counts, paths=[path], n=20).to_dataframe().to_dict(),
    ]
    models = {0: toy(), 1: toy(1)}
    for study in studies:
        assert study(label) == study(steps) != study("1_mlp")
    found = compare_with_counts(model, counts, paths=["mlps", label, steps], n=20)
    assert found.labels == ["mlps", label, NO_MODEL] and list(found.tables) == ["mlps", label]


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_track_holds_one_model_at_a_time():
    alive: list[weakref.ref] = []

    def load(step):
        gc.collect()
        assert not any(reference() for reference in alive)
        model = zoo.fresh(GPT2, seed=step)
        alive.append(weakref.ref(model))
        return model

    pairs = random_pairs(5)
    options = {"pairs": pairs, "reference": "last", "n": 200, "path": "mlps"}
    found = track(load, [3, 4, 5], **options)
    expected = [forward_log_probs(zoo.build(GPT2, seed=step), "mlps") for step in (3, 4, 5)]
    for scores, log_probs in zip(found.scores, expected, strict=True):
        torch.testing.assert_close(scores, log_probs[pairs[:, 0], pairs[:, 1]], atol=1e-10, rtol=1e-10)
    best = [set(map(tuple, ordered(log_probs)[0][:200].tolist())) for log_probs in (expected[0], expected[-1])]
    assert found.hit_ratio.tolist() == [len(best[0] & best[1]) / 200, found.hit_ratio[1], 1.0]
    alive.clear()
    again = track(((step, load(step)) for step in (3, 4, 5)), **options)
    assert again.to_dataframe().equals(found.to_dataframe())
    assert list(again.to_dataframe().columns)[:4] == ["checkpoint", "hit_ratio", "hit_control", "mean_score"]
    assert len(set(found.fingerprints)) == 3 and "3 checkpoints" in repr(found)


def test_track_with_a_reference_and_a_unigram():
    models = {str(seed): toy(seed, size=0.5) for seed in range(3)}
    unigram = torch.arange(1.0, V + 1).double() / (V * (V + 1) / 2)
    reference = best_joint(models["1"], ["direct"], unigram, 80)["direct"]
    found = track(models, reference=reference, n=80, unigram=unigram)
    expected = []
    for model in models.values():
        best = ordered(toy_log_probs(model) + unigram.log()[:, None])[0][:80]
        expected.append(len(set(map(tuple, best.tolist())) & set(map(tuple, reference.ids.tolist()))) / 80)
    assert found.hit_ratio.tolist() == expected and expected[1] == 1
    assert found.scores.shape == (3, 0)


def test_tracks_of_several_paths_are_those_of_each():
    models = {f"step {seed}": toy(seed) for seed in range(3)}
    pairs, unigram = random_pairs(6), torch.full((V,), 1 / V, dtype=torch.float64)
    for reference in ("last", best_joint(models["step 1"], ["mlps"], unigram, 50)["mlps"]):
        options = {"pairs": pairs, "reference": reference, "n": 50, "unigram": unigram, "controls": 3, "seed": 2}
        found = track_by_path(models, **options)
        assert list(found) == ["direct", "0_mlp", "1_mlp", "mlps"]
        for path, mine in found.items():
            alone = track(models, path=path, **options)
            assert mine.to_dataframe().equals(alone.to_dataframe()) and mine.path == path
            for model, table, scores in zip(models.values(), mine.tables, mine.scores, strict=True):
                log_probs = toy_log_probs(model, path)
                assert table.ids.tolist() == ordered(log_probs)[0][:50].tolist()
                torch.testing.assert_close(scores, log_probs[pairs[:, 0], pairs[:, 1]], atol=1e-10, rtol=1e-10)


def test_the_control_of_a_hit_ratio():
    models = {str(seed): toy(seed, size=0.5) for seed in range(3)}
    found = track(models, reference="last", n=40, controls=4, seed=9)
    draw = np.random.default_rng(9)
    best = [set(map(tuple, ordered(toy_log_probs(model))[0][:40].tolist())) for model in models.values()]
    first, second = np.array(ordered(toy_log_probs(models["2"]))[0][:40]).T
    for i in range(4):
        shuffled = list(zip(first.tolist(), second[draw.permutation(40)].tolist(), strict=True))
        expected = [sum(pair in pairs for pair in shuffled) / 40 for pairs in best]
        assert found.hit_control[:, i].tolist() == expected
    assert found.hit_ratio[-1] == 1 and found.hit_control[-1].max() < 1, "not the data themselves"
    assert len(set(found.hit_control[-1].tolist())) > 1, "nor one shuffle for all"
    np.testing.assert_allclose(found.to_dataframe()["hit_control"], found.hit_control.mean(1))
    assert "hit_control" not in track(models, reference="last", n=40, controls=0).to_dataframe()


def test_track_refuses(as_users_run_it):
    with pytest.raises(ValueError, match="something to track"):
        track({"a": toy()})
    with pytest.raises(ValueError, match="told which"):
        track(lambda name: toy(), pairs=[(1, 2)])
    with pytest.raises(ValueError, match="without them"):
        track({"a": toy()}, ["a"], pairs=[(1, 2)])
    with pytest.raises(ValueError, match="got none"):
        track(iter([]), pairs=[(1, 2)])
    with pytest.raises(ValueError, match="Each path must be given once"):
        track_by_path({"a": toy()}, paths=["0_mlp", ["0_mlp"]], pairs=[(1, 2)])

    def never(name):
        raise AssertionError("a reference that is too short is found out before anything is loaded")

    with pytest.raises(ValueError, match="got 30 and a reference of 20 rows"):
        track(never, ["a"], reference=jet_bigrams(toy(), top_k=20), n=30)
    with pytest.raises(ValueError, match="61 tokens, checkpoint 'b' 62"):
        track({"a": toy(), "b": toy(d_vocab=62)}, pairs=[(1, 2)])


# --- differences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["probability", "logprob"])
@pytest.mark.parametrize("path", ["direct", "mlps"])
def test_diff_is_that_of_both_matrices(change, path):
    a, b = toy(1, d_vocab=150), toy(2, d_vocab=150)
    before, after = toy_log_probs(a, path), toy_log_probs(b, path)
    delta = after.exp() - before.exp() if change == "probability" else after - before
    for at_least in (0.0, 0.01):
        found = diff(a, b, path=path, top_k=300, change=change, at_least=at_least)
        keep = torch.maximum(before, after).exp().numpy() >= at_least
        for table, sign in ((found.rises, 1), (found.falls, -1)):
            best, scores = ordered(sign * delta, keep & (sign * delta.numpy() > 0))
            assert table.ids.tolist() == best[:300].tolist()
            np.testing.assert_allclose(table.scores, scores[:300], atol=1e-10)
            np.testing.assert_allclose(table.parts["before"], before[table.ids[:, 0], table.ids[:, 1]], atol=1e-10)
            np.testing.assert_allclose(table.parts["after"], after[table.ids[:, 0], table.ids[:, 1]], atol=1e-10)
    np.testing.assert_allclose(found.kl, (before.exp() * (before - after)).sum(1), atol=1e-10)
    frame = found.to_dataframe()
    assert (frame["change"][:300] > 0).all() and (frame["change"][300:] < 0).all()


def toy32(seed, *, shift=0.0, size=1.0, transform=None):
    """A network of plain functions in float32; `shift` moves its weights a little, `size` its logits a lot."""
    source = torch.Generator().manual_seed(0)
    moved = torch.Generator().manual_seed(seed)

    def draw(*shape):
        base = torch.randn(*shape, generator=source)
        return base + shift * torch.randn(*shape, generator=moved)

    embed = torch.nn.Embedding.from_pretrained(draw(900, 8))
    decoder = Decoder(Norm("RMS", weight=draw(8), eps=1e-3), size * draw(8, 900), draw(900) - 20, transform)
    return CallableModel(embed, [{"0_mlp": torch.tanh}], decoder)


def capped(logits):
    return 25 * torch.tanh(logits / 25)


@pytest.mark.parametrize("change", ["probability", "logprob"])
@pytest.mark.parametrize(("size", "transform"), [(1.0, None), (15.0, None), (2.0, capped)], ids=["1", "15", "cap"])
def test_diff_in_float32_misses_nothing(change, size, transform, monkeypatch):
    a, b = toy32(1, size=size, transform=transform), toy32(2, shift=0.2, size=size, transform=transform)
    everything = torch.arange(900)
    before, after = (RowScores(model, "mlps").read(everything)[0] for model in (a, b))
    delta = after.exp() - before.exp() if change == "probability" else after - before
    rows_read, read = [], RowScores.read
    monkeypatch.setattr(RowScores, "read", lambda self, first: rows_read.extend(first.tolist()) or read(self, first))
    for at_least in (0.0, 0.02):
        rows_read.clear()
        found = diff(a, b, path="mlps", top_k=60, change=change, at_least=at_least)
        assert len(set(rows_read)) < 700, "most rows are read in float32 only"
        keep = torch.maximum(before, after).exp().numpy() >= at_least
        for table, sign in ((found.rises, 1), (found.falls, -1)):
            best, scores = ordered(sign * delta, keep)
            assert table.ids.tolist() == best[:60].tolist()
            np.testing.assert_allclose(table.scores, scores[:60], atol=1e-10)
        np.testing.assert_allclose(found.kl, (before.exp() * (before - after)).sum(1), rtol=1e-4)
    close = toy32(3, shift=1e-3, size=size, transform=transform)
    exact = read(RowScores(close, "mlps"), everything)[0]
    np.testing.assert_allclose(
        diff(a, close, path="mlps").kl, (before.exp() * (before - exact)).sum(1), rtol=0.03, atol=1e-12
    )


@pytest.mark.parametrize("change", ["probability", "logprob"])
def test_rows_without_a_pair_of_the_wanted_probability_are_not_read_again(change, monkeypatch):
    a, b = toy32(1), toy32(2, shift=0.2)
    everything = torch.arange(900)
    before, after = (RowScores(model, "mlps").read(everything)[0] for model in (a, b))
    likely = torch.maximum(before, after).exp() >= 0.4
    assert 0 < (rows := int(likely.any(1).sum())) < 200
    rows_read, read = set(), RowScores.read
    monkeypatch.setattr(RowScores, "read", lambda self, first: rows_read.update(first.tolist()) or read(self, first))
    found = diff(a, b, path="mlps", top_k=900, change=change, at_least=0.4)
    delta = after.exp() - before.exp() if change == "probability" else after - before
    for table, sign in ((found.rises, 1), (found.falls, -1)):
        best, _ = ordered(sign * delta, likely.numpy() & (sign * delta.numpy() > 0))
        assert table.ids.tolist() == best.tolist()
    assert len(rows_read) <= rows + 128, "a chunk for the rises, a chunk for the falls"


def test_what_float32_says_of_rows_are_bounds():
    a, b = toy32(1), toy32(2, shift=0.3)
    everything = torch.arange(900)
    before, after = (RowScores(model, "direct").read(everything)[0] for model in (a, b))
    for change in ("probability", "logprob"):
        delta = after.exp() - before.exp() if change == "probability" else after - before
        screen = RowChanges(RowScores(a), RowScores(b), change=change)
        found = screen.read(everything)
        # Each logarithm may be off by its row's error, in the worst way.
        low, high = (
            [x + sign * side.errors[:, None] for x, side in zip((before, after), screen.sides, strict=True)]
            for sign in (-1, 1)
        )
        if change == "probability":
            low, high = ([x.exp() for x in pair] for pair in (low, high))
        np.testing.assert_allclose(found.rise, (high[1] - low[0]).amax(1), rtol=1e-5, atol=4e-6)
        np.testing.assert_allclose(found.fall, (high[0] - low[1]).amax(1), rtol=1e-5, atol=4e-6)
        for bound, sign in ((found.rise, 1), (found.fall, -1)):
            largest = (sign * delta).amax(1)
            assert (bound >= largest).all() and (bound <= largest + 1e-3 * (1 + largest.abs())).all()
    broken = toy32(1)
    broken.embeds["embed"].weight.data[7, 0] = math.nan
    with pytest.raises(ValueError, match=r"those of tokens \[7\] are not"):
        diff(a, broken)


def test_diff_of_models_is_antisymmetric_and_of_rows():
    for spec in (s for s in FAMILIES if s.name == "gpt2"):
        a, b = zoo.build(spec), zoo.fresh(spec, seed=1)
        forward, back = diff(a, b, path="mlps", top_k=40), diff(b, a, path="mlps", top_k=40)
        assert torch.equal(forward.rises.ids, back.falls.ids) and torch.equal(forward.falls.ids, back.rises.ids)
        delta = forward_log_probs(b, "mlps").exp() - forward_log_probs(a, "mlps").exp()
        np.testing.assert_allclose(forward.rises.scores, ordered(delta)[1][:40], atol=1e-10)
        part = diff(a, b, path="mlps", top_k=40, rows=[9, 3])
        assert set(part.rises.ids[:, 0].tolist()) == {3, 9} == set(part.first.tolist())
    nothing = diff(a, a)
    assert len(nothing.rises) == len(nothing.falls) == 0 and float(nothing.kl.max()) == 0
    assert len(nothing.to_dataframe()) == 0 and "mean KL 0 nats" in repr(nothing)


def test_ties_of_a_difference_go_to_the_smallest_ids():
    a = dominated()
    b = CallableModel(a.embeds, a.gammas, Decoder(Norm("none"), torch.zeros_like(a.decoder.W_U), a.decoder.b_U))
    found = diff(a, b, top_k=30)
    pairs = [(i, j) for i in range(0, 40, 2) for j in range(V) if j != i + 1]
    assert list(map(tuple, found.rises.ids.tolist())) == pairs[:30]
    assert list(map(tuple, found.falls.ids.tolist())) == [(i, i + 1) for i in range(0, 40, 2)]


def test_diff_refuses_other_vocabularies(as_users_run_it):
    with pytest.raises(ValueError, match="61 tokens, the other model 62"):
        diff(toy(), toy(d_vocab=62))
    model, other = zoo.build(GPT2), zoo.fresh(GPT2)
    tokenizer = zoo.tokenizer()
    words = {f"x{i}" if i == 7 else word: i for word, i in tokenizer.get_vocab().items()}
    with pytest.raises(ValueError, match=r"2 entries of the tokenizers .* differ, such as \['w7', 'x7'\]"):
        check_vocabulary((V, dict(tokenizer.get_vocab())), (V, words))
    other.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        diff(model, other)
    for options, message in [
        ({"change": "ratio"}, "change must be"),
        ({"top_k": 0}, "top_k must be an integer >= 1; got 0"),
        ({"at_least": 2.0}, "at_least"),
        ({"rows": [V]}, r"0\.\.60"),
    ]:
        with pytest.raises(ValueError, match=message):
            diff(toy(), toy(), **options)


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("joint", [False, True])
def test_roles_are_the_tables_of_the_paths(joint):
    model = toy()
    unigram = torch.arange(1.0, V + 1).double() / (V * (V + 1) / 2) if joint else None
    counts = ngram_counts(sampled_text(toy_log_probs(model, "1_mlp"), 5000))
    found = roles(model, n=60, counts=counts, unigram=unigram)
    assert found.labels == ["direct", "0_mlp", "1_mlp", "mlps", "text"] and found.components == ["0_mlp", "1_mlp"]
    best = []
    for path in found.labels[:-1]:
        score = toy_log_probs(model, path) + (unigram.log()[:, None] if joint else 0)
        best.append(set(map(tuple, ordered(score)[0][:60].tolist())))
        assert best[-1] == set(map(tuple, found.tables[path].ids.tolist()))
    best.append(set(map(tuple, counts.ids[:60].tolist())))
    expected = [[len(x & y) / 60 for y in best] for x in best]
    np.testing.assert_allclose(found.overlap, expected)
    frame = found.to_dataframe().set_index("path")
    assert frame.loc["0_mlp", "other MLPs"] == pytest.approx(expected[1][2])
    assert frame.loc["1_mlp", "text"] == pytest.approx(expected[2][4])
    assert found.side_by_side(3).shape == (3, 5) and "heads are not looked at" in repr(found)


def test_roles_of_heads():
    model = zoo.build(GPT2)
    found = roles(model, n=30, heads=True)
    expected = {f"L{layer}H{h}": t for layer in (0, 1) for h, t in jet_trigrams(model, layer, top_k=30).items()}
    assert list(found.heads) == list(expected)
    assert all(table.digest == expected[label].digest for label, table in found.heads.items())
    frame = found.to_dataframe().set_index("path")
    best = {label: set(map(tuple, table.ids.tolist())) for label, table in expected.items()}
    shared = [len(best["L0H1"] & other) / 30 for label, other in best.items() if label != "L0H1"]
    assert frame.loc["L0H1", "other heads"] == pytest.approx(np.mean(shared))
    assert f"{len(expected)} heads" in repr(found)


def test_roles_refuse():
    with pytest.raises(ValueError, match="has none"):
        roles(zoo.build(zoo.available(["attn_only"])[0]))
    with pytest.raises(ValueError, match="100 bi-grams or more; got 2"):
        roles(toy(), counts=ngram_counts([1, 2, 3]))
    text = sampled_text(toy_log_probs(toy()), 500)
    counts = ngram_counts(text)
    other = named(counts.ids, counts.scores, parts=counts.parts)  # the same ids are words of another vocabulary
    assert len(roles(toy(), n=30, counts=counts).tables["text"]) == 30
    with pytest.raises(ValueError, match="one vocabulary"):
        roles(toy(), n=30, counts=other)


# --- ablation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "mode"),
    [(spec, "zero") for spec in FAMILIES] + [(spec, "mean") for spec in FAMILIES if spec.name == "gpt2"],
    ids=str,
)
def test_ablation_is_that_of_hooks(spec, mode):
    model = zoo.build(spec)
    reference = zoo.tokens(model) if mode == "mean" else None
    check = ablation_check(model, "1_mlp", top_k=12, mode=mode, reference=reference, n_random=4, seed=3)
    assert torch.equal(check.table.ids, jet_bigrams(model, "1_mlp", top_k=12).ids)
    first, last = check.table.ids.unbind(1)
    starts = bool(getattr(model.cfg, "default_prepend_bos", True))
    prompts = torch.stack([torch.ones(12, dtype=torch.long), first], dim=1) if starts else first[:, None]
    assert torch.equal(check.prompts, prompts)

    def logits(layer=None):
        hooks = []
        if layer is not None:
            stored = {}
            name = f"blocks.{layer}.hook_mlp_out"
            if mode == "mean":
                model.run_with_hooks(reference, fwd_hooks=[(name, lambda x, hook: stored.update(mean=x.mean((0, 1))))])
            hooks = [(name, lambda x, hook: x * 0 + stored.get("mean", 0))]
        found = model.run_with_hooks(prompts, fwd_hooks=hooks)[:, -1].double()
        cap = zoo.hf_model(spec.name).config.final_logit_softcapping if spec.name == "gemma2" else None
        return found if cap is None else cap * torch.atanh(found / cap)  # effects are in logits before a softcap

    with torch.no_grad(), ResidualNetwork(model).view.precision():
        clean = logits()
        steps = mlp_steps(ResidualNetwork(model))
        assert check.components == ["1_mlp", *(step for step in steps if step != "1_mlp")]
        for i, step in enumerate(check.components):
            change = logits(int(step[0])) - clean
            centered = change - change.mean(-1, keepdim=True)
            torch.testing.assert_close(check.own[i], centered[torch.arange(12), last], atol=1e-9, rtol=1e-9)
            draw = np.random.default_rng(3)
            for j in range(4):
                other = last[draw.permutation(12)]
                found = check.shuffled[i, :, j]
                torch.testing.assert_close(found, centered[torch.arange(12), other], atol=1e-9, rtol=1e-9)
        raw = ablation_check(model, "1_mlp", top_k=12, mode=mode, reference=reference, n_random=4, logit="raw")
        torch.testing.assert_close(raw.own[0], (logits(1) - clean)[torch.arange(12), last], atol=1e-9, rtol=1e-9)


def test_tables_of_an_ablation():
    model = zoo.build(GPT2)
    check = ablation_check(model, "0_mlp", top_k=15, n_random=6, others=1, prepend_bos=False)
    assert check.prompts.shape == (15, 1) and len(check.components) == 2
    frame = check.to_dataframe()
    assert frame["n-grams"].tolist() == ["own", "shuffled"] * 2
    np.testing.assert_allclose(
        frame["mean"],
        [
            *(
                f(i)
                for i in (0, 1)
                for f in (lambda i: float(check.own[i].mean()), lambda i: float(check.shuffled[i].mean()))
            )
        ],
    )
    assert frame["difference"][0] != frame["difference"][0] and frame["verdict"][0] == ""
    np.testing.assert_allclose(frame["difference"][1:], frame["mean"][0] - frame["mean"][1:])
    summary = check.summary()
    own, others, strongest, shuffled, from_others, from_strongest, from_shuffled = summary["mean"]
    assert from_others == pytest.approx(own - others) and from_shuffled == pytest.approx(own - shuffled)
    assert strongest == others and from_strongest == from_others, "there is one other component"
    assert summary["low"][0] <= own <= summary["high"][0]
    expected = all(summary["high"][i] < 0 for i in (0, 4, 6))
    assert check.confirmed == expected and f"{'' if expected else 'not '}confirmed" in repr(check)
    alone = ablation_check(model, "0_mlp", top_k=15, others=[])
    assert len(alone.summary()) == 3 and alone.strongest_other is None and alone.rivals == []
    assert alone.verdict.endswith("no other component was ablated")


def checked(*own, shuffled=0.0, resamples=400, width=0.3, seed=2):
    """A check of `2_mlp` by the mean changes of its n-grams under its ablation, and under those of `0_mlp`, `1_mlp`, ..."""
    n, draw = 40, np.random.default_rng(seed)
    values = torch.from_numpy(np.array(own)[:, None] + width * draw.standard_normal((len(own), n)))
    others = ["0_mlp", "1_mlp", "3_mlp", "4_mlp", "5_mlp"][: len(own) - 1]
    ids = torch.arange(2 * n).view(n, 2)
    return AblationCheck(
        step="2_mlp",
        components=["2_mlp", *others],
        table=named(ids, -torch.arange(float(n)), path="2_mlp"),
        prompts=ids[:, :1],
        own=values,
        shuffled=torch.from_numpy(shuffled + width * draw.standard_normal((len(own), n, 3))),
        resamples=resamples,
        seed=11,
    )


def scipys_interval(values):
    return scipy.stats.bootstrap(
        (np.asarray(values),), np.mean, n_resamples=400, method="percentile", random_state=np.random.default_rng(11)
    ).confidence_interval


@pytest.mark.parametrize(
    ("own", "options", "confirmed", "rivals", "said"),
    [
        ((-3, 0, -1), {}, True, [], "confirmed against the mean of the others; each of them costs less (strongest other: 1_mlp -1"),
        ((-3, -3, 0), {}, True, ["0_mlp"], "confirmed against the mean of the others; not told apart from 0_mlp (strong"),
        ((-3, -5, 1), {}, True, ["0_mlp"], "confirmed against the mean of the others; 0_mlp costs more (strongest other: 0_mlp"),
        ((-3, -3, 1, -5), {}, True, ["3_mlp", "0_mlp"], "others; 3_mlp costs more, not told apart from 0_mlp (strongest other: 3_"),
        ((-3, -5, -6), {}, False, ["1_mlp", "0_mlp"], "no fall beyond the mean of the others is shown; 1_mlp, 0_mlp cost more"),
        ((-3, 0, 0), {"shuffled": -3}, False, [], "not confirmed: no fall beyond shuffled n-grams is shown; each"),
        ((0, 1, 1), {"shuffled": -2}, False, [], "not confirmed: no fall and no fall beyond shuffled n-grams is shown; each"),
        ((3, -9, -9, -9, -9, -9), {}, False, None, "and 2 more cost more (strongest other: "),
        ((-3,), {}, True, [], "confirmed against shuffled n-grams; no other component was ablated"),
        ((3,), {}, False, [], "no fall and no fall beyond shuffled n-grams is shown; no other component was ablated"),
        ((-3, 0), {"resamples": 0}, False, ["0_mlp"], "not judged: no intervals with bootstrap=0 and 40 "),
    ],
)  # fmt: skip
def test_a_check_says_what_it_confirms_and_who_costs_as_much(own, options, confirmed, rivals, said):
    """Changes that are many standard errors apart, or have the same mean: what must be said is plain."""
    check = checked(*own, **options)
    assert check.confirmed is confirmed and said in check.verdict and check.verdict in repr(check)
    assert said.split(";")[0] in check._repr_html_().replace("&#x27;", "'")
    order = sorted(range(1, len(own)), key=lambda i: check.own[i].mean())
    assert check.strongest_other == (check.components[order[0]] if order else None)
    assert check.rivals == ([check.components[i] for i in order] if rivals is None else rivals)


def test_the_strongest_other_stands_in_the_summary_with_its_paired_difference():
    check = checked(-3, -2.9, 1, -2)
    summary, own = check.summary().set_index("what"), check.own.numpy()
    assert check.strongest_other == "0_mlp" and check.verdict.count("0_mlp") == 2
    for what, values, judged in [
        ("own n-grams, 2_mlp ablated", own[0], True),
        ("own n-grams, others ablated (mean of 3)", own[1:].mean(0), False),
        ("own n-grams, 0_mlp ablated (strongest other)", own[1], False),
        ("shuffled n-grams, 2_mlp ablated", check.shuffled[0].numpy().mean(1), False),
        ("own ablation - others'", own[0] - own[1:].mean(0), True),
        ("own ablation - 0_mlp's", own[0] - own[1], True),
        ("own - shuffled n-grams", own[0] - check.shuffled[0].numpy().mean(1), True),
    ]:
        row, (low, high) = summary.loc[what], scipys_interval(values)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((values.mean(), low, high), rel=1e-9)
        sign = "below 0" if high < 0 else "above 0" if low > 0 else "not told from 0"
        assert row["verdict"] == (sign if judged else "") and row["fell"] == (values < 0).mean()
    assert len(summary) == 7 and summary["verdict"].nunique() == 3
    frame = check.to_dataframe().set_index(["ablated", "n-grams"])
    for i, component in enumerate(check.components[1:], 1):
        low, high = scipys_interval(own[0] - own[i])
        row = frame.loc[(component, "own")]
        expected = own[0].mean() - own[i].mean(), low, high
        assert tuple(row[["difference", "difference_low", "difference_high"]]) == pytest.approx(expected, rel=1e-9)
        assert (row["verdict"] == "below 0") == (high < 0) == (component not in check.rivals)


def test_a_check_of_one_n_gram_is_not_judged():
    check = checked(-3, 0)
    single = {"prompts": check.prompts[:1], "own": check.own[:, :1], "shuffled": check.shuffled[:, :1]}
    one = replace(check, table=check.table[:1], **single)
    assert not one.confirmed
    wanted = "no intervals with bootstrap=400 and 1 different first or last tokens (6 are needed)"
    assert one.verdict == f"not judged: {wanted}"


def test_n_grams_that_share_a_token_are_one_unit():
    """40 n-grams that fall by what their last (or first) token falls by: of 3 tokens that is no finding, of 20 it is."""
    draw = np.random.default_rng(5)
    for n, column in itertools.product((3, 20), (0, 1)):
        token = np.arange(40) % n
        falls = torch.from_numpy(np.stack([draw.normal(-3, 1, n)[token], np.zeros(40)]))
        ids = torch.arange(100, 180).view(40, 2)
        ids[:, column] = torch.from_numpy(token)
        table = named(ids, -torch.arange(40.0))
        assert torch.equal(table.ids, ids)
        check = replace(checked(0, 0), table=table, prompts=ids[:, :1], own=falls)
        assert check.n_units == n and torch.equal(check.units, ids[:, column])
        assert check.verdict.startswith("confirmed" if n == 20 else "not judged") and check.confirmed == (n == 20)
        if n == 20:
            low, high = check.summary().loc[0, ["low", "high"]]
            plain = scipys_interval(falls[0])
            assert high - low > 1.2 * (plain.high - plain.low)


def test_intervals_of_a_check_are_computed_once(monkeypatch):
    calls, compute = [], ablation_checks.bootstrap_intervals
    monkeypatch.setattr(ablation_checks, "bootstrap_intervals", lambda *x, **y: calls.append(x) or compute(*x, **y))
    check = checked(-3, 0, -1)
    views = [check.verdict, check.confirmed, check.rivals, repr(check), check._repr_html_(), check.to_dataframe()]
    assert len(calls) == 1 and all(view is not None for view in views)
    assert replace(check, seed=12).summary()["low"][0] != check.summary()["low"][0], "another check has its own"


def test_ablating_what_carries_the_bi_grams_is_confirmed():
    """tinydocs: its first MLP carries its bi-grams; an MLP's n-grams given another's name are not confirmed."""
    model = ResidualNetwork(tl_jets.load_tinydocs())
    check = ablation_check(model, "0_mlp", top_k=30)
    assert check.confirmed and check.rivals == []
    wrong = ablation_check(model, "1_mlp", table=check.table)
    assert not wrong.confirmed and "0_mlp" == wrong.strongest_other == wrong.rivals[0]


def test_heads_with_a_table():
    model = zoo.build(GPT2)
    ids = torch.randint(3, V, (8, 3), generator=torch.Generator().manual_seed(0))
    table = named(ids, -torch.arange(8.0), path="L1H2", settings={"distance": 1})
    check = ablation_check(model, "L1H2", table=table, others=2, n_random=3, prepend_bos=True)
    assert check.prompts.tolist() == [[1, i, j] for i, j, _ in ids.tolist()]
    assert check.components[0] == "L1H2" and len(check.components) == 3
    assert all(label.startswith("L") for label in check.components)
    own = ablation_check(model, "L1H2", top_k=9, others=["L0H0"])
    assert torch.equal(own.table.ids, jet_trigrams(model, 1, 2, top_k=9).ids) and own.prompts.shape == (9, 3)
    far = named(ids, -torch.arange(8.0), settings={"distance": 4})
    with pytest.raises(NotImplementedError, match="distance 4"):
        ablation_check(model, "L1H2", table=far)


def test_ablation_refuses(as_users_run_it):
    model = zoo.build(GPT2)
    for step, options, message in [
        ("9_mlp", {}, "must be an MLP"),
        ("0_attn_bias", {}, "must be an MLP"),
        ("0_attn", {}, "of kind attn. Give a table"),
        ("0_mlp", {"logit": "softmax"}, "logit must be"),
        ("0_mlp", {"mode": "resample"}, "mode"),
        ("0_mlp", {"n_random": 0}, "n_random"),
        ("0_mlp", {"others": ["L0H1"]}, r"same kind, of '1_mlp'.*got \['L0H1'\]"),
        ("0_mlp", {"table": named([[0], [1]], [0.0, -1.0])}, "two tokens or more"),
    ]:
        with pytest.raises(ValueError, match=message):
            ablation_check(model, step, **options)
    with pytest.raises(NotImplementedError, match="plain callables"):
        ablation_check(toy(), "0_mlp")


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_tables_of_another_vocabulary_are_refused():
    """Ids of stories260K are ids of the embedded model, too, with other texts."""
    other, model = zoo.load_stories("bridge"), load_tinydocs()
    bigrams = jet_bigrams(other, top_k=30)
    counts = ngram_counts(list(torch.randint(0, 500, (4, 200))), tokenizer=other.tokenizer)
    message = "of the model's vocabulary; [0-9]+ of"
    with pytest.raises(ValueError, match=message):
        pair_scores(model, bigrams)
    with pytest.raises(ValueError, match=message):
        mass(model, bigrams)
    with pytest.raises(ValueError, match=message):
        compare_with_counts(model, counts, n=10, progress=False, paths=["direct"])
    with pytest.raises(ValueError, match=message):
        ablation_check(model, "0_mlp", table=bigrams)
    assert len(pair_scores(other, bigrams)) == 30
