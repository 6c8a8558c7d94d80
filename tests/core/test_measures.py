"""Measures against materialised logits, and the random center that every measure stands beside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tl_jets.core.decoder as decoder_module
from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.measures import (
    MEASURES,
    Measures,
    geometry,
    geometry_in_plane,
    random_directions,
    split_along,
)

D, V, LAYERS, ORDERS, ROWS = 7, 40, 3, 2, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decoder(kind: str, *, plain: bool = False) -> Decoder:
    weight, bias = (None, None) if plain else (1 + 0.3 * normal(D, seed=1), normal(D, seed=2))
    return Decoder(norm=Norm(kind, weight=weight, bias=bias), W_U=normal(D, V, seed=3), b_U=normal(V, seed=4) - 30)


def wanted(truth: Tensor, lens: Tensor) -> dict[str, Tensor]:
    centered = [value - value.mean(-1, keepdim=True) for value in (truth, lens)]
    return {
        "remainder_norm": (truth - lens).norm(dim=-1) / truth.norm(dim=-1).expand(lens.shape[:-1]),
        "cosine": F.cosine_similarity(truth, lens, dim=-1),
        "centered_cosine": F.cosine_similarity(*centered, dim=-1),
    }


@pytest.fixture(params=["by logits", "by the metric"])
def way(request, monkeypatch):
    """Both ways to take inner products of logits, whatever the number of vectors; chunks of several columns."""
    monkeypatch.setattr(decoder_module, "FEW_VECTORS", 0 if request.param == "by logits" else V)
    monkeypatch.setattr(decoder_module, "PANEL", 9)
    monkeypatch.setattr(decoder_module, "FEW_ELEMENTS", 9 * (D + 1))
    return request.param


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["LN", "RMS", "none"])
def test_geometry_in_the_plane_of_the_jet(kind, plain, control, way):
    """Six inner products give what full logits give; also where a lens borrows nothing, or is the model."""
    dec = decoder(kind, plain=plain)
    centers, variate = normal(LAYERS, ROWS, D, seed=5), normal(ROWS, D, seed=6)
    alpha, beta, gamma = (
        normal(*shape, seed=7 + i) for i, shape in enumerate([(LAYERS, ORDERS, ROWS)] * 2 + [(ROWS,)])
    )
    beta[:, 0] = 0
    alpha[1, 1], beta[1, 1] = 0, gamma
    plane = split_along(dec.norm, centers, variate)
    random = random_directions(dec.norm, variate, (), torch.arange(ROWS), seed=3) if control else None
    found = geometry_in_plane(dec, plane, random, alpha, beta, gamma)[-1]
    if control:
        centers = plane.along[..., None] * plane.variate + plane.across[..., None] * random
    x, y = (dec.norm.scale(dec.norm.center(value)) for value in (centers, variate))
    constant = dec.b_U if dec.norm.bias is None else dec.norm.bias @ dec.W_U + dec.b_U
    own, borrowed = alpha[..., None] * (x @ dec.W_U)[:, None], beta[..., None] * (y @ dec.W_U)
    truth, lens = gamma[:, None] * (y @ dec.W_U) + constant, own + borrowed + constant
    for name, value in wanted(truth, lens).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-7 if name == "remainder_norm" else 1e-10)
    lengths = [(part - part.mean(-1, keepdim=True)).norm(dim=-1) for part in (own, borrowed)]
    torch.testing.assert_close(found["borrowed_share"], lengths[1] / (lengths[0] + lengths[1]), rtol=1e-10, atol=1e-10)
    assert not bool(found["borrowed_share"][:, 0].any()) and bool((found["borrowed_share"][1, 1] == 1).all())
    assert bool(dec._metrics) == (way == "by the metric")


@pytest.mark.parametrize("kind", ["LN", "RMS"])
@pytest.mark.usefixtures("way")
def test_geometry_of_any_states(kind):
    dec = decoder(kind)
    states, truth = normal(LAYERS, ROWS, D, seed=5), normal(ROWS, D, seed=6)
    found, lengths = geometry(dec, states, truth, truth, states[0])
    for name, value in wanted(dec.logits(truth), dec.logits(states)).items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
    for part, length in zip((truth, states[0]), lengths, strict=True):
        logits = part @ dec.W_U
        torch.testing.assert_close(length, (logits - logits.mean(-1, keepdim=True)).norm(dim=-1))


@pytest.mark.parametrize("kind", ["LN", "RMS", "none"])
def test_split_along(kind):
    norm = Norm(kind)
    centers, variate = normal(LAYERS, ROWS, D, seed=5), normal(ROWS, D, seed=6)
    plane = split_along(norm, centers, variate)
    x, y = (value - value.mean(-1, keepdim=True) if kind == "LN" else value for value in (centers, variate))
    torch.testing.assert_close(plane.along[..., None] * y + plane.orthogonal, x)
    torch.testing.assert_close((plane.orthogonal * y).sum(-1), torch.zeros(LAYERS, ROWS, dtype=torch.float64))
    torch.testing.assert_close(plane.across, plane.orthogonal.norm(dim=-1))


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_random_directions(kind):
    """Unit length, orthogonal to the variate, centered for LayerNorm; otherwise random, center by center."""
    norm, variate, places = Norm(kind), normal(400, 64, seed=6), torch.arange(400)
    found = random_directions(norm, variate, (2,), places, seed=0)
    y = norm.center(variate)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 400, dtype=torch.float64))
    assert float((found * y).sum(-1).abs().max()) < 1e-12
    if kind == "LN":
        assert float(found.mean(-1).abs().max()) < 1e-12
    # Two random directions of 64 dimensions have cosines of about 1/8.
    for one, other in ((found[0], found[1]), (found[0, 1:], found[0, :-1])):
        assert float((one * other).sum(-1).square().mean().sqrt()) == pytest.approx(1 / 8, rel=0.2)
    assert float(found.mean((0, 1)).abs().max()) < 0.03


def test_random_directions_belong_to_seed_and_place():
    """A place's draw does not depend on which others are asked for: slices and batches share it."""
    norm, variate = Norm("RMS"), normal(6, D, seed=6)
    whole = random_directions(norm, variate, (3,), torch.arange(6), seed=1)
    part = random_directions(norm, variate[[4, 1]], (3,), torch.tensor([4, 1]), seed=1)
    assert torch.equal(part, whole[:, [4, 1]])
    other = random_directions(norm, variate, (3,), torch.arange(6), seed=2)
    assert float((other - whole).abs().min()) > 0


