"""Caches as data: in files, pickles and copies, and with their model given back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets import JetCache, ResidualNetwork, jet_expand

PROMPTS = ["w5 w17 w8 w30", "w11 w6", "w40 w41 w42"]  # of unequal length, so that two are padded
CENTERS = ["embed", "0_attn_out", "0_mlp_out"]
SPEC = next(spec for spec in zoo.available(["gpt2"]) if spec.processing == "raw")

EXPANSIONS: dict[str, Any] = {
    "stage": lambda net: jet_expand(net, "1_attn", centers=CENTERS),
    "stage, order 0, optimal": lambda net: jet_expand(net, "1_mlp", centers=CENTERS, order=0, weights="optimal"),
    "detached stage": lambda net: jet_expand(net, "1_mlp", centers=CENTERS, linearize="detached"),
    "decoder": lambda net: jet_expand(net, "ln_final", centers=net.components, weights="optimal"),
    "detached decoder": lambda net: jet_expand(net, "ln_final", centers=net.components, linearize="detached"),
    "paths": lambda net: tj.exponential_expansion(net, linearize="detached"),
    "largest paths": lambda net: tj.exponential_expansion(
        net, linearize="detached", top=5, rank="effect", targets=["w7"]
    ),
    "reorganized stage": lambda net: tj.paths.reorganized_expansion(net, "1_mlp", centers=CENTERS),
    "reorganized decoder": lambda net: tj.paths.reorganized_expansion(net, "ln_final", centers=net.components),
}
SLICES: dict[str, Any] = {
    "whole": lambda cache: cache,
    "prompts": lambda cache: cache.apply_slice_to_batch_dim([2, 0]),
    "one prompt": lambda cache: cache.apply_slice_to_batch_dim(1),
    "positions": lambda cache: cache.apply_slice_to_pos_dim([2, 0]),
    "one position": lambda cache: cache.apply_slice_to_pos_dim(1),
    "last tokens": lambda cache: cache.at_rows(tj.core.selection.Rows.of(cache.trace, [-1, 0])),
    "a cell": lambda cache: (
        cache.apply_slice_to_batch_dim([0, 1]).apply_slice_to_batch_dim(1).apply_slice_to_pos_dim(0)
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::tl_jets.DivergenceWarning")


@pytest.fixture(scope="module")
def net():
    return ResidualNetwork(zoo.build(SPEC), "sublayer")


def assert_same(found: Any, wanted: Any) -> None:
    """The same types and values, in tensors bit by bit."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, tj.core.results.Result):
        assert_same(data(found), data(wanted))
    else:
        assert found == wanted


def data(cache: Any) -> dict[str, Any]:
    """All fields but the handles."""
    return {name: value for name, value in vars(cache).items() if name not in ("expansion", "trace")}


@pytest.fixture(scope="module", params=EXPANSIONS)
def expanded(request, net):
    expansion = EXPANSIONS[request.param](net)
    return expansion, expansion(PROMPTS)


@pytest.mark.parametrize("cut", SLICES)
def test_a_cache_comes_back_from_files_and_pickles(tmp_path, expanded, cut):
    cache: JetCache = SLICES[cut](expanded[1])
    for loaded in (tj.load(cache.save(tmp_path / "cache.safetensors")), pickle.loads(pickle.dumps(cache))):
        assert type(loaded) is type(cache) and loaded.expansion is None and loaded.trace is None
        assert_same(data(loaded), data(cache))
        assert repr(loaded) == repr(cache) and loaded.labels == cache.labels
        assert torch.equal(loaded.stack(), cache.stack()) and torch.equal(loaded.remainder, cache.remainder)
        assert_same(loaded.gap, cache.gap)
        assert loaded._repr_html_() == cache._repr_html_()


