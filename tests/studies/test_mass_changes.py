"""Changes of mass between models: against the whole V x V matrices, forward passes, and models changed in a known way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zoo
from test_studies import FAMILIES, V, dominated, forward_log_probs, toy, toy_log_probs

from tl_jets.studies import mass, mass_change
from tl_jets.studies.matched_tokens import NEAR, PART, frequency_key, matched
from tl_jets.studies.pairs import RowScores

PAIRS = [(3, 4), (5, 9), (11, 2), (3, 40), (11, 2)]


def words_of(text):
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("path", "reduce"), [("direct", "mean"), ("mlps", "sum")])
def test_masses_and_controls_are_those_of_the_whole_matrices(path, reduce, joint):
    models = {"a": toy(0), "b": toy(1), "c": toy(2)}
    words = [*PAIRS, "7 8 9", "20", "21", "20"]
    unigram = torch.rand(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    unigram = unigram / unigram.sum() if joint else None
    found = mass_change(
        models, {"list": words, "tokens": ["30"]}, path=path, reduce=reduce, tokenize=words_of, unigram=unigram,
        contexts=None, controls=6, seed=3,
    )  # fmt: skip
    assert (found.models, found.kinds) == (["a", "b", "c"], ["bi-grams", "tokens", "tokens"])
    assert (found.lists, found.sizes) == (["list", "list", "tokens"], [6, 2, 1])
    matrices = [toy_log_probs(model, path).exp() for model in models.values()]
    prior = torch.ones(V, dtype=torch.float64) / V if unigram is None else unigram
    means = [prior @ matrix for matrix in matrices]
    total = {"mean": np.mean, "sum": np.sum}[reduce]
    pairs = sorted({*PAIRS, (7, 8), (8, 9)})
    weight = np.ones(V) if unigram is None else unigram.numpy()

    def of(matrix, pairs):
        return total([float(matrix[i, j]) * weight[i] for i, j in pairs])

    wanted = [[of(matrix, pairs) for matrix in matrices]]
    wanted += [[total([float(mean[i]) for i in ids]) for mean in means] for ids in ([20, 21], [30])]
    np.testing.assert_allclose(found.masses, wanted, rtol=1e-10)
    # Controls, drawn again: shuffled as in `mass`; matched by frequency; the second token of equal rank in model a.
    key = frequency_key(RowScores(models["a"]).streams, unigram)
    draw = np.random.default_rng(3)
    tokens = torch.tensor(pairs).flatten()
    either = matched(tokens, key, 12, draw).view(2, 6, len(pairs), 2).tolist()
    order = np.argsort(-matrices[0].numpy(), axis=1, kind="stable")
    ranks = [int(np.flatnonzero(order[i] == j)[0]) for i, j in pairs]
    for c in range(6):
        as_likely = [(i, order[i, rank]) for (i, _), rank in zip(either[1][c], ranks, strict=True)]
        for name, control in (("matched", either[0][c]), ("as_likely", as_likely)):
            expected = [of(matrix, control) for matrix in matrices]
            np.testing.assert_allclose(found.controls[name][0, :, c], expected, rtol=1e-10, err_msg=name)
    for own, model in enumerate(models.values()):
        alone = mass(model, pairs, path=path, reduce=reduce, unigram=unigram, controls=6, seed=3)
        np.testing.assert_allclose(found.controls["shuffled"][0, own], alone.controls, rtol=1e-10)
    assert found.controls["shuffled"][1:].isnan().all()
    near = [matched(torch.tensor(ids), key_, 6, draw) for ids in ([20, 21], [30]) for key_ in (key, means[0])]
    for row, name, ids in zip([1, 1, 2, 2], ["matched", "as_likely"] * 2, near, strict=True):
        for own, mean in enumerate(means):
            expected = [total(mean[control].numpy()) for control in ids.tolist()]
            np.testing.assert_allclose(found.controls[name][row, own], expected, rtol=1e-10)


def test_intervals_are_of_paired_changes_of_words():
    models = {"a": toy(0), "b": toy(1)}
    words = ["3 4 5", "6 7", "8 9 10", "11 12", "20", "30", "40"]
    found = mass_change(models, {"x": words}, tokenize=words_of, bootstrap=300, seed=2, contexts=20, controls=0)
    before, after = (toy_log_probs(model).exp() for model in models.values())
    units = [[(3, 4), (4, 5)], [(6, 7)], [(8, 9), (9, 10)], [(11, 12)]]
    drawn = np.random.default_rng(2).integers(0, 4, (300, 4))
    means = [np.mean([float(after[p] - before[p]) for i in row for p in units[i]]) for row in drawn]
    assert found.intervals[0, 1].tolist() == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-9)
    assert found.intervals[:, 0].tolist() == [[0, 0], [0, 0]]
    assert found.contexts == 20 and found.sizes == [6, 3]
    row = found.to_dataframe().iloc[0]
    assert row["beyond"] == "" and np.isnan(row["matched_low"])


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_masses_of_models_are_those_of_forward_passes(spec):
    models = {"a": zoo.build(spec), "b": zoo.fresh(spec, seed=1)}
    found = mass_change(models, {"x": [(3, 4), (5, 6), "w7"]}, path="mlps", contexts=None, controls=2)
    for own, model in enumerate(models.values()):
        matrix = forward_log_probs(model, "mlps").exp()
        wanted = [float(matrix[3, 4] + matrix[5, 6]) / 2, float(matrix.mean(0)[7])]
        assert found.masses[:, own].tolist() == pytest.approx(wanted, rel=1e-9)
    assert found.kinds == ["bi-grams", "tokens"] and found.sizes == [2, 1] == found.row_of.bincount().tolist()


def test_a_model_whose_associations_were_taken_away():
    """The logits of ten of forty pairs are removed: their mass falls to that of any token, other pairs' stays."""
    before, after = dominated(), dominated()
    taken = [(i, i + 1) for i in range(0, 20, 2)]
    kept = [(i, i + 1) for i in range(20, 40, 2)]
    for i, j in taken:
        after.decoder.W_U[i, j] = 0
    found = mass_change({"before": before, "after": after}, {"taken": taken, "kept": kept}, controls=40)
    p = np.exp(9) / (np.exp(9) + V - 1)
    assert found.changes[:, 1].tolist() == pytest.approx([1 / V - p, 0], abs=1e-9)
    frame = found.to_dataframe()
    # Pairs as likely as the kept ones are among those that were taken, so that no change is beyond theirs.
    assert frame["beyond"].tolist() == ["shuffled, matched, as_likely", "as_likely"]
    assert set(found.largest(10)["list"]) == {"taken"}
    strong, weak = (float(found.controls[name][0, 0].mean()) for name in ("as_likely", "matched"))
    assert strong > 2 * weak and strong > 0.4 * p  # the first token of some has no strong successor
    same = mass_change({"before": before, "again": before}, {"kept": kept}, controls=40)
    assert not same.changes.any() and same.to_dataframe()["beyond"][0] == ""


