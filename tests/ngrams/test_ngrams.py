"""Jet bi-grams against brute force: the whole V x V matrix in float64, and forward passes without attention."""

from __future__ import annotations

import functools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import live_memory
import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_jets.adapters.callables import CallableModel
from tl_jets.calculus import Norm
from tl_jets.core import decoder as decoder_module
from tl_jets.core.decoder import Decoder
from tl_jets.core.network import ResidualNetwork
from tl_jets.ngrams import (
    Job,
    VocabularyStreams,
    bigram_job,
    bigram_log_normalizers,
    bigram_sweep,
    fingerprint,
    jet_bigrams,
    jet_bigrams_by_path,
    jet_trigrams,
    sweep,
)
from tl_jets.ngrams.fingerprints import SAMPLES
from tl_jets.ngrams.rows import RowReader, RowScan
from tl_jets.ngrams.scan import Tiles, TopScan
from tl_jets.ngrams.scoring import Scoring
from tl_jets.ngrams.screen import RoundedTiles, ScreenedScan, bf16_is_fast
from tl_jets.ngrams.streams import mlp_steps
from tl_jets.ngrams.tables import NgramTable
from tl_jets.pretrained import load_tinydocs

TRANSFORMS = {"none": None, "softcap": lambda x: 5 * torch.tanh(x / 5), "scale": lambda x: 0.3 * x}


def make(d_vocab, rows, d_model=7, *, seed=0, size=1.0, offset=-20.0, transform=None, tied=False, dtype=torch.float64):
    """A decoder and states; every bias random, all logits far from zero."""
    source = torch.Generator().manual_seed(seed)
    W_U = torch.randn(d_vocab, d_model, generator=source, dtype=torch.float64)
    b_U = torch.randn(d_vocab, generator=source, dtype=torch.float64) + offset
    states = torch.randn(rows, d_model, generator=source, dtype=torch.float64) * size
    W_U = W_U.to(dtype).T if tied else W_U.to(dtype).T.contiguous()
    return Decoder(Norm("none"), W_U, b_U.to(dtype), transform), states.to(dtype)


def brute(decoder, states, score="logprob", columns=None):
    """Scores of all pairs in float64 [row, column]; -inf where a column may not be chosen."""
    logits = decoder.logit_scale * (states.double() @ decoder.W_U.double() + decoder.b_U.double())
    logits = logits if decoder.transform is None else decoder.transform(logits)
    shifted = logits - logits.amax(-1, keepdim=True)
    scores = shifted - shifted.exp().sum(-1, keepdim=True).log() if score == "logprob" else logits
    if columns is not None:
        scores = torch.where(torch.isin(torch.arange(scores.shape[1]), torch.as_tensor(columns)), scores, -math.inf)
    return scores.numpy()


def ordered(scores, ids):
    """(row id, column, score) of all pairs that may be chosen, best first, ties by ids."""
    row, column = np.nonzero(scores > -np.inf)
    order = np.lexsort((column, np.asarray(ids)[row], -scores[row, column]))
    return np.asarray(ids)[row][order], column[order], scores[row, column][order]


def assert_best(best, expected, k, tolerance):
    rows, columns, scores = (x[:k] for x in expected)
    assert best.ids.tolist() == list(map(list, zip(rows.tolist(), columns.tolist(), strict=True)))
    np.testing.assert_allclose(best.scores, scores, atol=tolerance, rtol=tolerance)


def scan_all(scan, states, ids, chunk):
    for start in range(0, len(ids), chunk):
        scan.add(states[start : start + chunk], ids[start : start + chunk])
    return scan.finish()