def test_data_of_a_cache_are_those_of_its_trace(expanded):
    cache = expanded[1]
    valid = cache.trace.valid
    assert torch.equal(cache.tokens, cache.trace.tokens) and torch.equal(cache.valid, valid)
    assert torch.equal(cache.places[valid], (valid.cumsum(1) - 1)[valid]) and bool((cache.places[~valid] == -1).all())
    last = SLICES["last tokens"](cache)
    assert last.places.tolist() == [[int(real.sum()) - 1, 0] for real in valid]
    assert last.tokens.tolist() == [
        [int(row[real][-1]), int(row[real][0])] for row, real in zip(cache.tokens, valid, strict=True)
    ]
    turned = SLICES["prompts"](SLICES["positions"](cache))
    for name in ("tokens", "valid", "places"):
        assert torch.equal(getattr(turned, name), getattr(cache, name)[[2, 0]][:, [2, 0]])


@pytest.mark.parametrize("cut", ["whole", "prompts", "one prompt", "positions"])
@pytest.mark.parametrize("kind", ["stage, order 0, optimal", "decoder", "detached decoder"])
def test_a_loaded_cache_has_the_same_table_without_top_tokens(net, kind, cut):
    cache = SLICES[cut](EXPANSIONS[kind](net)(PROMPTS))
    table = cache.to_dataframe()
    assert ("top_token" in table) == cache.is_decoded
    loaded = pickle.loads(pickle.dumps(cache))
    assert loaded.to_dataframe().equals(table.drop(columns="top_token", errors="ignore"))


@pytest.mark.parametrize("cut", ["prompts", "one prompt", "positions", "one position"])
def test_a_loaded_cache_is_sliced_and_moved(expanded, cut):
    loaded = pickle.loads(pickle.dumps(expanded[1]))
    wanted = SLICES[cut](expanded[1])
    assert_same(data(SLICES[cut](loaded)), data(wanted))
    single = loaded.to(torch.float32)
    assert single.truth.dtype == single.weights.dtype == single.stack().dtype == torch.float32
    assert single.tokens.dtype == torch.int64 and single.valid.dtype == torch.bool and single.gap is loaded.gap
    moved = wanted.to("meta")
    assert {x.device.type for x in (moved.truth, moved.tokens, moved.valid, moved.places, moved.weights)} == {"meta"}
    assert moved.trace is wanted.trace and moved.expansion is wanted.expansion


def test_a_loaded_cache_says_what_needs_the_model(expanded):
    cache = expanded[1]
    loaded: Any = pickle.loads(pickle.dumps(cache))
    calls = [loaded.check, loaded.logit_attrs]
    calls += [loaded.logits, loaded.top_tokens] if loaded.is_decoded else []
    calls += (
        [loaded.statistics, loaded.to_dataframe, loaded.remainder_logits] if isinstance(cache, tj.PathCache) else []
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"need the model.*cache\.with_model\(expansion, prompts\)"):
            call()


@pytest.mark.parametrize("cut", ["whole", "prompts", "one prompt", "positions", "last tokens"])
def test_a_loaded_cache_with_its_model_is_as_before(tmp_path, net, expanded, cut):
    expansion, cache = expanded[0], SLICES[cut](expanded[1])
    loaded = tj.load(cache.save(tmp_path / "cache.safetensors"))
    for given in (PROMPTS, net.trace(PROMPTS)):
        found: Any = loaded.with_model(expansion, given)
        assert_same(data(found), data(cache))
        if cut != "one prompt" or not isinstance(cache, tj.PathCache):
            assert found.to_dataframe().equals(cache.to_dataframe())
        if cache.is_decoded:
            assert torch.equal(found.logits(), cache.logits())
            assert torch.equal(found.top_tokens(3).indices, cache.top_tokens(3).indices)
        if cut != "one prompt":
            assert torch.equal(found.logit_attrs(["w7"]).nan_to_num(), cache.logit_attrs(["w7"]).nan_to_num())


