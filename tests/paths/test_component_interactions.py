"""Interactions against Hessians by nested differentiation, jets of the model's own final norm, and their control."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork
from tl_jets.calculus import full_precision, jet
from tl_jets.paths import component_interactions
from tl_jets.paths.component_interactions import interactions

D, V, BATCH, POS = 6, 11, 2, 3
TOKENS = torch.tensor([[1, 7, 3], [0, 10, 4]])
TOLERANCE = 1e-10
EPS = 1e-2


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS = 1 + normal(D, seed=1, scale=0.3), normal(D, seed=2, scale=0.3)
NORMS = {"LN": oracles.layer_norm, "RMS": oracles.rms_norm}


def network(kind: str) -> ResidualNetwork:
    decoder = Decoder(Norm(kind, weight=WEIGHT, bias=BIAS, eps=EPS), W_U=normal(D, V, seed=3), b_U=normal(V, seed=4))
    table = normal(V, D, seed=5)
    stages = [{"0_attn": lambda x: torch.tanh(x @ normal(D, D, seed=6)), "0_mlp": lambda x: torch.sin(x + 1)}]
    return ResidualNetwork(CallableModel(lambda tokens: table[tokens], stages, decoder))


def direction(net: ResidualNetwork, token: int) -> Tensor:
    """The column of a centered logit."""
    return net.decoder.W_U[:, token] - net.decoder.W_U.mean(1)


def by_hessians(kind: str, g: Tensor, sources: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """I at one position: all sources [source, d_model] but the last are centers."""

    def logit(x: Tensor) -> Tensor:
        return NORMS[kind](x, WEIGHT, BIAS, EPS) @ g

    total = torch.zeros(len(sources), len(sources), dtype=torch.float64)
    for i, (w, c) in enumerate(zip(weights, scales, strict=True)):
        hessian = torch.autograd.functional.hessian(logit, c * sources[i])
        parts = sources.clone()
        parts[i] *= 1 - c
        total += w / 2 * parts @ hessian @ parts.T
    return total


@pytest.mark.parametrize("center_scale", ["none", "match", "orthogonal"])
@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_every_pair_against_nested_differentiation(kind, center_scale):
    """Two of three components, so that the rest counts; unequal weights by position; a target a position."""
    net = network(kind)
    trace = net.trace(TOKENS)
    weights = torch.rand(2, BATCH, POS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights / weights.sum(0)
    ids = torch.tensor([[2, 5], [0, 9]])
    labels = ["embed", "0_mlp_out"]
    found = interactions(
        net, trace, targets=ids, centers=labels, positions=[0, 2], weights=weights, center_scale=center_scale
    )
    assert found.labels == [*labels, "rest"] and found.matrix.shape == (3, 3, 2, 2)
    center = (lambda x: x - x.mean(-1, keepdim=True)) if kind == "LN" else (lambda x: x)
    for b in range(2):
        for p, pos in enumerate([0, 2]):
            x = torch.stack([trace[label][b, pos] for label in labels])
            h = trace["final_post"][b, pos]
            sources = torch.cat([x, (h - x.sum(0))[None]])
            cx, ch = center(x), center(h)
            scales = torch.ones(2, dtype=torch.float64)
            if center_scale == "match" or (center_scale == "orthogonal"):
                match = ch.norm() / cx.norm(dim=-1)
                orthogonal = ch @ ch / (cx @ ch)
                scales = torch.where(cx @ ch > 0, orthogonal, match) if center_scale == "orthogonal" else match
            wanted = by_hessians(kind, direction(net, int(ids[b, p])), sources, weights[:, b, pos], scales)
            assert oracles.relative_error(found.matrix[..., b, p], wanted) < TOLERANCE
            assert float(wanted.abs().max()) > 1e-3
            # Its sum is the second-degree term of the jets, in Taylor arithmetic.
            f = lambda y: NORMS[kind](y, WEIGHT, BIAS, EPS) @ direction(net, int(ids[b, p]))  # noqa: B023, E731
            jets = [jet(f, c * y, h, 2).coefficients for c, y in zip(scales, x, strict=True)]
            degrees = sum(w * c for w, c in zip(weights[:, b, pos], jets, strict=True))
            assert oracles.relative_error(found.matrix[..., b, p].sum(), degrees[2]) < TOLERANCE
            assert oracles.relative_error(found.degrees[:, b, p], degrees) < TOLERANCE
            assert oracles.relative_error(found.term[b, p], degrees[2]) < TOLERANCE
    assert torch.equal(found.matrix, found.matrix.transpose(0, 1))


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_the_control_is_random_but_for_lengths_and_angles(kind, monkeypatch):
    net = network(kind)
    trace = net.trace(TOKENS)
    seen, own = [], component_interactions._matrix

    def spy(norm: Norm, sources: Tensor, *rest: Any) -> Tensor:
        seen.append(sources)
        return own(norm, sources, *rest)

    monkeypatch.setattr(component_interactions, "_matrix", spy)
    found = interactions(net, trace, targets=4, positions=None, center_scale="none")
    (sources, random), h = seen, trace["final_post"].flatten(0, 1)
    center = (lambda x: x - x.mean(-1, keepdim=True)) if kind == "LN" else (lambda x: x)
    for function in (lambda x: center(x).norm(dim=-1), lambda x: (center(x) * center(h)).sum(-1)):
        torch.testing.assert_close(function(random), function(sources), rtol=1e-10, atol=1e-10)
    assert float((random - center(sources))[:-1].norm(dim=-1).min()) > 0.01  # the rest is rounding here
    for b, p in ((0, 1), (1, 2)):
        row = b * POS + p
        third = torch.full((3,), 1 / 3, dtype=torch.float64)
        wanted = by_hessians(kind, direction(net, 4), random[:, row], third, torch.ones(3))
        assert oracles.relative_error(found.control[..., b, p], wanted) < TOLERANCE
    again, other = (
        interactions(net, trace, targets=4, positions=None, center_scale="none", seed=seed) for seed in (0, 1)
    )
    assert torch.equal(found.control, again.control) and not torch.allclose(found.control, other.control)
    assert torch.equal(found.matrix, other.matrix)


@pytest.mark.parametrize(
    "spec", [s for s in zoo.available([*zoo.CORE, "no_norm", "bloom", "cohere"]) if s.processing == "raw"], ids=str
)
def test_sums_are_the_jets_of_the_models_own_final_norm(spec):
    """Left-padded batches (where the model takes them), heads, both worlds; the norm is the model's module."""
    model = zoo.build(spec)
    tokens, mask = zoo.padded(model)
    if (spec.world, spec.name) in {(s.world, s.name) for s in zoo.NAN_UNDER_LEFT_PADDING}:
        model = zoo.build(spec, torch.float32)
    net = ResidualNetwork(model)
    trace = net.trace(tokens, attention_mask=mask)
    found = interactions(net, trace, granularity="head", positions=[1, 4, -1], minus=7, center_scale="none")
    heads = net.at("head")
    assert found.labels == [*heads.components, "rest"]
    fine, h = heads.trace(tokens, attention_mask=mask), trace["final_post"]
    # Positions count among real tokens, which the second prompt has only four of.
    real = [row.nonzero()[:, 0] for row in mask.bool()]
    cells = torch.stack([row[[1, min(4, len(row) - 1), -1]] for row in real])
    assert found.valid.tolist() == [[True] * 3, [True, False, True], [True] * 3]

    def at(values):
        return torch.stack([values[b, cells[b]] for b in range(len(cells))])

    best = at(trace.logits).argmax(-1)
    assert torch.equal(found.target_ids[..., 0][found.valid], best[found.valid])
    final = getattr(model, "ln_final", None) or (lambda x: x)
    scale = 1.0
    if spec.name == "cohere":  # its logit scale, by the model's own code
        scale = float(model.adapter.apply_output_logits_transform(torch.ones(1, dtype=torch.float64)))
        assert scale == 0.5
    W_U = scale * net.decoder.W_U
    with full_precision():
        total = sum(jet(final, fine[label], h, 2).coefficients[2] for label in heads.components) / len(heads.components)
    wanted = torch.einsum("bpd,dbp->bp", at(total), W_U[:, best] - W_U[:, 7, None, None])
    keep = found.valid
    tolerance = TOLERANCE if h.dtype is torch.float64 else 3e-5
    assert oracles.relative_error(found.matrix.sum((0, 1))[keep].to(wanted), wanted[keep]) < tolerance
    assert not bool(keep.all()) and bool(found.matrix[:, :, ~keep].isnan().all())
    # The rest of a whole set of components is rounding.
    assert float(found.matrix[-1][..., keep].abs().max()) < 1e3 * tolerance * (
        1 + float(found.matrix[..., keep].abs().max())
    )
    if spec.name != "gemma2":  # a softcap bends the model's own logits
        own = trace.logits.gather(-1, trace.logits.argmax(-1, keepdim=True))[..., 0] - trace.logits[..., 7]
        assert oracles.relative_error(found.logit[keep].to(own), at(own)[keep]) < max(tolerance, 1e-9)
    # A prompt alone, without padding, has the same matrix, and the same control.
    row = tokens[1][mask[1].bool()][None]
    alone = interactions(net, row, granularity="head", minus=7, center_scale="none")
    assert oracles.relative_error(alone.matrix[..., 0, 0], found.matrix[..., 1, -1]) < max(100 * tolerance, 1e-8)
    assert oracles.relative_error(alone.control[..., 0, 0], found.control[..., 1, -1]) < max(100 * tolerance, 1e-8)


