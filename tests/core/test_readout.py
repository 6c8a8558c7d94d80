"""Chunked readings of logit vectors against materialised logits, `torch.topk` by stable sort and `F.kl_div`."""

from __future__ import annotations

import dataclasses

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tl_jets.core.logit_reader as reader
from tl_jets.calculus import Norm
from tl_jets.core.decoder import Decoder
from tl_jets.core.lens_logits import Control, Mixture, scan_mixture
from tl_jets.core.logit_reader import top_tokens

TRANSFORMS = {"none": None, "softcap": lambda x: 5 * torch.tanh(x / 5), "scale": lambda x: 0.3 * x}


def generator(seed=0):
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


def make(
    d_vocab=150,
    layers=3,
    orders=2,
    rows=5,
    d_model=7,
    *,
    seed=0,
    dtype=torch.float64,
    transform=None,
    bias=True,
    constant=True,
    offset=-20.0,
    n_draws=2,
    final=None,
):
    """A decoder, a mixture, a control and targets; every bias and gain random. A `final` layer is the model itself."""
    draw = generator(seed)
    decoder = Decoder(
        Norm("none"), draw(d_model, d_vocab).to(dtype), (constant * (draw(d_vocab) + offset)).to(dtype), transform
    )
    tensors = (
        draw(layers, rows, d_model),
        draw(rows, d_model),
        draw(layers, orders, rows),
        draw(layers, orders, rows),
        draw(rows),
    )
    own, shared, alpha, beta, gamma = (x.to(dtype) for x in tensors)
    # Some cells near the model's own answer, some exactly at it.
    alpha[0, 0] *= 1e-2
    beta[0, 0] = gamma
    alpha[-1, -1], beta[-1, -1] = 0, gamma
    # Some that borrow nothing from it, as order 0 does: of one layer, or at one row only.
    if layers > 1:
        beta[1, 0] = 0
    beta[0, -1, 0] = 0
    mixture = Mixture(own, shared, alpha, beta, gamma, draw(d_model).to(dtype) if bias else None)
    control = Control(*(x.to(dtype) for x in (draw(n_draws, rows, d_model), draw(layers, rows), draw(layers, rows))))
    targets = torch.randint(d_vocab, (rows, 3), generator=torch.Generator().manual_seed(seed))
    if final is not None:
        own[final], alpha[final], beta[final], control.along[final], control.across[final] = shared, gamma, 0, 1, 0
        mixture = dataclasses.replace(mixture, final=final)
    return decoder, mixture, control, targets


def wide(thing):
    """The same in float64."""
    fields = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    return type(thing)(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in fields.items()})


def materialised(decoder, mixture):
    """Full additive logits, the model's, and those of the own part, in float64."""
    decoder, mixture = wide(decoder), wide(mixture)
    W_U, b_U = (decoder.logit_scale * weight for weight in (decoder.W_U, decoder.b_U))
    constant = b_U + (0 if mixture.bias is None else mixture.bias @ W_U)
    own = torch.einsum("lkr,lrd,dv->lkrv", mixture.alpha, mixture.own, W_U) + constant
    full = own + torch.einsum("lkr,rd,dv->lkrv", mixture.beta, mixture.shared, W_U)
    model = torch.einsum("r,rd,dv->rv", mixture.gamma, mixture.shared, W_U) + constant
    return full, model, own


def with_control(mixture, control):
    """The mixtures whose own states are the random centers of each draw of the control, written out."""
    mixture, control = wide(mixture), wide(control)
    along = torch.einsum("lr,rd->lrd", control.along, mixture.shared)
    across = torch.einsum("lr,nrd->nlrd", control.across, control.random)
    return [dataclasses.replace(mixture, own=along + own) for own in across]


def ordered(logits):
    """Token ids by (logit, smallest id)."""
    return logits.sort(dim=-1, descending=True, stable=True).indices