def test_a_loaded_cache_is_checked_once_it_has_its_model(net):
    for name in ("stage", "stage, order 0, optimal", "detached stage", "decoder", "detached decoder", "paths"):
        expansion = EXPANSIONS[name](net)
        loaded = pickle.loads(pickle.dumps(expansion(PROMPTS)))
        assert loaded.with_model(expansion, PROMPTS).check().passed, name
        wrong = pickle.loads(pickle.dumps(loaded))
        wrong.terms[wrong.labels[0]][:] += 1
        assert not wrong.with_model(expansion, PROMPTS).check().passed, name


@pytest.mark.parametrize("cut", ["whole", "prompts", "positions", "last tokens"])
def test_another_model_input_or_expansion_is_refused(net, cut):
    expansion = EXPANSIONS["decoder"](net)
    loaded = SLICES[cut](expansion(PROMPTS))
    loaded = pickle.loads(pickle.dumps(loaded))
    others = [PROMPTS[:2], PROMPTS[::-1], [*PROMPTS[:2], "w40 w43 w44"], "w5", torch.tensor([[3]])]
    for other in others:
        with pytest.raises(ValueError, match=r"with_model takes .* and its whole input; got .* other tokens"):
            loaded.with_model(expansion, other)
    elsewhere = net.trace(PROMPTS).tokens.clone()
    elsewhere[:, 0] = elsewhere[:, 0] % 40 + 3  # only the cached tokens are the same
    for name in ("stage", "decoder", "detached decoder", "paths"):
        last = pickle.loads(pickle.dumps(SLICES["last tokens"](EXPANSIONS[name](net)(PROMPTS))))
        with pytest.raises(ValueError, match="other tokens or weights"):
            last.with_model(EXPANSIONS[name](net), net.trace(elsewhere, attention_mask=net.trace(PROMPTS).valid.long()))
    for kind in ("stage", "detached decoder"):
        with pytest.raises(ValueError, match=r"with_model takes the expansion of the cache \(order 1 of ln_final\)"):
            loaded.with_model(EXPANSIONS[kind](net), PROMPTS)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_keep_their_model(expanded, copied):
    cache = expanded[1]
    found = copied(cache)
    assert found is not cache and found.expansion is cache.expansion and found.trace is cache.trace
    assert_same(data(found), data(cache))
    assert (found.truth is cache.truth) == (copied is copy.copy)
    assert torch.equal(found.logit_attrs().nan_to_num(), cache.logit_attrs().nan_to_num())


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_real_tokens(net, side, tmp_path):
    """Like those of lenses and effects, where slices are of the padded rows, as TransformerLens' are."""
    tokens, valid = zoo.padded(net.view.model, lengths=(6, 4))
    if side == "right":
        tokens, valid = tokens.clone(), valid.clone()
        tokens[1], valid[1] = tokens[1].roll(-2), valid[1].roll(-2)
    real = [[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3] if side == "left" else [0, 1, 2, 3, -1, -1]]
    expansion = jet_expand(net, "ln_final", centers=CENTERS)
    cache = expansion(net.trace(tokens, attention_mask=valid))

    def positions(cache: Any) -> Any:
        return torch.as_tensor(cache.positions).tolist()

    assert positions(cache) == (real if side == "left" else real[0])
    at = cache.apply_slice_to_pos_dim([2, 3])
    assert torch.equal(at.truth, cache.truth[:, 2:4]) and positions(at) == (
        [[2, 3], [0, 1]] if side == "left" else [2, 3]
    )
    one = cache.apply_slice_to_pos_dim(3)
    assert positions(one) == ([3, 1] if side == "left" else 3)
    assert positions(cache.apply_slice_to_batch_dim(1)) == real[1]
    assert positions(cache.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim(3)) == real[1][3]
    paths = tj.exponential_expansion(net, linearize="detached", max_length=1)
    last = paths(net.trace(tokens, attention_mask=valid), positions=-1)
    lens = tj.iterative_jet_lens(net, cache.trace, positions=-1)
    assert positions(last) == positions(lens) == [[5], [3]]
    assert positions(tj.load(at.save(tmp_path / "cache.safetensors"))) == positions(at)