@pytest.mark.parametrize("world", sorted({spec.world for spec in zoo.available(["gpt2"])}))
def test_folding_norms_changes_no_interaction(world):
    """Folded in float32 by TransformerLens: 1e-6. The embeddings and writes are centered, which the norm does not see."""
    raw, processed = (
        interactions(
            zoo.build(zoo.ModelSpec("gpt2", world, processing)),
            torch.tensor([[5, 9, 30, 12]]),
            targets=8,
            center_scale="none",
        )
        for processing in ("raw", "processed")
    )
    assert oracles.relative_error(processed.matrix, raw.matrix) < 1e-5
    assert float(raw.matrix.abs().max()) > 0.1


def test_differences_of_logits_edits_and_terms_as_components():
    model = zoo.build(zoo.available(["gpt2"])[0])
    net = ResidualNetwork(model)
    tokens = zoo.tokens(model)
    one, other, both = (interactions(net, tokens, targets=t, minus=m) for t, m in ((3, None), (8, None), (3, 8)))
    assert oracles.relative_error(both.matrix, one.matrix - other.matrix) < 1e-12
    assert oracles.relative_error(both.logit, one.logit - other.logit) < 1e-12
    assert both.target_ids.shape == (3, 1, 2) and both.target_names == [3, 8]
    with model.hooks([("blocks.1.hook_resid_pre", lambda stream, hook: stream + 1)]):
        edited = interactions(net, tokens)
    assert edited.labels[-2:] == ["edit:blocks.1.hook_resid_pre", "rest"] and edited.target_names == ["<answer>"]
    assert float(edited.matrix[-1].abs().max()) < 1e-9


