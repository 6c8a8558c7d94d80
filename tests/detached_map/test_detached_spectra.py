"""Spectra of detached maps, against the full SVD of materialized matrices and a network of known matrices."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

import tl_jets
from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.detached_map import detached_jacobian, detached_spectra

RAW = [spec for spec in zoo.available(["gpt2", "pythia"]) if spec.processing == "raw"]


@pytest.fixture(params=RAW, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    return zoo.build(request.param)


@pytest.mark.parametrize(
    ("spec", "maps", "pos"),
    [
        *(
            (spec, maps, pos)
            for spec in RAW[:1]
            for maps, pos in [("cumulative", None), ("cumulative", 2), ("layers", 2)]
        ),
        *((spec, "layers", 2) for spec in RAW[1:]),
    ],
    ids=str,
)
def test_they_are_those_of_the_matrices(spec, maps, pos):
    model = zoo.build(spec)
    tokens = zoo.tokens(model, batch=1, pos=4)
    network = ResidualNetwork(model)
    spectra = detached_spectra(network, tokens, maps=maps, k=6, pos=pos, position=-2)
    trace = network.trace(tokens)
    final = trace["final_post"][0, 2]
    lefts = []
    for i, (wrt, output) in enumerate(zip(spectra.wrt, spectra.outputs, strict=True)):
        J = detached_jacobian(network, trace, wrt=wrt, output=output, positions=-2, ordinary=False)
        matrix = J.materialize()[0, 0]
        matrix = matrix.flatten(1) if pos is None else matrix[:, pos]
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        if float(matrix.norm()) == 0:
            assert pos is not None and output.endswith("mlp_out"), "an MLP alone moves nothing between positions"
            assert float(spectra.values[i, 0]) == float(spectra.stable_rank[i]) == 0
            lefts.append(spectra.left[i])
            continue
        rank = int((values > 1e-9 * values[0]).sum())
        assert oracles.relative_error(spectra.values[i], values[:6]) < 1e-7  # of the Gram matrix: 1e-15 in the squares
        assert abs(float(spectra.stable_rank[i]) - float(values.square().sum() / values[0] ** 2)) < 1e-10
        assert abs(float(spectra.frobenius[i]) - float(matrix.norm())) < 1e-10
        point = J.map.point.detach()[0] if pos is None else J.map.point.detach()[0, pos][None]
        image = matrix @ point.flatten()
        for j in range(min(6, rank)):
            sign = 1 if float(left[:, j] @ image) >= 0 else -1
            assert oracles.relative_error(spectra.left[i, j], sign * left[:, j]) < 1e-6
        lefts.append(spectra.left[i])
        inside = spectra.left[i].T @ (spectra.left[i] @ final)
        assert abs(float(spectra.explained[i]) - float(inside.norm() / final.norm()) ** 2) < 1e-10
        own = J.value[0, 0]
        inside = spectra.left[i].T @ (spectra.left[i] @ own)
        assert abs(float(spectra.explained_own[i]) - float(inside.norm() / own.norm()) ** 2) < 1e-10
    products = torch.stack([torch.stack([torch.stack([u @ v for v in lefts[-1]]) for u in left]) for left in lefts])
    assert oracles.relative_error(spectra.projections(), products) < 1e-12
    angles = torch.stack([torch.linalg.svdvals(left @ lefts[-1].T).square().mean() for left in lefts])
    assert oracles.relative_error(spectra.overlap(), angles) < 1e-12
    assert float(spectra.overlap()[-1]) == pytest.approx(1)


def test_some_layers_of_all():
    model = zoo.build(RAW[0])
    network, tokens = ResidualNetwork(model), zoo.tokens(model, batch=1, pos=4)
    every = detached_spectra(network, tokens, k=3)
    some = detached_spectra(network, tokens, k=3, layers=[-1], progress=False)
    last = network.n_layers - 1
    assert some.outputs == [f"{last}_attn_out", f"{last}_mlp_out", "final_post"]
    torch.testing.assert_close(some.values, every.values[-3:], rtol=1e-12, atol=0)
    for layers in ([], [5], -9):
        with pytest.raises(ValueError, match="layers must be"):
            detached_spectra(network, tokens, layers=layers)
    with pytest.raises(ValueError, match="Leave one out"):
        detached_spectra(network, tokens, layers=0, maps=[("embed", "final_post")])


def linear_network(d_model: int = 12, layers: int = 3) -> tuple[CallableModel, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(d_model, d_model, generator=generator, dtype=torch.float64) for _ in range(layers)]
    embed = torch.nn.Embedding(5, d_model, dtype=torch.float64).requires_grad_(False)
    stages: list[dict[str, Any]] = [{f"{i}_mlp": lambda x, W=W: x @ W} for i, W in enumerate(weights)]
    decoder = Decoder(Norm("none"), torch.eye(d_model, dtype=torch.float64), torch.zeros(d_model, dtype=torch.float64))
    return CallableModel(embed, stages, decoder), weights, embed.weight


def test_a_network_of_known_matrices():
    model, weights, embedding = linear_network()
    eye = torch.eye(12, dtype=torch.float64)
    tokens = torch.tensor([[4, 2, 3]])
    spectra = detached_spectra(model, tokens, k=12)
    product = eye
    for i, weight in enumerate(weights):
        write = (product @ weight).T
        product = product @ (eye + weight)
        for matrix, label in ((write, f"{i}_mlp_out"), (product.T, f"{i + 1}_pre" if i < 2 else "final_post")):
            index = spectra.outputs.index(label)
            left, values, _ = torch.linalg.svd(matrix)
            assert oracles.relative_error(spectra.values[index], values) < 1e-9
            signs = torch.where(left.T @ (matrix @ embedding[3]) < 0, -1.0, 1.0).double()
            assert oracles.relative_error(spectra.left[index], signs[:, None] * left.T) < 1e-9
    layers = detached_spectra(model, tokens, k=4, maps="layers")
    expected = torch.stack([torch.linalg.svdvals(weight)[:4] for weight in weights])
    found = torch.stack([layers.values[layers.labels.index(f"{i}_pre > {i}_mlp_out")] for i in range(3)])
    assert oracles.relative_error(found, expected) < 1e-9
    # All of the space explains everything; k random directions k / d_model of it on average.
    assert torch.allclose(spectra.explained, torch.ones(6, dtype=torch.float64)) and spectra.chance == 1.0
    best = detached_spectra(model, tokens, k=3).top_tokens(2)
    assert torch.equal(best.indices, spectra.left[:, :3].topk(2).indices)  # W_U is the identity


def test_chance_is_what_random_subspaces_reach():
    generator = torch.Generator().manual_seed(0)
    model, *_ = linear_network(d_model=24)
    spectra = detached_spectra(model, torch.tensor([[1, 3]]), k=6)
    bases = [torch.linalg.qr(torch.randn(24, 6, generator=generator, dtype=torch.float64)).Q for _ in range(400)]
    overlaps = [float((basis.T @ spectra.left[-1].T).square().sum() / 6) for basis in bases]
    shares = [float((basis.T @ spectra.final).square().sum() / spectra.final.square().sum()) for basis in bases]
    assert sum(overlaps) / 400 == pytest.approx(spectra.chance, abs=0.01)
    assert sum(shares) / 400 == pytest.approx(spectra.chance, abs=0.02)


def test_pairs_and_tables(model):
    network = ResidualNetwork(model)
    pairs = [("1_pre", "1_attn_out"), ("embed", "L1H2_out"), ("1_pre", "final_post")]
    spectra = detached_spectra(network, "w5 w6 w7", maps=pairs, k=2)
    assert spectra.labels == ["1_pre > 1_attn_out", "embed > L1H2_out", "1_pre > final_post"]
    head = detached_jacobian(network, "w5 w6 w7", output="L1H2_out", ordinary=False).svd(2)
    assert oracles.relative_error(spectra.values[1], head.values) < 1e-9
    table = spectra.to_dataframe(k=3)
    assert list(table.columns) == [
        *("wrt", "output", "vector", "value", "relative", "stable_rank", "explained", "explained_own", "overlap"),
        *("chance", "top_tokens"),
    ]
    assert len(table) == 3 * 2 and len(table.top_tokens[0]) == 3 and table.relative[0] == 1
    assert "DetachedSpectra(3 maps" in repr(spectra)
    assert spectra.projections("1_attn_out")[0].diagonal().allclose(torch.ones(2, dtype=torch.float64))
    assert torch.equal(spectra.overlap(-2), spectra.overlap("embed > L1H2_out"))


def test_the_way_of_the_leading_directions():
    """In the coordinates of the last map: of a network of known matrices, by hand."""
    model, weights, embedding = linear_network()
    eye = torch.eye(12, dtype=torch.float64)
    spectra = detached_spectra(model, torch.tensor([[4, 2, 3]]), k=3)
    path = spectra.projection_path()
    assert list(path.columns) == ["wrt", "output", "vector", "onto_0", "onto_1", "inside", "chance", "top_token"]
    assert path.output.tolist() == [output for output in spectra.outputs for _ in range(2)]
    products = [(eye + weights[0]).T, ((eye + weights[0]) @ (eye + weights[1]) @ (eye + weights[2])).T]
    first, last = (torch.linalg.svd(product)[0][:, :2].T for product in products)
    for lefts, product in zip((first, last), products, strict=True):
        lefts *= torch.where(lefts @ product @ embedding[3] < 0, -1.0, 1.0).double()[:, None]
    found = torch.tensor(path[path.output == "1_pre"][["onto_0", "onto_1"]].to_numpy())
    assert oracles.relative_error(found, first @ last.T) < 1e-9
    inside = torch.tensor(path[path.output == "1_pre"].inside.to_numpy())
    assert oracles.relative_error(inside, (first @ last.T @ last).square().sum(1)) < 1e-9
    assert path.chance.unique().tolist() == [2 / 12]
    assert path.top_token.tolist() == spectra.left[:, :2].argmax(-1).flatten().tolist()  # W_U is the identity
    end = spectra.projection_path(onto="1_pre", n=1)
    assert end[end.output == "final_post"].onto_0.item() == pytest.approx(float(last[0] @ first[0]))
    for n in (0, 4):
        with pytest.raises(ValueError, match=r"n must lie in 1\.\.3"):
            spectra.projection_path(n=n)


def test_what_is_refused(model, as_users_run_it):
    tokens = zoo.tokens(model, batch=1, pos=4)
    for options, message in (
        ({"maps": "layer"}, "maps must be one of"),
        ({"maps": []}, "distinct pairs"),
        ({"maps": [("embed", "logits")]}, "streams and writes"),
        ({"maps": [("1_pre", "0_attn_out")]}, "must come after"),
        ({"k": 0}, "k must be an integer >= 1; got 0"),
        ({"pos": 4}, "pos must lie in -4..3"),
        ({"max_bytes": 1000}, "at most max_bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            detached_spectra(model, tokens, **options)
    with pytest.raises(ValueError, match="one prompt; got 2"):
        detached_spectra(model, zoo.tokens(model, batch=2))
    with pytest.raises(ValueError, match="onto must be"):
        detached_spectra(model, tokens, maps=[("embed", "1_pre")]).projections("2_pre")


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_a_trained_model():
    """Maps up to a layer lose dimensions, and their leading directions turn to the final ones."""
    spectra = detached_spectra(zoo.load_stories("bridge"), "Once upon a time, there was a little girl", pos=-1)
    streams = [i for i, output in enumerate(spectra.outputs) if not output.endswith("_out")]
    ranks, overlaps = spectra.stable_rank[streams], spectra.overlap()[streams]
    assert float(ranks[0]) > float(ranks[-1]) and float(ranks[-1]) < 5
    assert bool((overlaps[1:] > overlaps[:-1]).all())
    assert float(spectra.explained[-1]) > 4 * spectra.chance


def test_spectra_save_and_load(model, tmp_path):
    tokens = zoo.tokens(model, batch=1, pos=4)
    spectra = detached_spectra(model, tokens, maps="layers", k=2, position=2)
    found = tl_jets.load(spectra.save(tmp_path / "spectra.safetensors"))
    assert found.labels == spectra.labels and torch.equal(found.overlap(), spectra.overlap())
    assert set(found.to_dataframe()["top_tokens"]) == {None} and found.projection_path()["top_token"].isna().all()
    with pytest.raises(ValueError, match="Tokens of directions need the model"):
        found.top_tokens()
    assert found.with_model(model, tokens).to_dataframe().equals(spectra.to_dataframe())
    for other in (tokens.flip(1), tokens[:, :2]):
        with pytest.raises(ValueError, match="the whole input"):
            found.with_model(model, other)
    other = zoo.fresh(zoo.ModelSpec("gpt2", "bridge", "raw"), seed=1)
    with pytest.raises(ValueError, match="the weights of before"):
        found.with_model(other, tokens)