def test_measures_average_over_real_positions():
    values = {name: normal(2, 3, 4, seed=i) for i, name in enumerate(MEASURES)}
    for value in values.values():
        value[:, 1, 2:] = torch.nan
    measures = Measures(**values)
    for name, mean in measures.mean().items():
        flat = [[v for v in row.flatten().tolist() if v == v] for row in values[name]]
        assert mean.tolist() == pytest.approx([sum(row) / len(row) for row in flat])
    assert [name for name, _ in measures.items()] == list(MEASURES)
    assert torch.equal(measures.map(torch.neg).kl.nan_to_num(), -values["kl"].nan_to_num())


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_a_final_stream_of_nothing_has_a_plane_and_a_control(kind):
    """Zero (or, centered, a constant) has no direction: nothing lies along it, and a random direction is still one."""
    variate = normal(ROWS, D, seed=6)
    variate[2] = 0 if kind == "RMS" else 1
    norm = Norm(kind)
    directions = random_directions(norm, variate, (), torch.arange(ROWS), seed=3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(ROWS, dtype=torch.float64))
    centers = normal(LAYERS, ROWS, D, seed=5)
    plane = split_along(norm, centers, variate)
    assert plane.along.isfinite().all() and not plane.along[:, 2].any()
    torch.testing.assert_close(plane.across[:, 2], norm.center(centers)[:, 2].norm(dim=-1))