def test_tables_put_the_largest_pairs_first():
    net = network("LN")
    found = interactions(net, TOKENS, targets=4, minus=2, positions=[-1, 0])
    table = found.to_dataframe()
    assert list(table.columns) == ["first", "second", "batch", "pos", "token", "target", "effect", "control"]
    assert len(table) == 10 * 4 and set(table["pos"]) == {0, 2} and set(table["target"]) == {"4 - 2"}
    assert table["effect"].abs().is_monotonic_decreasing
    for (b, pos), part in table.groupby(["batch", "pos"]):
        assert abs(part["effect"].sum() - float(found.term[b, found.positions.index(pos)])) < 1e-10
    row = table[
        (table["first"] == "embed") & (table["second"] == "0_mlp_out") & (table["batch"] == 1) & (table["pos"] == 0)
    ]
    assert float(row["effect"].iloc[0]) == pytest.approx(2 * float(found.matrix[0, 2, 1, 1]))
    average = found.average()
    assert average["size"].is_monotonic_decreasing and len(average) == 10
    assert average["effect"].sum() == pytest.approx(float(found.term.mean()))
    assert "Interactions(3 components and rest, 2 prompts at [2, 0]; of 4 - 2" in repr(found)
    assert len(str(found).splitlines()) == 12


def test_no_norm_has_no_interactions():
    found = interactions(network("none"), TOKENS)
    assert float(found.matrix.abs().max()) == 0 == float(found.control.abs().max())


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_refused():
    net = network("LN")
    with pytest.raises(ValueError, match="one target a position"):
        interactions(net, TOKENS, targets=[3, 4])
    with pytest.raises(ValueError, match="weights must be 'uniform' or numbers"):
        interactions(net, TOKENS, weights="optimal")
    with pytest.raises(ValueError, match="A center's label must be"):
        interactions(net, TOKENS, centers=["embd"])
    with pytest.raises(ValueError, match="positions must lie in"):
        interactions(net, TOKENS, positions=3)
