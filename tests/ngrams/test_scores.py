"""Scores of bi-grams against dense matrices of logits in numpy, in float64; tied embeddings, and untrained tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import zoo
from scipy.special import log_softmax

import tl_jets as tj
from tl_jets.adapters.callables import CallableModel
from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.ngrams import jet_bigrams, jet_bigrams_by_path, untrained_tokens
from tl_jets.ngrams.streams import VocabularyStreams
from tl_jets.ngrams.vocabulary import is_tied
from tl_jets.studies import pair_scores

V, D = 700, 9
W = torch.randn(D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SOFTCAP = {"none": None, "softcap": lambda x: 5 * torch.tanh(x / 5)}


def mlp(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ W.to(x))


def model_of(transform: str = "none", dtype: torch.dtype = torch.float32, *, tied: bool = False) -> CallableModel:
    """Plain functions with a random embedding, MLP, norm and biases; logits around -30."""
    source = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)  # noqa: E731
    embed, weight = draw(V, D), draw(D)
    W_U = (embed * weight.abs()).T if tied else draw(D, V)
    norm = Norm("LN", weight.to(dtype), draw(D).to(dtype))
    decoder = Decoder(norm, W_U.to(dtype), (draw(V) - 30).to(dtype), SOFTCAP[transform])
    table = torch.nn.Embedding.from_pretrained(embed.to(dtype))
    return CallableModel(table, [{"0_mlp": mlp}], decoder)


def logits_of(model: CallableModel, path: str) -> np.ndarray:
    """All logits [first, second] of a path, by the formulas of the model, in numpy."""
    decoder, x = model.decoder, model.embeds["embed"].weight.double().numpy()
    if path == "0_mlp":
        x = np.tanh(x @ W.numpy())
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt(x.var(1, keepdims=True) + decoder.norm.eps)
    x = x * decoder.norm.weight.double().numpy() + decoder.norm.bias.double().numpy()
    logits = x @ decoder.W_U.double().numpy() + decoder.b_U.double().numpy()
    return logits if decoder.transform is None else 5 * np.tanh(logits / 5)


def scores_of(logits: np.ndarray, score: str, unigram: np.ndarray | None) -> np.ndarray:
    if score == "logit":
        return logits
    if score == "centered":
        return logits - logits.mean(1, keepdims=True)
    log_probs = log_softmax(logits, axis=1)
    if score == "logprob":
        return log_probs
    with np.errstate(divide="ignore"):
        baseline = log_softmax(logits.mean(0)) if unigram is None else np.log(unigram)
    return np.where(np.isfinite(baseline), log_probs - np.where(np.isfinite(baseline), baseline, 0), -np.inf)


def best_of(scores: np.ndarray, k: int, per: str) -> list[tuple[int, int, float]]:
    """The best pairs in the order of a table."""
    if per == "row":
        rows = [np.argsort(-row, kind="stable")[:k] for row in scores]
        pairs = [(i, int(j)) for i, row in enumerate(rows) for j in row if scores[i, j] > -np.inf]
    else:
        i, j = np.nonzero(scores > -np.inf)
        pairs = list(zip(i.tolist(), j.tolist(), strict=True))
    found = [(i, j, float(scores[i, j])) for i, j in pairs]
    found.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    return found if per == "row" else found[:k]


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "not itself": {"exclude_self": True},
    "left out": {"exclude": [3, 17, 250], "exclude_self": True},
    "few": {"rows": range(40, 90), "columns": range(60, 300), "exclude_self": True},
    "columns": {"columns": [5, 6, 300, 699]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("per", ["global", "row"])
@pytest.mark.parametrize("score", ["logprob", "logit", "centered", "lift", "unigram"])
@pytest.mark.parametrize(("transform", "tied"), [("none", True), ("softcap", False)])
def test_tables_are_those_of_dense_logits(transform, tied, score, per, options):
    if score == "lift" and transform != "none":
        pytest.skip("refused: see test_options_that_do_not_go_together")
    model, given = model_of(transform, torch.float64, tied=tied), dict(OPTIONS[options])
    unigram = None
    if score == "unigram":
        unigram = torch.rand(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        unigram[::7] = 0
        unigram /= unigram.sum()
        score = "lift"
    table = jet_bigrams(model, "0_mlp", score=score, unigram=unigram, per=per, top_k=30, chunk_size=64, **given)
    dense = scores_of(logits_of(model, "0_mlp"), score, None if unigram is None else unigram.numpy())
    left_out = given.get("exclude", [])
    for axis, name in ((0, "rows"), (1, "columns")):
        dropped = sorted(set(range(V)) - set(given.get(name, range(V))) | set(left_out))
        dense[(dropped, slice(None)) if axis == 0 else (slice(None), dropped)] = -np.inf
    if given.get("exclude_self"):
        np.fill_diagonal(dense, -np.inf)
    expected = best_of(dense, 30, per)
    assert table.ids.tolist() == [[i, j] for i, j, _ in expected]
    np.testing.assert_allclose(table.scores, [x for *_, x in expected], atol=1e-10, rtol=1e-10)
    if score == "lift":
        normalizers = np.logaddexp.reduce(logits_of(model, "0_mlp"), axis=1)
        np.testing.assert_allclose(table.parts["log_normalizer"], normalizers[table.ids[:, 0]], atol=1e-10)


@pytest.mark.parametrize("path", ["direct", "0_mlp"])
@pytest.mark.parametrize("per", ["global", "row"])
@pytest.mark.parametrize("score", ["centered", "lift", "logprob"])
def test_float32_models_have_the_tables_of_their_logits_in_float64(score, per, path):
    """The states are of float32, so the order may differ where scores agree to its digits."""
    model = model_of(tied=True)
    table = jet_bigrams_by_path(model, [path, "mlps"], score=score, per=per, top_k=40, exclude_self=True)[path]
    dense = scores_of(logits_of(model, path), score, None)
    np.fill_diagonal(dense, -np.inf)
    expected = best_of(dense, 40, per)
    np.testing.assert_allclose(table.scores, [x for *_, x in expected], atol=2e-4)
    np.testing.assert_allclose(dense[table.ids[:, 0], table.ids[:, 1]], table.scores, atol=2e-4)
    assert len({tuple(pair) for pair in table.ids.tolist()}) == len(expected)


@pytest.mark.parametrize("name", zoo.available(["gpt2", "llama", "gemma2"]))
def test_scores_of_models(name):
    """Against the logits of the path through the model's own decoder."""
    model = zoo.build(name)
    streams = VocabularyStreams(model, ["mlps"])
    decoder, states = streams.network.decoder, streams.states(streams.embed(torch.arange(streams.n_tokens)), "mlps")
    logits = decoder.transformed(decoder.logits(states)).double().numpy()
    scores = ["centered", "logprob"] + (["lift"] if decoder.transform is None else [])
    for score in scores:
        table = jet_bigrams(model, "mlps", score=score, exclude_self=True, top_k=25)
        dense = scores_of(logits, score, None)
        np.fill_diagonal(dense, -np.inf)
        np.testing.assert_allclose(table.scores, [x for *_, x in best_of(dense, 25, "global")], atol=1e-4)


