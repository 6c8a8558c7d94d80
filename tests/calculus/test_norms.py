"""Norms and their jets in closed form, against norms written out and differentiated by others."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import contour_coefficients, layer_norm, nested_jvp_coefficients, relative_error, rms_norm
from torch import Tensor

from tl_jets.calculus import Norm, center_scale, jet, norm_jet

TOLERANCE = 1e-10
D_MODEL = 6


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS, EPS = randn(D_MODEL, seed=5), randn(D_MODEL, seed=6), 0.02
X = randn(2, 3, D_MODEL, seed=1) + 0.7
NEAR, FAR = X + 0.5 * randn(2, 3, D_MODEL, seed=2), X + 9 * randn(2, 3, D_MODEL, seed=4)
BY_HAND = {
    "LN": lambda x: layer_norm(x, WEIGHT, BIAS, EPS),
    "RMS": lambda x: rms_norm(x, WEIGHT, BIAS, EPS),
    "none": lambda x: x * WEIGHT + BIAS,
}
NORMS = {kind: Norm(kind, WEIGHT, BIAS, EPS) for kind in ("LN", "RMS", "none")}
kinds = pytest.mark.parametrize("kind", ["LN", "RMS", "none"])


@kinds
def test_a_norm_is_the_norm(kind):
    assert relative_error(NORMS[kind](X), BY_HAND[kind](X)) < TOLERANCE


@kinds
def test_a_norm_without_weight_and_bias(kind):
    plain = {"LN": layer_norm(X), "RMS": rms_norm(X), "none": X}[kind]
    assert relative_error(Norm(kind)(X), plain) < TOLERANCE


@kinds
@pytest.mark.parametrize("variate", [NEAR, FAR], ids=["near", "far"])
@pytest.mark.parametrize("order", range(7))
def test_coefficients(kind, variate, order):
    jets = norm_jet(NORMS[kind], X, variate, order)
    # The far variate has rho above 1: a contour around the center must be that much smaller.
    shrink = 0.05 if variate is FAR else 1.0
    line = torch.stack([X, (variate - X) * shrink])
    expected = contour_coefficients(BY_HAND[kind], line, order, points=64)
    powers = shrink ** torch.arange(order + 1, dtype=torch.float64)
    found = jets.coefficients() * powers[:, None, None, None]
    assert relative_error(found, expected) < TOLERANCE
    if order <= 3:
        assert relative_error(jets.coefficients(), nested_jvp_coefficients(BY_HAND[kind], X, variate - X, order)) < 1e-9
    assert jets.order == order
    assert jets.alpha.shape == jets.beta.shape == jets.tail_bound.shape == (order + 1, 2, 3)
    assert jets.rho.shape == (2, 3)


@kinds
def test_values_are_partial_sums_and_mixtures(kind):
    norm = NORMS[kind]
    jets = norm_jet(norm, X, NEAR, 6)
    sums = jets.coefficients().cumsum(0)
    for k in range(7):
        assert relative_error(jets.value(k), sums[k]) < TOLERANCE
        mixture = jets.alpha[k, ..., None] * norm.center(X) + jets.beta[k, ..., None] * norm.center(NEAR)
        assert relative_error(jets.value(k), mixture * WEIGHT + BIAS) < TOLERANCE
    assert torch.equal(jets.value(), jets.value(6))
    assert relative_error(jets.value(0), BY_HAND[kind](X)) < TOLERANCE


@kinds
def test_the_series_of_the_same_function_agrees(kind):
    assert relative_error(
        norm_jet(NORMS[kind], X, NEAR, 5).coefficients(), jet(NORMS[kind], X, NEAR, 5).coefficients
    ) < (TOLERANCE)


def test_without_a_norm_the_jet_is_the_identity():
    jets = norm_jet(Norm("none"), X, NEAR, 3)
    assert jets.alpha[:, 0, 0].tolist() == [1, 0, 0, 0]
    assert jets.beta[:, 0, 0].tolist() == [0, 1, 1, 1]
    assert (jets.rho == 0).all()
    assert (jets.tail_bound[1:] == 0).all()
    assert torch.allclose(jets.tail_bound[0], (NEAR - X).square().mean(-1).sqrt())
    assert torch.equal(jets.value(1), NEAR)


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_rho_and_the_tail_bound(kind):
    norm = Norm(kind, eps=EPS)
    jets = norm_jet(norm, X, NEAR, 8)
    x, y = norm.center(X), norm.center(NEAR)
    rho = ((y - x).square().mean(-1) / (x.square().mean(-1) + EPS)).sqrt()
    assert relative_error(jets.rho, rho) < TOLERANCE
    for k in range(9):
        left = (norm(NEAR) - jets.value(k)).square().mean(-1).sqrt()
        assert (left <= jets.tail_bound[k] * (1 + 1e-9) + 1e-12).all()
    assert torch.isinf(norm_jet(norm, X, FAR, 2).tail_bound).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 0.95), st.floats(0, math.pi), st.integers(0, 8))
def test_the_tail_bound_holds_at_every_angle(seed, rho, angle, order):
    frame = torch.linalg.qr(randn(D_MODEL, 2, seed=seed))[0]
    x = frame[:, 0] * 3
    y = x + 3 * rho * (math.cos(angle) * frame[:, 0] + math.sin(angle) * frame[:, 1])
    jets = norm_jet(Norm("RMS", eps=0.0), x, y, order)
    left = (rms_norm(y, eps=0.0) - jets.value()).square().mean().sqrt()
    assert jets.rho.item() == pytest.approx(rho, abs=1e-12)
    assert left <= jets.tail_bound[-1] * (1 + 1e-9) + 1e-13


def test_numbers_are_float64_inside_whatever_comes_in():
    x, y = X.float(), (X + 1e-3 * NEAR).float()
    jets = norm_jet(Norm("LN", eps=EPS), x, y, 4)
    exact = norm_jet(Norm("LN", eps=EPS), x.double(), y.double(), 4)
    for name in ("alpha", "beta", "rho", "tail_bound", "center", "variate"):
        assert getattr(jets, name).dtype == torch.float32
        assert torch.equal(getattr(jets, name), getattr(exact, name).float())
    assert norm_jet(Norm("LN"), x, y, 2, dtype=torch.float64).alpha.dtype == torch.float64


def test_scaling_and_shifting_center_and_variate_together():
    jets = norm_jet(Norm("LN", eps=0.0), X, NEAR, 4)
    other = norm_jet(Norm("LN", eps=0.0), 7 * X + 3, 7 * NEAR + 3, 4)
    assert relative_error(jets.coefficients(), other.coefficients()) < TOLERANCE
    assert relative_error(jets.rho, other.rho) < TOLERANCE


# Center scaling. ----------------------------------------------------------------------------------------------------


@kinds
def test_matched_and_orthogonal_centers(kind):
    norm = Norm(kind, eps=0.0)
    near = X + 0.3 * (NEAR - X)
    x, y = norm.center(X), norm.center(near * 5)
    cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    assert (cosine > 0).all()
    assert torch.equal(center_scale(norm, X, NEAR, "none"), torch.ones(2, 3, dtype=torch.float64))
    matched = center_scale(norm, X, near * 5, "match")
    assert relative_error((x * matched[..., None]).norm(dim=-1), y.norm(dim=-1)) < TOLERANCE
    orthogonal = center_scale(norm, X, near * 5, "orthogonal")
    assert ((y - x * orthogonal[..., None]) * y).sum(-1).abs().max() < 1e-9
    if kind != "none":
        rho = norm_jet(norm, X * matched[..., None], near * 5, 0).rho
        assert relative_error(rho, 2 * torch.sin(torch.arccos(cosine) / 2)) < TOLERANCE
        rho = norm_jet(norm, X * orthogonal[..., None], near * 5, 0).rho
        assert relative_error(rho, torch.sin(torch.arccos(cosine))) < TOLERANCE


def test_center_scale_never_gives_nan():
    norm = Norm("RMS")
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert center_scale(norm, x, y, "match").tolist() == [1, 3, 2, 0, 1]
    assert center_scale(norm, x, y, "orthogonal").tolist() == [1, 3, 2, 0, 1]
    assert center_scale(norm, x, y, "none").tolist() == [1, 1, 1, 1, 1]
    assert center_scale(norm, x[:1], y[:1], "orthogonal", obtuse="raise").tolist() == [1]
    with pytest.raises(ValueError, match=r"acute angle to its variate; 3 of 5 have x\.y <= 0"):
        center_scale(norm, x, y, "orthogonal", obtuse="raise")
    assert center_scale(norm, x.half(), y.half(), "match").dtype == torch.float16


# Errors. ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_refused():
    norm = NORMS["LN"]
    with pytest.raises(ValueError, match=r"kind is one of LN, RMS, none; got 'LNPre'"):
        Norm("LNPre")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eps is at least 0; got -1"):
        Norm("LN", eps=-1)
    with pytest.raises(ValueError, match=r"order must be an integer >= 0"):
        norm_jet(norm, X, NEAR, -1)
    with pytest.raises(TypeError, match=r"order must be an integer >= 0; got 1\.5"):
        norm_jet(norm, X, NEAR, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one shape; got \[2, 3, 6\] and \[3, 6\]"):
        norm_jet(norm, X, NEAR[0], 1)
    with pytest.raises(ValueError, match=r"1 of 2 centers are zero"):
        norm_jet(Norm("LN", eps=0.0), torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match=r"order lies in 0 .. 2; got 3"):
        norm_jet(norm, X, NEAR, 2).value(3)
    with pytest.raises(ValueError, match=r"mode is one of none, match, orthogonal; got 'paper'"):
        center_scale(norm, X, NEAR, "paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"obtuse is 'match' or 'raise'"):
        center_scale(norm, X, NEAR, "match", obtuse="ignore")  # type: ignore[arg-type]


def test_norms_print_what_they_are():
    assert repr(norm_jet(NORMS["LN"], X, NEAR, 2)) == "NormJet(kind='LN', order=2, batch=[2, 3])"
