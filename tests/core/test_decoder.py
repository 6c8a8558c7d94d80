"""The decoder and its metric against materialised logits."""

from __future__ import annotations

import dataclasses

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_jets.core.decoder as decoder_module
from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder


def make_decoder(d_model=6, d_vocab=23, *, offset=-30.0, dtype=torch.float64, tied=False, seed=0, transform=None):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    W_U = draw(d_vocab, d_model).to(dtype).T if tied else draw(d_model, d_vocab).to(dtype)
    return Decoder(Norm("none"), W_U, (draw(d_vocab) + offset).to(dtype), transform)


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def materialised(decoder, states, bias_weight, centered):
    logits = states.double() @ decoder.W_U.double() + bias_weight.unsqueeze(-1) * decoder.b_U.double()
    return logits - logits.mean(-1, keepdim=True) if centered else logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logits(dtype, tied):
    decoder = make_decoder(dtype=dtype, tied=tied)
    states, weight = draw(2, 3, 6).to(dtype), draw(2, 3, seed=2)
    expected = torch.einsum("bpd,dv->bpv", states.double(), decoder.W_U.double())
    expected = expected + torch.einsum("bp,v->bpv", weight, decoder.b_U.double())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    logits = decoder.logits(states, weight)
    assert logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        decoder.logits(states) - decoder.logits(states, 0.0), decoder.b_U.to(logits).expand_as(logits)
    )


def test_logits_are_additive_and_differentiable():
    decoder = make_decoder(transform=lambda x: 3 * torch.tanh(x / 3))
    x, weight = draw(4, 6).requires_grad_(), draw(4, seed=3).requires_grad_()
    logits = decoder.logits(x, weight)
    logits.sum().backward()
    torch.testing.assert_close(x.grad, decoder.W_U.sum(1).expand(4, 6))
    torch.testing.assert_close(weight.grad, decoder.b_U.sum().expand(4))