# --- the scan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("score", ["logprob", "logit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d_vocab", [61, 300, 4500])
def test_best_pairs_are_those_of_brute_force(d_vocab, dtype, score, transform):
    decoder, states = make(d_vocab, 70, transform=TRANSFORMS[transform], dtype=dtype, tied=d_vocab == 300)
    ids = torch.arange(70) * 3 + 5
    expected = ordered(brute(decoder, states, score), ids)
    for k in (1, 40, 1000):
        best = scan_all(TopScan(decoder, k, scoring=Scoring(score), dtype=dtype), states, ids, 17)
        assert_best(best, expected, k, 1e-12)
        logits = decoder.logit_scale * (states.double() @ decoder.W_U.double() + decoder.b_U.double())
        logits = logits if decoder.transform is None else decoder.transform(logits)
        torch.testing.assert_close(best.log_normalizers, logits.logsumexp(-1)[(best.ids[:, 0] - 5) // 3])


@given(
    seed=st.integers(0, 10**6),
    d_vocab=st.integers(2, 400),
    rows=st.integers(1, 60),
    k=st.integers(1, 300),
    chunk=st.integers(1, 60),
    size=st.sampled_from([0.01, 1.0, 30.0]),
    offset=st.sampled_from([0.0, -100.0, 60.0]),
    score=st.sampled_from(["logprob", "logit"]),
    subset=st.booleans(),
    screened=st.booleans(),
)
@settings(max_examples=40)
def test_any_shape_chunk_and_scale(seed, d_vocab, rows, k, chunk, size, offset, score, subset, screened):
    decoder, states = make(d_vocab, rows, seed=seed, size=size, offset=offset, dtype=torch.float32)
    columns = (
        torch.randperm(d_vocab, generator=torch.Generator().manual_seed(seed))[: max(1, d_vocab // 3)].sort().values
    )
    columns = columns if subset else None
    scan = TopScan(decoder, k, scoring=Scoring(score, columns))
    if screened and not subset and score == "logprob":
        scan = ScreenedScan(scan, RoundedTiles(decoder, torch.float32, states.device), 16)
    best = scan_all(scan, states, torch.arange(rows), chunk)
    scores = brute(decoder, states, score, columns)
    values = ordered(scores, np.arange(rows))[2][:k]
    # Saturated rows (score 0 but for rounding) have no order that float64 log-softmax could tell; the rest does.
    assert len(best.ids) == len(values)
    np.testing.assert_allclose(best.scores, values, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(scores[best.ids[:, 0], best.ids[:, 1]], best.scores, atol=1e-10, rtol=1e-10)
    assert len({tuple(pair) for pair in best.ids.tolist()}) == len(best.ids)


def test_ties_go_to_the_smallest_ids():
    """Small integers: every logit is exact, and most values occur many times."""
    source = torch.Generator().manual_seed(0)
    W_U = torch.randint(-1, 2, (3, 700), generator=source).float()
    states = torch.randint(-1, 2, (50, 3), generator=source).float()
    decoder = Decoder(Norm("none"), W_U, torch.zeros(700))
    expected = ordered((states.double() @ W_U.double()).numpy(), np.arange(50))
    for k in (1, 30, 500):
        assert_best(
            scan_all(TopScan(decoder, k, scoring=Scoring("logit")), states, torch.arange(50), 8), expected, k, 0
        )
    same = states[:1].expand(20, 3).contiguous()  # twenty times the same row: log-probabilities tie, too
    best = scan_all(TopScan(decoder, 45), same, torch.arange(20).flip(0), 7)
    scores = brute(decoder, same)[0]
    top = np.nonzero(scores > scores.max() - 1e-9)[0]
    assert best.ids.tolist() == [[i, int(j)] for i in range(20) for j in top][:45]


def test_saturated_rows_keep_their_digits():
    """log p = -1e-9, -1e-12, ...: float32 sees 0, and so does a float64 log-softmax, nearly."""
    gaps = torch.tensor([20.0, 24.0, 28.0, 32.0, 36.0, 41.0, 3.0])
    decoder = Decoder(Norm("none"), torch.eye(7, dtype=torch.float32), torch.zeros(7))
    states = torch.diag(gaps)
    best = scan_all(TopScan(decoder, 6), states, torch.arange(7), 3)
    exact = {i: -math.log1p(6 * math.exp(-gap)) for i, gap in enumerate(gaps.tolist())}
    assert best.ids.tolist() == [[i, i] for i in (5, 4, 3, 2, 1, 0)]
    for (i, _), score in zip(best.ids.tolist(), best.scores.tolist(), strict=True):
        assert score == pytest.approx(exact[i], rel=1e-12)
    rows = scan_all(RowScan(RowReader(decoder, 1, dtype=torch.float64)), states.double(), torch.arange(7), 7)
    assert rows.scores[0].item() == pytest.approx(exact[5], rel=1e-6)


def saturated(d_vocab=4500, rows=300):
    """Tied embeddings: each token best predicts itself, with 1 - p from about 1 to 1e-26."""
    decoder, _ = make(d_vocab, 1, 40, dtype=torch.float32)
    W_U = torch.nn.functional.normalize(decoder.W_U, dim=0)
    source = torch.Generator().manual_seed(1)
    ids = torch.randperm(d_vocab, generator=source)[:rows].sort().values
    states = W_U.T[ids] * torch.linspace(5, 150, rows)[torch.randperm(rows, generator=source)][:, None]
    decoder = Decoder(Norm("none"), W_U, decoder.b_U)
    logits = states.double().numpy() @ W_U.double().numpy() + decoder.b_U.double().numpy()
    best = logits.argmax(1)
    others = np.exp(logits - logits.max(1, keepdims=True))
    np.put_along_axis(others, best[:, None], 0, 1)
    return decoder, states, ids, best, -np.log1p(others.sum(1))


@pytest.mark.parametrize("offset", [math.nan, 0.0, 40.0])
@pytest.mark.parametrize("tiles", [Tiles, RoundedTiles])
def test_bounds_of_probabilities_near_one_hold_and_tell_them_apart(tiles, offset):
    decoder, states, _, _, exact = saturated()
    exact = torch.from_numpy(exact) / math.log(2)
    assert float(exact.max()) > -1e-20 and float(exact.min()) < -1
    own = tiles(decoder, torch.float32, states.device)
    maxima = torch.empty(300, own.n_blocks)
    for part in (slice(0, 300), slice(0, 40)):
        sums, _ = own.read(states[part], maxima[part], offset)
        best = maxima[part].amax(1, keepdim=True)
        args = (sums.offset, best[:, 0]) if tiles is RoundedTiles else (sums.offset,)
        lower, upper = TopScan(decoder, 1).bounds(best, own.errors(states[part], *args), sums)
        assert bool((lower[:, 0].double() <= exact[part]).all() and (exact[part] <= upper[:, 0].double()).all())
        near = (exact[part] > -0.1) & (exact[part] < -1e-28)  # float32 powers end at 1e-38
        assert bool(near.any())
        if tiles is Tiles:
            assert bool((lower[near, 0] / upper[near, 0] < 1.02).all())


@pytest.mark.parametrize("screened", [False, True])
def test_saturated_rows_are_not_all_read_again(screened):
    decoder, states, ids, best, exact = saturated()
    scan = inner = TopScan(decoder, 12)
    if screened:
        scan = ScreenedScan(inner, RoundedTiles(decoder, torch.float32, states.device), 50)
    found = scan_all(scan, states, ids, 50)
    order = np.argsort(-exact)[:12]
    assert found.ids.tolist() == [[int(ids[i]), int(best[i])] for i in order]
    np.testing.assert_allclose(found.scores, exact[order], rtol=1e-9)
    assert len(inner.kept.ids) <= 16
    assert not screened or scan.scanned < 150


def test_a_long_vocabulary():
    decoder, states = make(4500, 64, 16, dtype=torch.float32)
    expected = ordered(brute(decoder, states), np.arange(64))
    assert_best(scan_all(TopScan(decoder, 50), states, torch.arange(64), 64), expected, 50, 1e-12)


def precisions():
    """Torch's settings of float32 products: those of each backend, or the older one for all."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    own = [getattr(backend, "fp32_precision", None) for backend in backends]
    return own if any(own) else torch.get_float32_matmul_precision()


@pytest.fixture(params=["older", "backends"])
def reduced_products(request):
    """Float32 products whose factors may be rounded, by either of torch's settings."""
    torch_matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if request.param == "older":
        torch.set_float32_matmul_precision("medium")
    elif torch_matmul is None or not hasattr(torch_matmul, "fp32_precision"):
        pytest.skip("this torch has the older setting only")
    else:
        torch_matmul.fp32_precision = "bf16"
    yield
    if request.param == "backends":
        torch_matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def test_reduced_products_elsewhere_change_nothing(reduced_products):
    """On processors that have them, such products are off by percents."""
    model, allowed = load_tinydocs(), precisions()
    options = {"top_k": 20, "rows": range(200), "progress": False}
    found = [
        jet_bigrams(model, "mlps", **options),
        jet_bigrams(model, "direct", **options, per="row"),
        jet_trigrams(model, 1, 0, **options),
    ]
    normalizers = bigram_log_normalizers(model, "direct", rows=range(200))
    assert precisions() == allowed, "what others allow, they still do"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    assert [table.digest for table in found] == [
        jet_bigrams(model, "mlps", **options).digest,
        jet_bigrams(model, "direct", **options, per="row").digest,
        jet_trigrams(model, 1, 0, **options).digest,
    ]
    assert torch.equal(normalizers, bigram_log_normalizers(model, "direct", rows=range(200)))


def test_what_float32_cannot_tell_apart_is_told_apart():
    """Rows and tokens that differ in their last bits, under a large shared logit: float32 ranks them at random."""
    source = torch.Generator().manual_seed(0)
    W_U = 1 + 1e-5 * torch.randn(16, 1500, generator=source)
    states = 10 + 1e-3 * torch.randn(80, 16, generator=source)
    decoder = Decoder(Norm("none"), W_U, torch.zeros(1500))
    expected = ordered(brute(decoder, states), np.arange(80))
    ranked = ordered((states @ W_U).log_softmax(-1).numpy(), np.arange(80))
    assert not np.array_equal(expected[0][:20], ranked[0][:20])
    assert_best(scan_all(TopScan(decoder, 20), states, torch.arange(80), 9), expected, 20, 1e-12)
    screened = ScreenedScan(TopScan(decoder, 20), RoundedTiles(decoder, torch.float32, states.device), 20)
    assert_best(scan_all(screened, states, torch.arange(80), 9), expected, 20, 1e-12)
    closer = Decoder(Norm("none"), 1 + 3e-7 * torch.randn(16, 1500, generator=source), torch.zeros(1500))
    rows = scan_all(RowScan(RowReader(closer, 4)), states, torch.arange(80), 30)
    for i, row in enumerate(brute(closer, states)):
        assert rows.ids[rows.ids[:, 0] == i, 1].tolist() == ordered(row[None], [i])[1][:4].tolist()


@pytest.mark.parametrize("spread", [1.0, 40.0, 4000.0])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_far_from_zero_and_from_each_other(bias, spread):
    """Sums of exp would overflow or vanish without an offset, or with one for all rows."""
    decoder, states = make(2500, 60, dtype=torch.float32)
    W_U = torch.cat([decoder.W_U, torch.full((1, 2500), -300.0)])  # what all logits share, and what differs by row
    shared = 1 + spread / 300 * torch.linspace(-1, 1, 60)[:, None]
    decoder = Decoder(Norm("none"), W_U, decoder.b_U if bias else torch.zeros(2500))
    states = torch.cat([states, shared], dim=1)
    expected = ordered(brute(decoder, states), np.arange(60))
    assert_best(scan_all(TopScan(decoder, 50), states, torch.arange(60), 7), expected, 50, 1e-10)
    scan = ScreenedScan(TopScan(decoder, 50), RoundedTiles(decoder, torch.float32, states.device), 20)
    assert_best(scan_all(scan, states, torch.arange(60), 7), expected, 50, 1e-10)
    model = CallableModel(torch.nn.Embedding.from_pretrained(states), [], decoder)
    exact = (states.double() @ decoder.W_U.double() + decoder.b_U.double()).logsumexp(-1)
    torch.testing.assert_close(bigram_log_normalizers(model, chunk_size=7), exact, atol=2e-3, rtol=1e-6)


def test_infinite_states_are_refused():
    decoder, states = make(61, 5)
    states[3, 2] = math.nan
    for scan in (TopScan(decoder, 3, dtype=torch.float64), RowScan(RowReader(decoder, 3, dtype=torch.float64))):
        with pytest.raises(ValueError, match=r"must be finite; those of tokens \[13\]"):
            scan.add(states, torch.arange(10, 15))
    embed = torch.nn.Embedding.from_pretrained(states)
    with pytest.raises(ValueError, match=r"must be finite; those of tokens \[3\]"):
        bigram_log_normalizers(CallableModel(embed, [], decoder))


# --- screening ------------------------------------------------------------------------------------------------------


def test_screening_passes_over_rows_and_changes_nothing():
    decoder, states = make(900, 600, 32, dtype=torch.float32, size=0.3)
    states *= torch.rand(600, 1, generator=torch.Generator().manual_seed(1))
    plain = scan_all(TopScan(decoder, 20), states, torch.arange(600), 50)
    screened = ScreenedScan(TopScan(decoder, 20), RoundedTiles(decoder, torch.float32, states.device), 50)
    found = scan_all(screened, states, torch.arange(600), 50)
    assert torch.equal(found.ids, plain.ids)
    torch.testing.assert_close(found.scores, plain.scores, atol=1e-12, rtol=0)
    assert screened.screened == 600
    assert screened.scanned < 200
    alike = states[:1].expand(600, -1) * torch.linspace(1, 1.001, 600)[:, None]  # every row comes near the threshold
    idle = ScreenedScan(TopScan(decoder, 20), RoundedTiles(decoder, torch.float32, states.device), 50)
    assert torch.equal(
        scan_all(idle, alike, torch.arange(600), 50).ids,
        scan_all(TopScan(decoder, 20), alike, torch.arange(600), 50).ids,
    )
    assert idle.screened == 400


@pytest.mark.parametrize("bias", [False, True])
def test_bounds_of_rounded_logits_hold_and_are_not_idle(bias):
    decoder, states = make(900, 200, 48, dtype=torch.float32, offset=-300.0)
    if not bias:
        decoder = Decoder(Norm("none"), decoder.W_U, torch.zeros(900))
    tiles = RoundedTiles(decoder, torch.float32, states.device)
    maxima = torch.empty(200, tiles.n_blocks)
    _, offset = tiles.read(states, maxima)
    assert offset > 200 or not bias
    sums, _ = tiles.read(states, maxima, offset)
    shift, applied = sums.shift, sums.offset
    exact = torch.from_numpy(brute(decoder, states)).amax(1) / math.log(2)
    assert applied == offset
    best = maxima.amax(1)
    difference = ((best - shift).double() - exact).abs()
    widest = 2 * tiles.errors(states, applied).double()
    for error in (widest, 2 * tiles.errors(states, applied, best).double()):
        assert bool((difference <= error).all())
        assert bool((difference > error / 100).any())
    assert bias or bool((error < 0.9 * widest).all())


@pytest.mark.parametrize("tied", [False, True])
def test_screening_with_weights_that_are_rounded_in_several_parts(tied, monkeypatch):
    """As those of a large model are; what all columns share, and what one part of them shares, is large."""
    decoder, states = make(900, 300, 12, dtype=torch.float32, size=0.3, tied=tied)
    decoder.W_U.add_(torch.linspace(-9, 9, 12)[:, None])
    decoder.W_U[:, 700:] += 2
    expected = ordered(brute(decoder, states), np.arange(300))
    monkeypatch.setattr(decoder_module, "CONVERTED_ELEMENTS", 12 * 250)
    model = CallableModel(torch.nn.Embedding.from_pretrained(states), [], decoder)
    for screen in ("bf16", None):
        assert_best(jet_bigrams(model, top_k=40, chunk_size=50, screen=screen), expected, 40, 1e-10)


def test_waiting_rows_of_the_highest_bounds_are_scanned_first():
    """Once they are, the threshold of the best pairs is known, and others need not be."""
    decoder, states = make(900, 640, 32, dtype=torch.float32, size=0.3)
    states *= torch.linspace(0.2, 1, 640)[torch.randperm(640, generator=torch.Generator().manual_seed(0))][:, None]
    scan = TopScan(decoder, 20)
    read: list[int] = []
    add = scan.add
    scan.add = lambda states, ids: read.extend(ids.tolist()) or add(states, ids)
    screened = ScreenedScan(scan, RoundedTiles(decoder, torch.float32, states.device), 40)
    for start in range(0, 640, 40):
        screened.add(states[start : start + 40], torch.arange(start, start + 40))
        assert scan.threshold > -math.inf and not read
    waiting = len(screened._waiting.ids)
    found = screened.finish()
    expected = ordered(brute(decoder, states), np.arange(640))
    assert_best(found, expected, 20, 1e-12)
    order = np.argsort(-brute(decoder, states).max(1))
    assert order[0] in read[:10] and set(order[:20]) <= set(read)
    assert screened.scanned == len(read) < waiting


def test_the_probe_answers():
    assert bf16_is_fast(torch.device("cpu"), 64) in (True, False)


# --- every row ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("score", ["logprob", "logit"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=str)
def test_best_tokens_of_every_row(dtype, tolerance, score, transform):
    decoder, states = make(1500, 40, transform=TRANSFORMS[transform], dtype=dtype)
    columns = torch.arange(2, 1500, 3)
    for tokens, k in ((None, 4), (columns, 6), (columns[:5], 50)):
        reader = RowReader(decoder, k, scoring=Scoring(score, tokens), dtype=dtype)
        best = scan_all(RowScan(reader), states, torch.arange(40), 9)
        scores = brute(decoder, states, score, tokens)
        expected = []
        for i, row in enumerate(scores):
            expected += zip(*(x[:k] for x in ordered(row[None], [i])), strict=True)
        expected.sort(key=lambda x: (-x[2], x[0], x[1]))
        assert best.ids.tolist() == [[int(i), int(j)] for i, j, _ in expected]
        np.testing.assert_allclose(best.scores, [s for *_, s in expected], atol=tolerance, rtol=tolerance)


def test_rows_of_equal_logits():
    W_U = torch.randint(-1, 2, (3, 700), generator=torch.Generator().manual_seed(1)).float()
    states = torch.randint(-1, 2, (20, 3), generator=torch.Generator().manual_seed(2)).float()
    decoder = Decoder(Norm("none"), W_U, torch.zeros(700))
    best = scan_all(RowScan(RowReader(decoder, 5, scoring=Scoring("logit"))), states, torch.arange(20), 6)
    for i, row in enumerate((states @ W_U).numpy()):
        assert best.ids[best.ids[:, 0] == i, 1].tolist() == ordered(row[None], [i])[1][:5].tolist()


def test_a_scale_of_the_logits_scales_their_rounding_errors():
    """A power of two: the best tokens of every row, nearly tied in float32, are those of the plain logits."""
    source = torch.Generator().manual_seed(0)
    W_U, states = 1 + 1e-6 * torch.randn(16, 1500, generator=source), 10 + 1e-3 * torch.randn(80, 16, generator=source)
    plain, scaled = (
        scan_all(RowScan(RowReader(decoder, 4, scoring=Scoring("logit"))), states, torch.arange(80), 30)
        for decoder in (Decoder(Norm("none"), W_U, torch.zeros(1500), x) for x in (None, lambda logits: 64 * logits))
    )
    assert torch.equal(scaled.ids, plain.ids) and torch.equal(scaled.scores, 64 * plain.scores)


# --- paths of models ------------------------------------------------------------------------------------------------


def decodable(spec):
    return (spec.name, spec.world) != ("opt", "bridge")


# Processing changes weights only: a few families with it.
SPECS = [
    spec
    for spec in zoo.available()
    if decodable(spec) and (spec.processing == "raw" or spec.name in ("gpt2", "pythia", "gemma2", "bloom", "cohere"))
]


def without_attention(model, network, keep):
    """The model's own logits of one-token prompts with attention's writes zeroed, MLPs too if not kept, no positions."""
    hooks = [(f"blocks.{layer}.hook_attn_out", lambda x, hook: x * 0) for layer in range(model.cfg.n_layers)]
    if not keep:
        hooks += [(f"blocks.{step.split('_')[0]}.hook_mlp_out", lambda x, hook: x * 0) for step in mlp_steps(network)]
    if "pos_embed" in network.sources:
        hooks.append(("hook_pos_embed", lambda x, hook: x * 0))
    with torch.no_grad(), network.view.precision(), model.hooks(hooks):
        return model(torch.arange(model.cfg.d_vocab)[:, None], return_type="logits")[:, 0].double()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_direct_and_attention_free_streams_are_ablated_forward_passes(spec):
    model = zoo.build(spec)
    network = ResidualNetwork(model)
    for path in ("direct", "mlps") if mlp_steps(network) else ("direct",):
        logits = without_attention(model, network, keep=path == "mlps")
        expected = ordered(logits.log_softmax(-1).numpy(), np.arange(len(logits)))
        table = jet_bigrams(network, path, top_k=50)
        np.testing.assert_allclose(table.scores, expected[2][:50], atol=1e-10, rtol=1e-10)
        found = logits.log_softmax(-1)[table.ids[:, 0], table.ids[:, 1]]
        np.testing.assert_allclose(found, table.scores, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(bigram_log_normalizers(network, path), logits.logsumexp(-1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "gemma2", "llama", "bloom", "olmo2"])
def test_mlp_paths_are_what_the_modules_write(name):
    """Every stream by hand: the MLP's own hooks in a forward pass in which the stream it reads is put there."""
    for spec in zoo.available([name])[::2]:
        model = zoo.build(spec)
        network = ResidualNetwork(model)
        steps = mlp_steps(network)
        tokens = torch.arange(model.cfg.d_vocab)
        stream = network.trace(tokens[:, None])["embed"]
        for count, step in enumerate(steps, 1):
            trace = network.trace(tokens[:, None])
            stream = trace.gamma(step)(stream)
            logits = network.decoder.logits(network.decoder.norm(stream))[:, 0]
            logits = logits if network.decoder.transform is None else network.decoder.transform(logits)
            expected = ordered(logits.log_softmax(-1).numpy(), tokens)
            table = jet_bigrams(network, steps[:count], top_k=30, chunk_size=13)
            assert_best(table, expected, 30, 1e-10)
            assert table.path == " > ".join(steps[:count])


def test_no_forward_pass_is_run_twice():
    """One for the check, and one that stops at the embedding: for its comparison, for what is tied, and for each chunk."""
    for spec in zoo.available(["gpt2"]):
        model, calls = zoo.fresh(spec), []
        forward = model.forward
        model.forward = lambda *args, forward=forward, calls=calls, **options: (
            calls.append(1) or forward(*args, **options)
        )
        jet_bigrams(model, "mlps", top_k=3, chunk_size=31)
        assert len(calls) == 3 + 2


def test_a_model_is_run_and_checked_once_for_the_same_weights_and_hooks(tmp_path, monkeypatch):
    """Of a network whose weights and hooks are as before, nothing is run again; any change of them is noticed."""
    spec = zoo.available(["gpt2"])[0]
    model = zoo.fresh(spec)
    network, runs = ResidualNetwork(model), []
    forward = type(network.view).forward
    monkeypatch.setattr(type(network.view), "forward", lambda *args, **kw: runs.append(1) or forward(*args, **kw))

    def table(of=network, **options):
        runs.clear()
        return jet_bigrams(of, "mlps", top_k=5, rows=range(20), progress=False, **options)

    before = table()
    assert runs and table().ids.equal(before.ids) and not runs
    assert table().fingerprint == fingerprint(model) and not runs
    jet_bigrams(network, "0_mlp", top_k=5, rows=[3], progress=False)
    assert not runs and "0_mlp" in network.view.memo["vocabulary"][2]
    with torch.no_grad():
        model.blocks[1].mlp.W_out[0, 0] += 3.0
    after = table()
    assert runs and after.fingerprint == fingerprint(model) != before.fingerprint
    assert after.scores.equal(table(ResidualNetwork(model)).scores) and not after.scores.equal(before.scores)
    with model.hooks([("blocks.1.mlp.hook_post", lambda x, hook: x * 0)]):
        hooked = table()
        assert runs and not hooked.scores.equal(after.scores) and hooked.fingerprint == fingerprint(model)
    with model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x + 1)]), pytest.raises(ValueError, match="edits"):
        table()
    # What is saved has the fingerprint of every bit, although an entry that no watch compares was changed through `.data`.
    state = network.view.hook_state()
    flat = model.embed.W_E.data.view(-1)
    for place in range(len(flat)):
        flat[place] *= 1.5
        if network.view.hook_state() == state:
            break
        state = network.view.hook_state()
    saved = table(save=tmp_path / "table.parquet")
    assert saved.fingerprint == fingerprint(model)


def test_a_long_sweep_says_how_long_it_will_take(capsys, monkeypatch):
    model = zoo.build(zoo.available(["gpt2"])[0])
    scan = bigram_sweep.BigramSweep._scan

    def slow(*args):
        scan(*args)
        return 30.0  # seconds

    monkeypatch.setattr(bigram_sweep.BigramSweep, "_scan", slow)
    for options, said in [
        ({"chunk_size": 6, "rows": range(30)}, "direct after 30 tokens: about 2 minutes"),  # 24 left
        ({"chunk_size": 10, "rows": range(30)}, "direct after 30 tokens: about 60 seconds"),
        ({"chunk_size": 20, "rows": range(30)}, ""),  # 15 seconds left
        ({"chunk_size": 6, "rows": range(30), "progress": False}, ""),
    ]:
        jet_bigrams(model, top_k=3, **options)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tl-jets")]
        assert lines == ([f"tl-jets: {said}"] if said else [])


def test_the_path_of_a_table_is_a_path():
    model = zoo.build(zoo.available(["llama"])[0])
    steps = mlp_steps(ResidualNetwork(model))
    paths = ["direct", [], *steps, [steps[0]], steps, steps[:2], "mlps"]
    tables = [jet_bigrams(model, path, top_k=20) for path in paths]
    labels = list(dict.fromkeys(table.path for table in tables))
    assert labels == ["direct", *steps, " > ".join(steps), *([" > ".join(steps[:2])] if len(steps) > 2 else []), "mlps"]
    again = jet_bigrams_by_path(model, labels, top_k=20)
    assert list(again) == labels
    for table in tables:
        assert jet_bigrams(model, table.path, top_k=20).digest == again[table.path].digest == table.digest
    assert jet_bigrams(model, "0_mlp>1_mlp", top_k=20).path == "0_mlp > 1_mlp"


def test_each_mlp_in_one_sweep_is_each_alone():
    model = zoo.build(zoo.available(["llama"])[0])
    tables = jet_bigrams_by_path(model, top_k=20, chunk_size=10)
    assert list(tables) == mlp_steps(ResidualNetwork(model))
    for label, table in tables.items():
        assert table.digest == jet_bigrams(model, [label], top_k=20, chunk_size=10).digest
    rows = jet_bigrams_by_path(model, ["direct", ["0_mlp"], "mlps"], per="row", top_k=2)
    assert [len(table) for table in rows.values()] == [122, 122, 122]


def test_subsets_of_rows_and_columns():
    model = zoo.build(zoo.available(["gpt2"])[0])
    every = brute_of(model)
    rows, columns = [50, 3, 4, 3], torch.tensor([7, 60, 1, 2])
    kept = np.full_like(every, -np.inf)
    kept[np.ix_([3, 4, 50], [1, 2, 7, 60])] = every[np.ix_([3, 4, 50], [1, 2, 7, 60])]
    table = jet_bigrams(model, rows=rows, columns=columns, top_k=100)
    assert_best(table, ordered(kept, np.arange(61)), 12, 1e-10)  # normalized over the whole vocabulary
    per_row = jet_bigrams(model, rows=rows, columns=columns, top_k=1, per="row")
    assert sorted(per_row.ids.tolist()) == [[i, int(kept[i].argmax())] for i in (3, 4, 50)]
    assert table.settings["rows"]["count"] == 3
    assert jet_bigrams(model, top_k=5).settings["rows"] == "all"


@functools.cache
def brute_of(model):
    network = ResidualNetwork(model)
    return without_attention(model, network, keep=False).log_softmax(-1).numpy()


def test_half_precision_models_and_the_models_own_state():
    spec = zoo.available(["gpt2"])[0]
    model = zoo.fresh(spec, torch.bfloat16)
    network = ResidualNetwork(model)
    before = {name: x.clone() for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    logits = model(torch.tensor([[3, 4]]), return_type="logits")
    table = jet_bigrams(network, "mlps", top_k=30)
    expected = ordered(without_attention(model, network, keep=True).log_softmax(-1).numpy(), np.arange(61))
    np.testing.assert_allclose(table.scores, expected[2][:30], atol=1e-5)
    assert table.settings["dtype"] == "float32"
    assert torch.equal(model(torch.tensor([[3, 4]]), return_type="logits"), logits)
    after = model.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert not any(point.fwd_hooks for point in dict(model.hook_dict).values())


def test_hooks_inside_a_step_are_kept_and_those_on_streams_refused():
    for spec in zoo.available(["gpt2"]):
        model = zoo.build(spec)
        network = ResidualNetwork(model)
        plain = jet_bigrams(network, ["0_mlp"], top_k=5)
        with model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: 2 * x + 1)]):
            hooked = jet_bigrams(network, ["0_mlp"], top_k=5)
        assert hooked.digest != plain.digest
        assert hooked.fingerprint != plain.fingerprint
        with (
            model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x + 1)]),
            pytest.raises(ValueError, match="edits"),
        ):
            jet_bigrams(network, ["0_mlp"])