def test_centered_scores_of_given_pairs_are_those_of_the_table():
    model = model_of(dtype=torch.float64)
    table = jet_bigrams(model, "0_mlp", score="centered", top_k=20)
    found = pair_scores(model, table.ids, path="0_mlp", score="centered")
    assert torch.equal(found.ids, table.ids)
    torch.testing.assert_close(found.scores, table.scores, atol=1e-10, rtol=0)


def test_options_that_do_not_go_together():
    model = model_of()
    for given, words in (
        ({"unigram": torch.ones(V) / V}, "baseline of score"),
        ({"score": "lift", "unigram": torch.ones(V)}, "sum to 1"),
        ({"rows": [3], "columns": [3], "exclude_self": True}, "leave 1 first and 1 second"),
        ({"rows": [3], "exclude": [3]}, "leave 0 first"),
        ({"exclude": [V]}, "exclude must be ids"),
        ({"screen": "bf16", "exclude_self": True}, "all columns and pairs"),
        ({"screen": "bf16", "score": "lift"}, 'score="logprob"'),
        ({"rows": [" more"]}, "the model has none"),
        ({"rows": "more"}, "must be a list"),
    ):
        with pytest.raises(ValueError, match=words):
            jet_bigrams(model, "0_mlp", top_k=3, **given)
    with pytest.raises(NotImplementedError, match="softcap"):
        jet_bigrams(model_of("softcap"), "0_mlp", score="lift")