@pytest.mark.parametrize("centered", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    d_model=st.integers(1, 9),
    d_vocab=st.integers(2, 70),
    chunk=st.integers(1, 400),
    panel=st.integers(1, 12),
    tied=st.booleans(),
)
def test_metric_is_the_geometry_of_logits(centered, d_model, d_vocab, chunk, panel, tied):
    decoder = make_decoder(d_model, d_vocab, tied=tied)
    before = decoder_module.CONVERTED_ELEMENTS, decoder_module.PANEL
    decoder_module.CONVERTED_ELEMENTS, decoder_module.PANEL = chunk, panel
    try:
        metric = decoder.metric(centered)
    finally:
        decoder_module.CONVERTED_ELEMENTS, decoder_module.PANEL = before
    x, y, s, t = draw(3, 4, d_model), draw(4, d_model, seed=2), draw(3, 4, seed=3), draw(4, seed=4)
    u, v = materialised(decoder, x, s, centered), materialised(decoder, y, t, centered)
    torch.testing.assert_close(metric.inner(x, y, s, t), (u * v).sum(-1), rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(metric.norm(x, s), u.norm(dim=-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(metric.cosine(x, y, s, t), torch.cosine_similarity(u, v, dim=-1), rtol=1e-8, atol=1e-8)


def test_metric_keeps_digits_under_a_large_offset():
    """The offset that all logits share must not cost the centered metric its digits."""
    decoder = make_decoder(offset=0.0)
    shifted = Decoder(decoder.norm, decoder.W_U + 1e5, decoder.b_U - 1e5)
    torch.testing.assert_close(shifted.metric(True).gram, decoder.metric(True).gram, rtol=1e-9, atol=1e-7)


def test_metric_is_made_once_it_costs_less_than_logits(monkeypatch):
    """Inner products of few vectors do not need it; what all calls asked for counts, until the weights change."""
    monkeypatch.setattr(decoder_module, "FEW_VECTORS", 1)
    decoder = make_decoder(offset=0.0)
    shifted = Decoder(decoder.norm, decoder.W_U + 1e5, decoder.b_U - 1e5)
    vectors = draw(2, 1, 7), draw(2, 7, seed=2)
    few = [made.grams(*vectors)[1] for made in (decoder, shifted)]
    torch.testing.assert_close(few[1], few[0], rtol=1e-9, atol=1e-6)
    assert not decoder._metrics and few[0][0][1].shape == (2, 2)
    torch.testing.assert_close(decoder.grams(*vectors)[1], few[0], rtol=1e-12, atol=1e-12)
    assert decoder._metrics
    decoder.W_U.mul_(2)
    by_hand = materialised(decoder, vectors[0][..., :-1], vectors[0][..., -1], False)
    torch.testing.assert_close(decoder.grams(vectors[0])[0][0][0], by_hand.square().sum(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metric_is_float64_whatever_the_weights(dtype):
    decoder = make_decoder(dtype=dtype)
    wide = Decoder(decoder.norm, decoder.W_U.double(), decoder.b_U.double())
    assert decoder.metric(True).gram.dtype == torch.float64
    for centered in (False, True):
        torch.testing.assert_close(decoder.metric(centered).gram, wide.metric(centered).gram, rtol=1e-13, atol=1e-11)


def test_metric_is_computed_once():
    decoder = make_decoder()
    assert decoder.metric(True) is decoder.metric(True)
    assert decoder.metric(False) is not decoder.metric(True)
    assert (decoder.metric(False).centered, decoder.metric(True).centered) == (False, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        decoder.W_U = decoder.W_U  # type: ignore[misc]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["W_U", "b_U"])
def test_metric_follows_weights_that_change_in_place(name, tied):
    """Through the parameter, of which the decoder has a detached view, too."""
    made = make_decoder(tied=tied)
    decoder = dataclasses.replace(made, **{name: getattr(made, name).requires_grad_().detach()})
    before = decoder.metric(True).gram
    with torch.no_grad():
        getattr(made, name).mul_(draw(made.d_vocab))
    wanted = Decoder(made.norm, made.W_U.detach().clone(), made.b_U.detach().clone())
    for centered in (False, True):
        assert torch.equal(decoder.metric(centered).gram, wanted.metric(centered).gram)
    assert (decoder.metric(True).gram - before).abs().max() > 0.1
    with torch.inference_mode():
        decoder = make_decoder()
        assert decoder.metric(True) is decoder.metric(True)


def test_project_converts_by_chunks(monkeypatch):
    monkeypatch.setattr(decoder_module, "CONVERTED_ELEMENTS", 30)
    decoder = make_decoder(dtype=torch.bfloat16)
    states, out = draw(5, 6, dtype=torch.float32), torch.zeros(5, 30)
    decoder.project(states, out[:, :23])
    torch.testing.assert_close(out[:, :23], states @ decoder.W_U.float())
    assert not out[:, 23:].any()


def test_a_transform_that_only_multiplies_is_a_logit_scale():
    """Its logits, projections, constants and geometry are multiplied; a softcap is kept as it is."""
    plain, states, bias = make_decoder(), draw(5, 6), draw(6)
    scaled = Decoder(plain.norm, plain.W_U, plain.b_U, lambda logits: logits / 16)
    assert (scaled.logit_scale, scaled.transform, scaled.unit) == (1 / 16, None, "logits")
    torch.testing.assert_close(scaled.logits(states, 0.3), plain.logits(states, 0.3) / 16, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(scaled.constant(bias, torch.float64), plain.constant(bias, torch.float64) / 16)
    out, half = torch.zeros(2, 5, 23, dtype=torch.float64), torch.zeros(5, 23)
    plain.project(states, out[0])
    scaled.project(states, out[1])
    scaled.project(states, half)
    torch.testing.assert_close(out[1], out[0] / 16, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(half.double(), out[0] / 16, rtol=1e-5, atol=1e-5)
    for centered in (False, True):
        torch.testing.assert_close(scaled.metric(centered).norm(states), plain.metric(centered).norm(states) / 16)
    again = dataclasses.replace(scaled, b_U=2 * plain.b_U)
    torch.testing.assert_close(again.logits(states, 0.5), plain.logits(states) / 16)
    capped = Decoder(plain.norm, plain.W_U, plain.b_U, lambda logits: 5 * torch.tanh(logits / 5))
    assert capped.logit_scale == 1 and capped.transform is not None and capped.unit == "logits before the softcap"


def test_constant():
    decoder, bias = make_decoder(), draw(6)
    torch.testing.assert_close(decoder.constant(bias, torch.float64), bias @ decoder.W_U + decoder.b_U)
    before = decoder.b_U.clone()
    torch.testing.assert_close(decoder.constant(None, torch.float64), before)
    decoder.constant(None, torch.float64).zero_()
    assert torch.equal(decoder.b_U, before)


@pytest.fixture
def unchecked():
    """Without the tests' own shape checks, which would speak first: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    decoder = make_decoder()
    with pytest.raises(ValueError, match=r"W_U must be \[d_model, d_vocab\].*got shapes \(23, 6\) and \(23,\).*\.T"):
        Decoder(Norm("none"), decoder.W_U.T, decoder.b_U)
    with pytest.raises(ValueError, match=r"d_model = 6 .*got shape \(2, 23\)"):
        decoder.logits(torch.zeros(2, 23))
    with pytest.raises(ValueError, match=r"d_model = 6 .*got shape \(2, 5\)"):
        decoder.metric(True).norm(torch.zeros(2, 5))