def check(readings, logits, model, transform, k, targets, *, rtol, atol):
    transform = transform or (lambda x: x)
    order = ordered(logits)
    assert torch.equal(readings.top.indices, order[..., :k])
    torch.testing.assert_close(
        readings.top.values.double(), logits.gather(-1, order[..., :k]), rtol=rtol, atol=1e2 * atol
    )
    assert torch.equal(readings.top1_agreement, order[..., 0] == ordered(model)[..., 0])
    log_q, log_p = transform(logits).log_softmax(-1), transform(model).log_softmax(-1)
    kl = F.kl_div(log_q, log_p.expand_as(log_q), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(readings.kl.double(), kl, rtol=rtol, atol=atol)
    assert (readings.kl >= 0).all()
    torch.testing.assert_close(
        readings.log_normalizer.double(), transform(logits).logsumexp(-1), rtol=rtol, atol=1e2 * atol
    )
    if targets is None:
        assert readings.target_logits is None
        assert readings.target_ranks is None
        return
    tokens = targets.expand(*logits.shape[:-1], -1)
    torch.testing.assert_close(readings.target_logits.double(), logits.gather(-1, tokens), rtol=rtol, atol=1e2 * atol)
    ranks = order.argsort(-1).gather(-1, tokens)
    assert torch.equal(readings.target_ranks, ranks)


def check_scan(decoder, mixture, control, targets, *, k=4, rtol=1e-10, atol=1e-10, **options):
    scan = scan_mixture(decoder, mixture, top_k=k, targets=targets, control=control, **options)
    full, model, own = materialised(decoder, mixture)
    tolerance = {"rtol": rtol, "atol": atol}
    check(scan, full, model, decoder.transform, k, targets, **tolerance)
    check(scan.model, model, model, decoder.transform, k, targets, **tolerance)
    assert torch.equal(scan.own_top1, ordered(own)[..., 0])
    if control is None:
        assert scan.control is None
    else:
        random = torch.stack([materialised(decoder, own)[0] for own in with_control(mixture, control)])
        check(scan.control, random, model, decoder.transform, 1, None, **tolerance)
    return scan


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("d_vocab", [64, 150, 1000])
def test_scan(transform, d_vocab):
    check_scan(*make(d_vocab, transform=TRANSFORMS[transform]))


@pytest.mark.parametrize("d_vocab", [256, 250])
def test_scan_without_a_constant(d_vocab):
    """With and without padding, which no constant fills."""
    check_scan(*make(d_vocab, bias=False, constant=False, final=1))


def test_the_final_layer_is_not_read(monkeypatch):
    rows = []
    original = Decoder.project
    monkeypatch.setattr(
        Decoder, "project", lambda self, states, out: (rows.append(len(states)), original(self, states, out))
    )
    check_scan(*make(layers=3, rows=5, n_draws=4, final=2))
    assert sum(rows) == 5 + 1 + 4 * 5 + 2 * 5  # shared, constant, draws, two layers


@settings(max_examples=60, deadline=None)
@given(
    d_vocab=st.integers(1, 400),
    layers=st.integers(1, 5),
    orders=st.integers(1, 4),
    rows=st.integers(1, 9),
    d_model=st.integers(1, 6),
    chunk_size=st.integers(1, 60),
    scratch=st.integers(1, 4000),
    transform=st.sampled_from(sorted(TRANSFORMS)),
    n_draws=st.integers(1, 3),
    flags=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_scan_of_any_shape(
    d_vocab, layers, orders, rows, d_model, chunk_size, scratch, transform, n_draws, flags, data
):
    k, (bias, constant) = data.draw(st.integers(1, d_vocab)), flags
    final = data.draw(st.none() | st.integers(0, layers - 1))
    options = {
        "bias": bias,
        "constant": constant,
        "n_draws": n_draws,
        "final": final,
        "transform": TRANSFORMS[transform],
    }
    inputs = make(d_vocab, layers, orders, rows, d_model, seed=d_vocab, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "SCRATCH_CPU", scratch)
        check_scan(*inputs, k=k, chunk_size=chunk_size)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scan_in_float32(transform):
    decoder, mixture, control, _ = make(5000, dtype=torch.float32, transform=TRANSFORMS[transform], offset=-100.0)
    scan = check_scan(decoder, mixture, control, None, rtol=1e-4, atol=1e-6)
    assert scan.kl.dtype == torch.float32


@pytest.mark.parametrize("spread", [0.02, 0.5, 5.0])
def test_float32_keeps_small_divergences(spread):
    """A vocabulary of real size, flat and peaked distributions, KL from 1e-9 nats up."""
    draw = generator(3)
    decoder = Decoder(Norm("none"), draw(16, 50257).float() * spread, draw(50257).float() * spread - 100)
    shared, gamma = draw(6, 16).float(), torch.ones(6)
    alpha = torch.logspace(-5, 0, 6)[None, :, None].expand(1, 6, 6).contiguous()
    mixture = Mixture(draw(1, 6, 16).float(), shared, alpha, torch.ones_like(alpha), gamma)
    full, model, _ = materialised(decoder, mixture)
    log_p = model.log_softmax(-1)
    kl = (log_p.exp() * (log_p - full.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(scan_mixture(decoder, mixture).kl.double(), kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transform", ["none", "scale"])
def test_diverging_series_keep_their_divergences(transform):
    """Orders where a series of rho > 1 has come to logits of 1e3 to 1e16: large, finite and never a perfect zero."""
    decoder, mixture, control, _ = make(
        700, orders=14, dtype=torch.float32, transform=TRANSFORMS[transform], offset=0.0
    )
    mixture.alpha.mul_(torch.logspace(0, 16, 14)[:, None])
    scan = check_scan(decoder, mixture, control, None, k=1, rtol=1e-4, atol=1e-5)
    assert float(scan.kl.max()) > 1e15 and bool((scan.kl[1, 3:] > 1).all())


def test_half_precision_is_read_in_float32():
    decoder, mixture, control, targets = make(300, dtype=torch.bfloat16)
    scan = scan_mixture(decoder, mixture, targets=targets, control=control)
    full, model, _ = materialised(decoder, mixture)
    kl = (model.softmax(-1) * (model.log_softmax(-1) - full.log_softmax(-1))).sum(-1)
    assert scan.kl.dtype == torch.float32
    torch.testing.assert_close(scan.kl.double(), kl, rtol=1e-4, atol=1e-6)
    top = top_tokens(decoder, mixture.shared, 0.5, 3)
    expected = wide(decoder).logits(mixture.shared.double(), 0.5).topk(3)
    assert torch.equal(top.indices, expected.indices)
    torch.testing.assert_close(top.values.double(), expected.values, rtol=1e-4, atol=1e-4)


def test_without_measures():
    decoder, mixture, _, targets = make()
    scan = scan_mixture(decoder, mixture, targets=targets, measures=False)
    measured = scan_mixture(decoder, mixture, targets=targets)
    assert (scan.kl, scan.log_normalizer, scan.own_top1, scan.control) == (None, None, None, None)
    assert torch.equal(scan.top.indices, measured.top.indices)
    assert torch.equal(scan.top1_agreement, measured.top1_agreement)
    assert torch.equal(scan.target_ranks, measured.target_ranks)


def test_one_target_a_row():
    decoder, mixture, _, targets = make()
    one = scan_mixture(decoder, mixture, targets=targets[:, 1])
    several = scan_mixture(decoder, mixture, targets=targets)
    assert one.target_ranks.shape == (3, 2, 5, 1)
    assert torch.equal(one.target_ranks[..., 0], several.target_ranks[..., 1])
    assert torch.equal(one.model.target_logits[..., 0], several.model.target_logits[..., 1])


@pytest.mark.parametrize("distinct", [10, 700])
@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_ties_go_to_the_smallest_id(k, distinct):
    """A vocabulary of few distinct tokens: integer logits, most of them equal to many others, across blocks."""
    draw, d_vocab = generator(1), 2000
    tokens = (draw(3, distinct) * 2).round()
    copies = torch.randint(distinct, (d_vocab,), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(Norm("none"), tokens[:, copies], torch.zeros(d_vocab, dtype=torch.float64))
    integers = [(draw(*shape) * 2).round() for shape in ((2, 6, 3), (6, 3), (2, 3, 6), (2, 3, 6), (6,))]
    control = Control(*((draw(*shape) * 2).round() for shape in ((2, 6, 3), (2, 6), (2, 6))))
    targets = torch.randint(d_vocab, (6, 2), generator=torch.Generator().manual_seed(3))
    check_scan(decoder, Mixture(*integers), control, targets, k=k)
    states = integers[1]
    assert torch.equal(top_tokens(decoder, states, k=k).indices, ordered(decoder.logits(states))[:, :k])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_top_tokens(transform, tied):
    draw, transform = generator(), TRANSFORMS[transform]
    weight = draw(130, 7).T if tied else draw(7, 130)
    decoder = Decoder(Norm("none"), weight, draw(130) - 50, transform)
    states, bias_weight = draw(2, 5, 7), draw(2, 5)
    logits = torch.einsum("bpd,dv->bpv", states, weight) + torch.einsum("bp,v->bpv", bias_weight, decoder.b_U)
    if transform is TRANSFORMS["scale"]:  # linear: part of additive logits
        logits, transform = transform(logits), None
    for chunk_size in (1, 3, 10, 99):
        top = top_tokens(decoder, states, bias_weight, 6, chunk_size=chunk_size)
        torch.testing.assert_close(top.values, logits.topk(6).values)
        assert torch.equal(top.indices, logits.topk(6).indices)
        probable = top_tokens(decoder, states, bias_weight, 6, log_probs=True, chunk_size=chunk_size)
        log_probs = (transform(logits) if transform else logits).log_softmax(-1)
        torch.testing.assert_close(probable.values, log_probs.gather(-1, top.indices), rtol=1e-10, atol=1e-10)
        assert torch.equal(probable.indices, top.indices)
    every = top_tokens(decoder, states, bias_weight, 130)
    assert torch.equal(every.indices, ordered(logits))
    assert top_tokens(decoder, states[0, 0], 1.0, 2).indices.shape == (2,)
    assert top_tokens(decoder, states[:0], 1.0, 2).indices.shape == (0, 5, 2)


def test_inputs_are_not_changed():
    decoder, mixture, control, targets = make()
    given = (decoder.W_U, decoder.b_U, *vars(mixture).values(), *vars(control).values(), targets)
    after = [x for x in given if x is not None]
    before = [x.clone() for x in after]
    scan_mixture(decoder, mixture, control=control, targets=targets)
    top_tokens(decoder, mixture.own)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_memory_is_bounded(monkeypatch):
    """No tensor holds more than chunk_size rows of logits, whatever the number of layers, orders and rows."""
    sizes = []
    original = reader.Reader.buffer

    def buffer(self, rows):
        sizes.append(rows)
        return original(self, rows)

    monkeypatch.setattr(reader.Reader, "buffer", buffer)
    monkeypatch.setattr(reader, "SCRATCH_CPU", 0)
    decoder, mixture, control, _ = make(100, layers=9, orders=3, rows=50)
    scan_mixture(decoder, mixture, control=control, chunk_size=40)
    assert max(sizes) <= 40
    sizes.clear()
    top_tokens(decoder, mixture.own, chunk_size=40)
    assert max(sizes) <= 40


@pytest.fixture
def unchecked():
    """Without the tests' own shape checks, which would speak first: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
def test_errors():
    decoder, mixture, control, targets = make()
    fields = vars(mixture)
    with pytest.raises(ValueError, match=r"own must be \[layer, row, d_model\].*Flatten"):
        Mixture(**{**fields, "own": mixture.own[0]})
    with pytest.raises(
        ValueError, match=r"beta must be \[layer, order, row\] = \(3, 2, 5\) here, got shape \(3, 1, 5\)"
    ):
        Mixture(**{**fields, "beta": mixture.beta[:, :1]})
    with pytest.raises(ValueError, match=r"shared must be .*\(5, 7\) here, got shape \(4, 7\)"):
        Mixture(**{**fields, "shared": mixture.shared[:4]})
    spoiled = mixture.alpha.clone()
    spoiled[1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="alpha must be finite, got 1 NaN or infinite values of 30"):
        scan_mixture(decoder, Mixture(**{**fields, "alpha": spoiled}))
    with pytest.raises(
        ValueError, match=r"along must be .* One direction|random must be \[draw, row, d_model\].*One direction"
    ):
        Control(control.random, control.along[0], control.across)
    with pytest.raises(ValueError, match=r"across must be \[layer, row\] = \(3, 5\) here"):
        Control(control.random, control.along, control.across[:2])
    with pytest.raises(ValueError, match=r"control.along must be .*\(3, 5\) here, got shape \(2, 5\)"):
        scan_mixture(decoder, mixture, control=Control(control.random, control.along[:2], control.across[:2]))
    with pytest.raises(ValueError, match="measures=False"):
        scan_mixture(decoder, mixture, control=control, measures=False)
    with pytest.raises(ValueError, match="k must be between 1 and d_vocab = 150, got 151"):
        scan_mixture(decoder, mixture, top_k=151)
    with pytest.raises(ValueError, match="k must be between 1 and d_vocab = 150, got 0"):
        top_tokens(decoder, mixture.own, k=0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        scan_mixture(decoder, mixture, chunk_size=0)
    with pytest.raises(ValueError, match=r"d_model = 7 .*got shape \(3, 5, 6\)"):
        top_tokens(decoder, mixture.own[..., :6])
    with pytest.raises(ValueError, match=r"d_model = 7 .*got shape \(3, 5, 6\)"):
        scan_mixture(
            decoder, Mixture(mixture.own[..., :6], mixture.shared[:, :6], mixture.alpha, mixture.beta, mixture.gamma)
        )
    with pytest.raises(ValueError, match="states must be finite"):
        top_tokens(decoder, mixture.own / 0)
    with pytest.raises(
        ValueError, match=r"targets must be token ids .* with 5 rows, got torch.int64 of shape \(4, 3\)"
    ):
        scan_mixture(decoder, mixture, targets=targets[:4])
    with pytest.raises(ValueError, match="targets must be token ids from 0 to 149, got values from -1"):
        scan_mixture(decoder, mixture, targets=targets * 0 - 1)