def test_tables_of_other_scores_are_not_loaded(tmp_path):
    model, file = model_of(), tmp_path / "table.parquet"
    given = {"score": "lift", "exclude_self": True, "exclude": [4], "top_k": 5, "save": file}
    table = jet_bigrams(model, "0_mlp", **given)
    assert jet_bigrams(model, "0_mlp", **given).digest == table.digest == tj.ngrams.NgramTable.load(file).digest
    for other in ({"exclude_self": False}, {"exclude": [5]}, {"score": "logprob"}, {"unigram": torch.ones(V) / V}):
        with pytest.raises(ValueError, match="same model and settings"):
            jet_bigrams(model, "0_mlp", **{**given, **other})


def test_tokens_are_given_as_text():
    network = tj.ResidualNetwork(tj.load_tinydocs())
    table = jet_bigrams(network, "mlps", per="row", top_k=2, rows=[" more", " at"], columns=[" than", " least", " of"])
    assert sorted(set(table.to_dataframe()["token_1"])) == [" at", " more"]
    by_id = jet_bigrams(
        network, "mlps", per="row", top_k=2, rows=table.ids[:, 0].unique(), columns=[" than", " least", " of"]
    )
    assert by_id.digest == table.digest
    with pytest.raises(ValueError, match="must be one token"):
        jet_bigrams(network, "mlps", rows=[" more than"])


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_said(tied):
    model = model_of(tied=tied)  # up to the factors of a folded norm
    assert is_tied(VocabularyStreams(model, [])) == tied
    table = jet_bigrams(model, "direct", top_k=3)
    assert ("tied embeddings" in repr(table)) == tied == table.settings.get("tied_embeddings", False)


class Names:
    """A tokenizer with five special tokens that knows the first 690 of 700."""

    all_special_ids = (0, 1, 2, 3, 4)

    def __len__(self) -> int:
        return V - 10

    def decode(self, ids: Any) -> str:
        return "".join(f"<{int(i)}>" for i in ids)


def test_untrained_tokens_are_named_with_their_reasons(monkeypatch):
    model = model_of()
    weight = model.embeds["embed"].weight.data
    weight += 3  # what all embeddings share is taken away
    source = torch.Generator().manual_seed(2)
    alike = [0, 1, 2, 3, 4, 77, 300]
    weight[alike] = 3 - torch.linspace(-2, 2, D) + 0.1 * torch.randn(len(alike), D, generator=source)
    weight[55] *= 0.01
    monkeypatch.setattr(CallableModel, "tokenizer", Names(), raising=False)
    found = untrained_tokens(model)
    frame = found.to_dataframe().set_index("id")
    assert sorted(frame.index) == [*sorted({*alike, 55}), *range(V - 10, V)]
    assert set(frame.loc[alike, "reason"]) == {"like special tokens"} and frame.loc[55, "reason"] == "norm"
    assert set(frame.loc[V - 10 :, "reason"]) == {"unknown to the tokenizer"}
    np.testing.assert_allclose(found.norms, weight[found.ids].double().norm(dim=1))
    table = jet_bigrams(model, "direct", top_k=50, exclude=found.ids)
    assert not set(table.ids.flatten().tolist()) & set(found.ids.tolist())
