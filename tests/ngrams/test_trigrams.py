"""Skip-trigrams against all V^3 triples, whose attention and writes are read from forward passes by hooks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import zoo
from heads_by_hand import attention_table, output_table
from torch import Tensor

import tl_jets.ngrams.trigrams as trigrams_module
from tl_jets import CallableModel, Decoder, Norm, load_tinydocs
from tl_jets.ngrams import join, low_rank_logits
from tl_jets.ngrams.head_maps import HeadReader
from tl_jets.ngrams.trigrams import TrigramSweep, jet_trigrams, trigram_scores

V = zoo.D_VOCAB
NORMALIZES = ["vocab", "pair", "none"]
# A softcap whose scores the component does not show; 3.9 rotates Cohere in a way that is no rotation.
REFUSED = {("softcap", "bridge"), ("shortformer", "hooked")} | ({("cohere", "bridge")} if zoo.MAJOR == 3 else set())
FAMILIES = [
    spec
    for spec in zoo.available()
    if (spec.name, spec.world) not in REFUSED and (spec.processing == "raw" or spec.name in zoo.CORE)
]
SOME = zoo.available(["gpt2", "pythia", "gptj", "llama", "qwen3", "gemma2", "olmo", "attn_only"])
SOME = [spec for spec in SOME if spec.processing == "raw"]


def brute_force(attention: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """All triples (z1, z2, z3) and scores by (score, ids), from [z2, z1] and [z1, z3]."""
    scores = (attention.T[:, :, None] + output[:, None, :]).flatten()
    order = scores.sort(descending=True, stable=True).indices
    return torch.stack([order // V**2, order // V % V, order % V], dim=1), scores[order]


def assert_best(table: Any, ids: Tensor, scores: Tensor) -> None:
    k = len(table)
    assert oracles.relative_error(table.scores, scores[:k]) < 1e-10
    # Scores apart by rounding only may change places between two computations.
    apart = (scores[1:k] - scores[: k - 1]).abs() > 1e-11
    same = (table.ids == ids[:k]).all(1)
    assert same.all() or (not apart[(~same[1:]) & (~same[:-1])].any() and same.float().mean() > 0.99)


@pytest.mark.parametrize("spec", FAMILIES, ids=str)
def test_best_are_those_of_all_triples_in_every_family(spec):
    model, layer, head = zoo.build(spec), 1, 2
    output = output_table(model, layer, head)
    ids, scores = brute_force(attention_table(model, layer, head, 2, "vocab"), output)
    table = jet_trigrams(model, layer, head, distance=2, top_k=500)
    assert len(table) == 500
    assert_best(table, ids, scores)
    assert oracles.relative_error(table.parts["log_prob"], output[table.ids[:, 0], table.ids[:, 2]]) < 1e-10


@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("spec", SOME, ids=str)
def test_every_normalization_and_size(spec, normalize):
    if normalize == "none" and spec.world == "bridge" and spec.name in ("gptj", "attn_only"):
        pytest.skip("these components show no scores before the softmax")
    model = zoo.build(spec)
    output = output_table(model, 0, 1)
    ids, scores = brute_force(attention_table(model, 0, 1, 1, normalize), output)
    for top_k in (1, 10, 500, 5000):
        table = jet_trigrams(model, 0, 1, top_k=top_k, normalize=normalize)
        assert len(table) == top_k
        assert_best(table, ids, scores)


@pytest.mark.parametrize("seed", range(12))
def test_many_seeds_in_small_pieces(seed, monkeypatch):
    small = {"TILE_ROWS": 7, "TILE_COLUMNS": 9, "EXACT_ROWS": 2, "FIRST_ROUND": 3, "REFINED_ROWS": 5}
    for name, value in small.items():
        for module in (low_rank_logits, join):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    world = "bridge" if seed % 2 or zoo.MAJOR == 4 else "hooked"
    model = zoo.fresh(zoo.ModelSpec(["gpt2", "llama", "gemma2"][seed % 3], world, "raw"), seed=seed)
    layer, head, normalize = seed % 2, seed % zoo.N_HEADS, ["vocab", "vocab", "pair"][seed % 3]
    full = torch.cartesian_prod(*[torch.arange(V)] * 3)
    own = trigram_scores(model, layer, head, full, normalize=normalize)
    ids, scores = brute_force(attention_table(model, layer, head, 1, normalize), output_table(model, layer, head))
    assert oracles.relative_error(own, scores[(ids @ torch.tensor([V**2, V, 1])).argsort()]) < 1e-10
    for top_k in (1, 10, 500, 5000):
        assert_best(jet_trigrams(model, layer, head, top_k=top_k, normalize=normalize), ids, scores)


def test_equal_tokens_are_ties_by_id():
    model = zoo.fresh(zoo.available(["gpt2"])[0])
    weight = model.original_model.get_input_embeddings().weight
    weight[20:50] = weight[20].clone()  # tied: equal keys, queries and outputs
    table = jet_trigrams(model, 0, 0, top_k=V**3)
    _, scores = brute_force(attention_table(model, 0, 0, 1, "vocab"), output_table(model, 0, 0))
    assert oracles.relative_error(table.scores, scores) < 1e-10
    blocks = (table.scores[1:] - table.scores[:-1]).abs() > 1e-10
    number = table.ids @ torch.tensor([V**2, V, 1])
    assert ((number[1:] > number[:-1]) | blocks).all()
    for top_k in (10, 300, 3000):
        assert torch.equal(jet_trigrams(model, 0, 0, top_k=top_k).ids, table.ids[:top_k])


def test_heads_of_a_layer_are_the_heads_one_by_one():
    model = zoo.build(zoo.available(["llama"])[0])
    tables = jet_trigrams(model, 2, top_k=50)
    assert list(tables) == [0, 1, 2, 3]
    for head, table in tables.items():
        alone = jet_trigrams(model, 2, head, top_k=50)
        assert torch.equal(table.ids, alone.ids) and table.path == alone.path == f"L2H{head}"
    assert not torch.equal(tables[0].ids, tables[1].ids)
    assert list(jet_trigrams(model, 2, [3, 1], top_k=5)) == [3, 1]


def test_given_triples_and_parts():
    model = zoo.build(zoo.available(["qwen3"])[0])
    table = jet_trigrams(model, 1, 3, top_k=200, distance=3)
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    scores = trigram_scores(model, 1, 3, table.ids[shuffled], distance=3)
    torch.testing.assert_close(scores, table.scores[shuffled], rtol=0, atol=1e-12)
    torch.testing.assert_close(table.parts["attention"] + table.parts["log_prob"], table.scores, rtol=0, atol=1e-12)
    assert trigram_scores(model, 1, 3, [[1, 2, 3]]).shape == (1,)


def test_rows_restrict_keys_and_no_normalizer():
    model = zoo.build(zoo.available(["gpt2"])[0])
    ids, scores = brute_force(attention_table(model, 1, 0, 1, "vocab"), output_table(model, 1, 0))
    inside = torch.isin(ids[:, 0], torch.tensor([3, 7, 44]))
    table = jet_trigrams(model, 1, 0, top_k=400, rows=[44, 3, 7, 7])
    assert_best(table, ids[inside], scores[inside])
    assert table.settings["rows"]["count"] == 3


@pytest.mark.parametrize("world", ["bridge"] if zoo.MAJOR == 4 else ["bridge", "hooked"])
def test_a_key_bias_changes_raw_scores_only(world):
    model = zoo.fresh(zoo.ModelSpec("gpt2", world, "processed"))
    layer, head = 1, 2
    before = {name: jet_trigrams(model, layer, head, top_k=300, normalize=name) for name in NORMALIZES}
    attn = model.blocks[layer].attn
    if world == "hooked":
        attn.b_K[head] += 3 * torch.randn(
            attn.b_K.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
    else:
        shift = 3 * torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        next(p for n, p in attn.k.named_parameters() if n.endswith("bias")).add_(shift)
    after = {name: jet_trigrams(model, layer, head, top_k=300, normalize=name) for name in NORMALIZES}
    for name in ("vocab", "pair"):
        assert torch.equal(before[name].ids, after[name].ids)
        torch.testing.assert_close(before[name].scores, after[name].scores, rtol=0, atol=1e-9)
    assert not torch.equal(before["none"].ids, after["none"].ids)


@pytest.mark.parametrize("name", ["gpt2", "pythia", "qwen2"])
def test_folding_changes_no_table(name):
    """Folding runs in float32, hence the tolerance; it moves value biases, norms and the means of logits."""
    for world in {spec.world for spec in zoo.available([name])}:
        raw, processed = (zoo.build(zoo.ModelSpec(name, world, kind)) for kind in ("raw", "processed"))
        for head in (0, 3):
            table, other = (jet_trigrams(model, 1, head, top_k=200) for model in (raw, processed))
            torch.testing.assert_close(table.scores, other.scores, rtol=0, atol=2e-4)
            again = trigram_scores(processed, 1, head, table.ids)
            torch.testing.assert_close(again, table.scores, rtol=0, atol=2e-4)


def test_distance_counts_for_rotary_models_only():
    for name, changes in (("llama", True), ("gptj", True), ("gpt2", False), ("bloom", False)):
        model = zoo.build(zoo.available([name])[0])
        near, far = (jet_trigrams(model, 0, 1, top_k=50, distance=distance) for distance in (1, 5))
        assert torch.equal(near.ids, far.ids) != changes
    bloom = zoo.build(zoo.available(["bloom"])[0])
    near, far = (jet_trigrams(bloom, 0, 1, top_k=50, distance=d, normalize="pair") for d in (1, 5))
    assert (near.scores > far.scores).all()  # ALiBi turns from the far one


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_float32_finds_what_float64_finds(name):
    spec = zoo.available([name])[0]
    exact = jet_trigrams(zoo.build(spec), 1, 1, top_k=300)
    table = jet_trigrams(zoo.build(spec, torch.float32), 1, 1, top_k=300)
    torch.testing.assert_close(table.scores, exact.scores, rtol=0, atol=5e-5)
    assert len(set(map(tuple, table.ids.tolist())) & set(map(tuple, exact.ids.tolist()))) >= 297


def test_bf16_models_are_read_in_float32():
    model = zoo.build(zoo.available(["gpt2"])[0], torch.bfloat16)
    table = jet_trigrams(model, 1, 1, top_k=20)
    assert table.settings["dtype"] == "float32" and table.scores.isfinite().all()


def test_the_fit_reproduces_attention_and_names_the_rotation():
    for name, words in (
        ("gptj", "neighbours of 4"),
        ("pythia", "halves of 4"),
        ("llama", "halves of 6"),
        ("gpt2", "none"),
    ):
        model = zoo.build(zoo.available([name])[0])
        found = HeadReader(model, 1).scores(3)
        assert found.rotation == words and found.cap is None
    assert HeadReader(zoo.build(zoo.available(["gemma2"])[0]), 1).scores(3).cap == 4.0


def test_what_is_refused():
    mistral = zoo.build(zoo.available(["mistral"])[0])
    with pytest.raises(ValueError, match="window"):
        jet_trigrams(mistral, 0, 0, distance=4)
    assert len(jet_trigrams(mistral, 0, 0, distance=3, top_k=1)) == 1
    model = zoo.build(zoo.available(["gpt2"])[0])
    for wrong in (0, -1, zoo.N_CTX, True):
        with pytest.raises(ValueError, match="distance must be"):
            jet_trigrams(model, 0, 0, distance=wrong)
    with pytest.raises(ValueError, match="layer must be"):
        jet_trigrams(model, 2, 0)
    with pytest.raises(ValueError, match="head must be"):
        jet_trigrams(model, 0, 4)
    with pytest.raises(ValueError, match="top_k"):
        jet_trigrams(model, 0, 0, top_k=0)
    with pytest.raises(ValueError, match="rows must be"):
        jet_trigrams(model, 0, 0, rows=[V])
    with pytest.raises(ValueError, match="triples must be"):
        trigram_scores(model, 0, 0, [[1, 2]])


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_options_and_models_meet_the_librarys_own_errors():
    model = zoo.build(zoo.available(["gpt2"])[0])
    with pytest.raises(ValueError, match="normalize must be"):
        jet_trigrams(model, 0, 0, normalize="all")
    with pytest.raises(ValueError, match=r"A text in rows must be one token; 'w3 w4' is 2: \[3, 4\]"):
        jet_trigrams(model, 0, 0, rows=["w3 w4"])
    assert jet_trigrams(model, 0, 0, rows=["w3"], top_k=2).ids[:, 0].tolist() == [3, 3]
    plain = CallableModel(
        torch.nn.Embedding(5, 4), [{"0_mlp": torch.tanh}], Decoder(Norm("RMS"), torch.randn(4, 5), torch.zeros(5))
    )
    with pytest.raises(NotImplementedError, match="plain functions"):
        jet_trigrams(plain, 0, 0)


@pytest.mark.parametrize("name", ["softcap", "shortformer"])
def test_attention_that_is_not_understood_is_refused(name):
    specs = [spec for spec in zoo.available([name]) if (spec.name, spec.world) in REFUSED and spec.processing == "raw"]
    if not specs:
        pytest.skip("this TransformerLens has no such model")
    with pytest.raises(NotImplementedError, match=r"Attention weights|functions of their token"):
        jet_trigrams(zoo.build(specs[0]), 0, 0)


def test_a_hook_that_edits_attention_is_refused_and_one_on_values_is_honoured():
    model = zoo.build(zoo.available(["gpt2"])[0])
    with (
        model.hooks([("blocks.0.attn.hook_pattern", lambda own, hook: own * 0.5)]),
        pytest.raises(NotImplementedError, match="sum to 1"),
    ):
        jet_trigrams(model, 0, 0)
    plain = jet_trigrams(model, 0, 0, top_k=20)
    with model.hooks([("blocks.0.attn.hook_q", lambda own, hook: own * 1.5)]):
        sharper = jet_trigrams(model, 0, 0, top_k=20)
    assert sharper.scores[0] > plain.scores[0] and plain.fingerprint != sharper.fingerprint


@pytest.mark.parametrize("spec", zoo.available(["gpt2", "llama", "gemma2", "olmo2"]), ids=str)
def test_a_hook_after_the_heads_is_refused(spec):
    """What heads write is read from W_O, which no such hook changes."""
    model = zoo.build(spec)
    points = [
        "blocks.0.hook_attn_out",
        "blocks.0.attn.hook_out",
        "blocks.0.attn.o.hook_out",
        "blocks.0.attn.hook_result",
    ]
    points = [point for point in points if point in model.hook_dict]
    assert points
    jet_trigrams(model, 0, 0, top_k=1)
    for point in points:
        if point.endswith("hook_result"):
            model.set_use_attn_result(True)
        try:
            with (
                model.hooks([(point, lambda own, hook: own.flip(-1))]),
                pytest.raises((NotImplementedError, ValueError), match="hook"),
            ):
                jet_trigrams(model, 0, 0, top_k=1)
        finally:
            if point.endswith("hook_result"):
                model.set_use_attn_result(False)


def test_values_that_are_not_finite_are_refused(monkeypatch):
    plan = TrigramSweep(zoo.build(zoo.available(["gpt2"])[0]), 0, [0])
    vectors = plan.reader.vectors
    for wrong in (torch.nan, torch.inf, -torch.inf):

        def with_wrong(tokens: Any, heads: Any, paths: Any, wrong: float = wrong) -> Any:
            query, key, value = (x.clone() for x in vectors(tokens, heads, paths))
            key[:, 3, -1], value[:, 5, 0] = wrong, wrong
            return query, key, value

        monkeypatch.setattr(plan.reader, "vectors", with_wrong)
        with pytest.raises(ValueError, match=r"Queries, keys and values must be finite; those of tokens \[3, 5\]"):
            list(plan.tables([0]))


def test_the_model_is_left_as_it_was():
    model = zoo.build(zoo.available(["llama"])[0])
    tokens = zoo.tokens(model)
    before = model(tokens)
    jet_trigrams(model, 0, top_k=3)
    assert torch.equal(model(tokens), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_a_trained_model_in_float32():
    model = zoo.load_stories("bridge")
    table = jet_trigrams(model, 2, 3, top_k=50)
    scores = trigram_scores(model, 2, 3, table.ids)
    torch.testing.assert_close(scores, table.scores, rtol=0, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    others = torch.randint(0, model.cfg.d_vocab, (2000, 3), generator=generator)
    others[:, 0] = table.ids[torch.randint(0, 50, (2000,), generator=generator), 0]
    scores = trigram_scores(model, 2, 3, others)
    better = others[scores > table.scores[-1]]
    assert set(map(tuple, better.tolist())) <= set(map(tuple, table.ids.tolist()))


def test_a_trained_model_in_float64_needs_one_round(monkeypatch):
    rounds = []
    collect = join.Search._collect
    monkeypatch.setattr(join.Search, "_collect", lambda self, *args: rounds.append(0) or collect(self, *args))
    table, rough = (jet_trigrams(load_tinydocs(dtype=of), 1, 0, top_k=50) for of in (torch.float64, torch.float32))
    assert len(rounds) == 2
    assert torch.equal(table.ids, rough.ids)
    torch.testing.assert_close(table.scores, rough.scores, rtol=0, atol=1e-4)


def camps(columns: torch.Tensor) -> torch.Tensor:
    """Half of the columns here, half there: far from normal, and the largest are far below what is expected."""
    return 0.1 * columns + 30 * torch.ones(len(columns), 1) * torch.tensor([1.0, -1.0]).repeat(columns.shape[1] // 2)


def outlier(columns: torch.Tensor) -> torch.Tensor:
    """One column that is far above what is expected."""
    return torch.cat([columns[:, 1:], 60 * columns[:, :1].sign()], dim=1)


@pytest.mark.parametrize("transform", [None, lambda logits: 50 * torch.tanh(logits / 50)])
@pytest.mark.parametrize(
    ("columns", "n_passes"),
    [(lambda x: x, 1), (lambda x: 0 * x, 1), (lambda x: 30 * x, 1), (camps, 2), (outlier, 2)],
    ids=["normal", "equal", "sharp", "camps", "outlier"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normalizers_whatever_the_distribution(columns, n_passes, transform, dtype):
    generator = torch.Generator().manual_seed(0)
    rows, constant = torch.randn(50, 8, generator=generator).to(dtype), torch.randn(3000, generator=generator).to(dtype)
    found = low_rank_logits.LowRankLogits(
        rows, columns(torch.randn(8, 3000, generator=generator).to(dtype)), constant, transform
    )
    logits = rows.double() @ found.columns.double() + constant
    logits = logits if transform is None else transform(logits)
    tiles = []
    parts = low_rank_logits.normalizers(found, rows, lambda columns, tile: tiles.append(columns.start))
    normalizer = logits.logsumexp(1)
    bound = found.rounding()
    assert bound < (0.02 if dtype is torch.float32 else 1e-10)
    assert (sum(parts)[:, 0] / low_rank_logits.LOG2_E - normalizer).abs().max() < bound
    if transform is None:
        passes = tiles.count(0)
        assert passes == n_passes or (dtype is torch.float64 and passes == 1), "float64 holds an outlier's sum"
        if n_passes == 1 and found.reach < 60:
            assert parts[1].abs().median() < 0.3, "what is expected is close, if the columns are normal"
    best, again = low_rank_logits.best_log_prob(found, rows)
    assert (best - (logits.amax(1) - normalizer)).abs().max() < bound and (again - normalizer).abs().max() < bound


def test_what_is_expected_of_trained_heads_is_close():
    """The scores of every head of the embedded model, on average over its queries: as the modules' docstrings have it."""
    model = load_tinydocs()
    errors = []
    for layer in range(model.cfg.n_layers):
        reader = HeadReader(model, layer)
        qk_scores, every = reader.scores(1), torch.arange(reader.n_tokens)
        vectors = reader.vectors(every, range(reader.n_heads))
        for query, key in zip(vectors.query, vectors.key, strict=True):
            keys = qk_scores.keys(key)
            expected = (
                low_rank_logits.LowRankLogits(query, keys.T.contiguous()).expected(query)[:, 0] / low_rank_logits.LOG2_E
            )
            errors.append(float(((query @ keys.T).logsumexp(1) - expected).abs().mean()))
    assert np.mean(errors) < 0.15 and max(errors) < 0.5, errors