def test_what_mixes_tokens_is_refused():
    model = zoo.build(zoo.available(["gpt2"])[0])
    for path, message in [
        (["0_attn"], "function of one token"),
        (["0_mlp", "1_attn"], "function of one token"),
        (["7_mlp"], "each one of '0_mlp', '1_mlp', or heads such as 'L0H0'; got the step '7_mlp'"),
        ("text", "got the step 'text' in 'text'"),
        ("0_mlp > 1_attn", "function of one token"),
        ("1_mlp > 0_mlp", "in the order of the network"),
        ("0_mlp > direct", "got the step 'direct' in '0_mlp > direct'"),
        (["1_mlp", "0_mlp"], "in the order of the network"),
        (["1_mlp", "1_mlp"], "each once"),
    ]:
        with pytest.raises(ValueError, match=message):
            jet_bigrams(model, path)
    mixing = [("blocks.0.hook_mlp_out", lambda x, hook: x + x.mean(0, keepdim=True))]
    network = ResidualNetwork(model)
    with model.hooks(mixing), pytest.raises(ValueError, match="must not depend on the tokens evaluated beside it"):
        jet_bigrams(network, ["0_mlp"])
    attention_only = zoo.build(zoo.available(["attn_only"])[0])
    assert len(jet_bigrams(attention_only, top_k=4)) == 4
    with pytest.raises(ValueError, match='only bi-gram path is "direct"'):
        jet_bigrams(attention_only, "mlps")
    with pytest.raises(ValueError, match="at least one path; got none"):
        jet_bigrams_by_path(attention_only)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1; got 0"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1; got 0"),
        ({"per": "column"}, "per must be one of"),
        ({"score": "p"}, "score must be one of"),
        ({"screen": "fp8"}, "screen must be"),
        ({"screen": "bf16"}, "float32 sweep"),
        ({"rows": []}, "at least one"),
        ({"rows": [61]}, r"0..60; got 61"),
        ({"columns": [0.5]}, "list of token ids"),
        ({"columns": [-1]}, r"got -1"),
    ],
)
def test_options_are_checked(options, message, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        jet_bigrams(zoo.build(zoo.available(["gpt2"])[0]), **options)


def test_plain_callables():
    torch.manual_seed(0)
    embed, W = torch.nn.Embedding(9, 4), torch.randn(4, 4)
    decoder = Decoder(Norm("RMS"), torch.randn(4, 30), torch.randn(30))
    model = CallableModel(embed, [{"0_attn": torch.tanh}, {"0_mlp": lambda x: torch.sin(x @ W)}], decoder)
    with torch.no_grad():
        stream = torch.sin(embed.weight @ W).double()
        logits = (
            stream / (stream.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() @ decoder.W_U.double() + decoder.b_U.double()
        )
    table = jet_bigrams(model, "0_mlp", top_k=20)
    expected = ordered(logits.log_softmax(-1).detach().numpy(), np.arange(9))
    np.testing.assert_allclose(table.scores, expected[2][:20], atol=1e-5)
    assert table.names[int(table.ids[0, 0])] == str(int(table.ids[0, 0]))
    assert VocabularyStreams(model, ["mlps"]).n_tokens == 9


def test_memory_does_not_grow_with_the_vocabulary_squared():
    torch.manual_seed(0)
    embed = torch.nn.Embedding(6000, 8)
    decoder = Decoder(Norm("RMS"), torch.randn(8, 6000), torch.randn(6000))
    model = CallableModel(embed, [{"0_mlp": torch.tanh}], decoder)
    peak = live_memory.peak_bytes(lambda: jet_bigrams(model, top_k=50))
    assert peak < 30e6  # the matrix has 144e6 bytes
    peak = live_memory.peak_bytes(lambda: jet_bigrams(model, top_k=3, per="row"))
    assert peak < 40e6


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_one_bit_of_one_weight_is_another_model():
    spec = zoo.available(["gpt2"])[0]
    model, again = zoo.fresh(spec, torch.float32), zoo.fresh(spec, torch.float32)
    own = fingerprint(model)
    assert own == fingerprint(again)
    assert own != fingerprint(zoo.fresh(spec, torch.float32, seed=1))
    assert own != fingerprint(zoo.fresh(spec, torch.float64))
    for name, parameter in list(again.named_parameters())[::5]:
        flat = parameter.data.view(-1) if parameter.is_contiguous() else parameter.data.T.reshape(-1)
        index = len(flat) // 2
        position = np.unravel_index(index, parameter.shape)
        value = parameter.data[position].item()
        parameter.data[position] = np.nextafter(np.float32(value), np.float32(9)).item()
        assert fingerprint(again) != own, name
        parameter.data[position] = value
    assert fingerprint(again) == own


def test_any_bit_of_any_entry_and_the_order_of_entries_count():
    """Few entries are looked at one by one: all others through their sum; a sum alone does not see an exchange."""
    spec = zoo.available(["gpt2"])[0]
    model, draw = zoo.fresh(spec, torch.float32), random.Random(0)
    own = fingerprint(model)
    parameters = [(name, parameter.data) for name, parameter in model.named_parameters()]
    large = [item for item in parameters if item[1].numel() > SAMPLES][:2]
    assert large, "whose entries are not all looked at"
    for name, parameter in [*large, *parameters[::7]]:
        bits = parameter.view(torch.int32)
        size = bits.numel()
        for index in {1, size - 1, draw.randrange(size)}:
            position = np.unravel_index(index, bits.shape)
            bits[position] ^= 1
            assert fingerprint(model) != own, (name, index)
            bits[position] ^= 1
        if size <= SAMPLES and not torch.equal(parameter, parameter.flip(0)):
            parameter.copy_(parameter.flip(0))
            assert fingerprint(model) != own, name
            parameter.copy_(parameter.flip(0))
    assert fingerprint(model) == own


@pytest.mark.parametrize("processing", ["raw", "processed"])
def test_a_bias_that_is_folded_and_frequencies_tell_models_apart(processing, monkeypatch):
    """TransformerLens 4.3 folds the final norm's bias into a tensor that is no parameter; rotary frequencies are none."""
    (spec,) = (s for s in zoo.available(["gpt2"]) if s.world == "bridge" and s.processing == processing)
    make = zoo.hf_model

    def other(*args):
        model = make(*args)
        model.transformer.ln_f.bias += torch.linspace(-1, 1, model.config.hidden_size)
        return model

    own = fingerprint(zoo.fresh(spec))
    with monkeypatch.context() as patched:
        patched.setattr(zoo, "hf_model", other)
        assert fingerprint(zoo.fresh(spec)) != own
    for spec in zoo.available(["llama"]):
        model = zoo.fresh(spec)
        own = fingerprint(model)
        frequencies = [x for name, x in model.named_buffers() if "inv_freq" in name or "rotary_cos" in name]
        assert frequencies
        frequencies[0] *= 1.01
        assert fingerprint(model) != own


def test_every_weight_that_a_network_of_functions_shows_counts():
    """Its decoder and its embedding modules; what plain functions do cannot be known."""
    decoder, states = make(30, 9, 4)
    changed = states.clone()
    changed[5, 2] = np.nextafter(float(changed[5, 2]), 9)
    bias = Decoder(decoder.norm, decoder.W_U, decoder.b_U + 1)

    def of(table, decoder):
        return fingerprint(CallableModel(torch.nn.Embedding.from_pretrained(table), [{"0_mlp": torch.tanh}], decoder))

    own = of(states, decoder)
    assert own == of(states.clone(), decoder)
    assert len({own, of(changed, decoder), of(states, bias)}) == 3


def test_a_logit_scale_and_a_softcap_tell_models_apart():
    def made(**options):
        decoder = Decoder(Norm("RMS"), torch.ones(2, 3), torch.zeros(3), **options)
        return fingerprint(CallableModel(torch.nn.Embedding.from_pretrained(torch.ones(3, 2)), [], decoder))

    caps = [lambda logits, cap=cap: cap * torch.tanh(logits / cap) for cap in (5.0, 30.0)]
    options = [{}, {"logit_scale": 0.5}, {"logit_scale": 0.25}, *({"transform": cap} for cap in caps)]
    found = [made(**option) for option in options]
    assert len(set(found)) == len(options) and found == [made(**option) for option in options]


# --- sweeps ---------------------------------------------------------------------------------------------------------


def test_a_finished_table_is_not_made_again(tmp_path):
    model = zoo.build(zoo.available(["gpt2"])[0])
    first = jet_bigrams(model, "mlps", top_k=7, save=tmp_path / "table.parquet")
    assert [file.name for file in tmp_path.iterdir()] == ["table.parquet"]

    def never(state):
        raise AssertionError("made again")

    job = bigram_job(model, "mlps", top_k=7, name="table")
    again = sweep([Job("table", never, job.path, job.settings, job.fingerprint)], tmp_path)
    assert again["table"].digest == first.digest
    for change, message in (({"top_k": 8}, "top_k 7, not 8"), ({"score": "logit"}, "score 'logprob', not 'logit'")):
        with pytest.raises(ValueError, match=message):
            jet_bigrams(model, "mlps", **{"top_k": 7} | change, save=tmp_path / "table.parquet")
    other = zoo.fresh(zoo.available(["gpt2"])[0], seed=3)
    with pytest.raises(ValueError, match="fingerprint"):
        jet_bigrams(other, "mlps", top_k=7, save=tmp_path / "table.parquet")
    with pytest.raises(ValueError, match="comes twice"):
        sweep([job, job], tmp_path)
    with pytest.raises(ValueError, match="file name"):
        bigram_job(model, name="../up")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="truncated"):
        sweep([job], tmp_path)


def test_an_interrupted_sweep_over_paths_goes_on(tmp_path, monkeypatch):
    model = zoo.build(zoo.available(["llama"])[0])
    options = {"top_k": 9, "chunk_size": 6, "progress": False}
    whole = jet_bigrams_by_path(model, **options)
    monkeypatch.setattr("tl_jets.ngrams.jobs.STATE_SECONDS", 0.0)
    for per, stop_at in (("global", 4), ("row", 8)):
        folder = tmp_path / per
        expected = whole if per == "global" else jet_bigrams_by_path(model, **options, per=per)
        counted = {"chunks": 0}
        embed = VocabularyStreams.embed

        def stops(self, tokens, counted=counted, stop_at=stop_at, embed=embed):
            counted["chunks"] += len(tokens) == 6
            if counted["chunks"] == stop_at:
                raise InterruptedError
            return embed(self, tokens)

        with monkeypatch.context() as patch:
            patch.setattr(VocabularyStreams, "embed", stops)
            with pytest.raises(InterruptedError):
                jet_bigrams_by_path(model, **options, per=per, folder=folder)
            assert [file.name for file in folder.iterdir()] == ["unfinished.state"]
            counted["chunks"] = 100
            with pytest.raises(ValueError, match="top_k 9, not 4"):
                jet_bigrams_by_path(model, **options | {"top_k": 4}, per=per, folder=folder)
            found = jet_bigrams_by_path(model, **options, per=per, folder=folder)
        assert counted["chunks"] == 100 + 61 // 6 - (stop_at - 1)  # nothing again
        assert {label: table.digest for label, table in found.items()} == {k: t.digest for k, t in expected.items()}
        assert sorted(file.name for file in folder.iterdir()) == sorted(f"{label}.parquet" for label in whole)
    (folder / "unfinished.state").write_bytes(b"{}")
    (folder / "0_mlp.parquet").unlink()
    with pytest.raises(ValueError, match="no state of an unfinished table"):
        jet_bigrams_by_path(model, **options, per="row", folder=folder)


@pytest.mark.parametrize("per", ["global", "row"])
def test_a_state_that_lacks_a_path_is_of_no_use(per, tmp_path, monkeypatch):
    """A table that was there when the state was saved, and is not now: its path is read from the first row on."""
    model = zoo.build(zoo.available(["llama"])[0])
    options = {"top_k": 9, "chunk_size": 6, "progress": False, "per": per}
    paths = ["direct", "mlps"]
    expected = jet_bigrams_by_path(model, paths, **options)
    jet_bigrams_by_path(model, ["direct"], **options, folder=tmp_path)
    monkeypatch.setattr("tl_jets.ngrams.jobs.STATE_SECONDS", 0.0)
    embed, chunks = VocabularyStreams.embed, []

    def stops(self, tokens):
        chunks.append(len(tokens))
        if len(chunks) == 7:
            raise InterruptedError
        return embed(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(VocabularyStreams, "embed", stops)
        with pytest.raises(InterruptedError):
            jet_bigrams_by_path(model, paths, **options, folder=tmp_path)
    assert (tmp_path / "unfinished.state").exists()
    (tmp_path / "direct.parquet").unlink()
    found = jet_bigrams_by_path(model, paths, **options, folder=tmp_path)
    assert {label: table.digest for label, table in found.items()} == {k: t.digest for k, t in expected.items()}


VICTIM = """
import os, signal, sys, time
import torch
from tl_jets import CallableModel, Decoder, Norm
from tl_jets.ngrams import bigram_job, sweep
from tl_jets.ngrams import jobs

torch.set_num_threads(1)
jobs.STATE_SECONDS = 0.0
torch.manual_seed(0)
embed = torch.nn.Embedding(3000, 16)
stages = [{f"{i}_mlp": torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()).requires_grad_(False)} for i in range(3)]
model = CallableModel(embed, stages, Decoder(Norm("RMS"), torch.randn(16, 3000), torch.randn(3000)))
for line in sys.stdin:  # imports take longer than the sweep: every run is a fork, killed after a while
    folder, seconds = line.rsplit(" ", 1)
    child = os.fork()
    if child == 0:
        paths = ("direct", ["0_mlp", "2_mlp"], "mlps")
        sweep([bigram_job(model, path, top_k=200, chunk_size=150) for path in paths], folder, progress=False)
        os._exit(0)
    if float(seconds) > 0:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_sweep_killed_at_any_moment_resumes_to_the_same_tables(tmp_path):
    script = tmp_path / "victim.py"
    script.write_text(VICTIM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, env=environment, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(folder, seconds):
            process.stdin.write(f"{tmp_path / folder} {seconds}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        assert run("first", 0) == 0
        began = time.monotonic()
        assert run("whole", 0) == 0
        duration = time.monotonic() - began
        choose = random.Random(0)
        kills = 0
        for _ in range(40):
            code = run("killed", choose.uniform(0.05, 0.4) * duration)
            kills += code == -signal.SIGKILL
            if kills == 6 or (code == 0 and kills >= 2):
                break
            if code == 0:  # done too soon: a loaded machine is slow by fits and starts
                shutil.rmtree(tmp_path / "killed")
                kills = 0
        assert kills >= 2
        assert run("killed", 0) == 0
        process.stdin.close()
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == ["0_mlp > 2_mlp.parquet", "direct.parquet", "mlps.parquet"]
    assert sorted(file.name for file in (tmp_path / "killed").iterdir()) == names
    for name in names:
        whole, resumed = (NgramTable.load(tmp_path / folder / name) for folder in ("whole", "killed"))
        assert whole.ids.tolist() == resumed.ids.tolist()
        assert whole.digest == resumed.digest