def test_matched_tokens_are_near_and_not_of_the_list():
    draw = torch.Generator().manual_seed(0)
    key = torch.rand(3000, generator=draw, dtype=torch.float64)
    tokens = torch.tensor([5, 70, 900, 70])
    found = matched(tokens, key, 200, np.random.default_rng(1))
    assert not np.isin(found.numpy(), tokens.numpy()).any()
    rest = np.setdiff1d(np.arange(3000), tokens.numpy())
    values = key.numpy()
    for column, token in enumerate(tokens.tolist()):
        ranks = np.argsort(np.argsort(values[rest]))
        near = rest[np.argsort(np.abs((values[rest] < values[token]).sum() - ranks))]
        assert set(found[:, column].tolist()) <= set(near[: 2 * NEAR + 1].tolist())
        assert len(set(found[:, column].tolist())) > NEAR
    few = matched(torch.tensor([0]), torch.arange(40.0), 50, np.random.default_rng(1))
    assert int(few.max()) <= 40 // PART
    with pytest.raises(ValueError, match="holds all 2"):
        matched(torch.tensor([0, 1]), torch.arange(2.0), 1, np.random.default_rng(1))


def test_what_cannot_be_compared_is_refused(as_users_run_it):
    a, b, other = toy(0), toy(1), toy(0, d_vocab=V + 1)
    for models, lists, message in [
        ({"a": a}, {"x": PAIRS}, "two models or more"),
        ([a, b], {"x": PAIRS}, "two models or more"),
        ({"a": a, "b": other}, {"x": PAIRS}, "model 'b'"),
        ({"a": a, "b": b}, {}, "none of them empty"),
        ({"a": a, "b": b}, {"x": []}, "none of them empty"),
        ({"a": a, "b": b}, {"x": "3 4"}, "Put it in a list"),
    ]:
        with pytest.raises(ValueError, match=message):
            mass_change(models, lists, tokenize=words_of)
    with pytest.raises(ValueError, match="model must be one of"):
        mass_change({"a": a, "b": b}, {"x": PAIRS}, controls=0).largest(model="a")