@pytest.mark.parametrize("seed", range(5))
def test_triples_that_float32_cannot_tell_apart_are_told_apart(seed):
    """Saturated: in dozens of triples both probabilities are 1 but for less than rounding; all of them have to be kept."""
    torch.manual_seed(seed)
    n_tokens, top_k = 120, 20
    queries, keys, values, columns = (12 * torch.randn(n_tokens, 8) for _ in range(4))
    maps = join.HeadMaps(
        low_rank_logits.LowRankLogits(queries, keys.T),
        low_rank_logits.LowRankLogits(values, columns.T),
        torch.zeros(n_tokens).double(),
        "vocab",
    )
    ids, attention, log_prob = join.Search(maps, top_k, lambda count: None).run(torch.arange(n_tokens))

    def log_softmax(logits):
        top, place = logits.max(1, keepdim=True)
        return (logits - top) - (logits - top).exp().scatter(1, place, 0.0).sum(1, keepdim=True).log1p()

    A = log_softmax(queries.double() @ keys.double().T).T  # [key, query]
    P = log_softmax(values.double() @ columns.double().T)
    wanted = (A[:, :, None] + P[:, None, :]).flatten().topk(top_k).values
    assert wanted[-1] > -1e-6, "what float32 cannot tell from 0"
    found, place = (attention + log_prob).topk(top_k)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    key, query, output = ids[place].unbind(1)
    torch.testing.assert_close(A[key, query] + P[key, output], wanted, rtol=1e-9, atol=0)
    assert len(ids[place].unique(dim=0)) == top_k


@pytest.mark.parametrize("normalize", NORMALIZES)
@pytest.mark.parametrize("which", ["scores", "outputs"])
def test_what_float32_bounds_lose_to_cancellation_is_found(which, normalize):
    """One triple is best by far, but float32 loses that to large components that cancel: the slack of the bounds keeps its key."""
    n_tokens, winner, large, lost = 40, 37, 2.0**14, []
    for order in ([0, 1, 2, 3], [1, 2, 0, 3]):  # in one of them it is lost, in whatever order products are summed
        generator = torch.Generator().manual_seed(7)
        noise = [1e-2 * torch.randn(n_tokens, 4, generator=generator) for _ in range(3)]
        rows, columns = torch.zeros(n_tokens, 4), torch.zeros(4, n_tokens)
        rows[:, 3], columns[3] = 1.0, noise[0][:, 0]
        lossy, other = (rows, columns), (noise[1] * torch.tensor([0.0, 0.0, 0.0, 1.0]), noise[2].T)
        row, column = (0, winner) if which == "scores" else (winner, 5)
        if which == "scores":  # query 0 looks at the winner most, and at all others alike
            columns[3] += 4.0
        else:  # what is written of the winner is token 5; of all others, less surely, token 6
            columns[3, 6] = 3.0
        rows[row], columns[:, column] = torch.tensor([large, 1.0, large, 0.0]), torch.tensor([large, 6.0, -large, 0.0])
        parts = (lossy, other) if which == "scores" else (other, lossy)
        scores, outputs = (
            low_rank_logits.LowRankLogits(x[:, order].contiguous(), y[order].contiguous()) for x, y in parts
        )
        S, P = ((x.rows.double() @ x.columns.double()) for x in (scores, outputs))
        maps = join.HeadMaps(scores, outputs, S.diagonal().contiguous(), normalize)
        lost.append(bool((lossy[0][row, order] @ lossy[1][order, column]) < 3))
        ids, attention, log_prob = join.Search(maps, 3, lambda count: None).run(torch.arange(n_tokens))
        own = S.diagonal()[:, None]
        A = {"vocab": S.log_softmax(1), "pair": -torch.nn.functional.softplus(own - S), "none": S}[normalize].T
        wanted = (A[:, :, None] + P.log_softmax(1)[:, None, :]).flatten().topk(3).values
        got, place = (attention + log_prob).topk(3)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
        assert winner in ids[place, 0]
    assert any(lost), "the test must be one of cancellation"


def test_a_long_search_says_how_long_it_will_take(capsys, monkeypatch):
    """From the first chunk of queries, with keys counted alike: here all queries, so that half of the first head is left."""
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(trigrams_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    model = zoo.build(zoo.available(["gpt2"])[0])
    for head, options, said in [
        (1, {}, "L1H1: about 30 seconds"),
        ([0, 1], {}, "2 heads of layer 1: about 90 seconds"),
        (1, {"progress": False}, ""),
    ]:
        jet_trigrams(model, 1, head, top_k=3, **options)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tl-jets")]
        assert lines == ([f"tl-jets: {said}"] if said else [])
