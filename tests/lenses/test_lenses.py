"""Both lenses against brute force: jets of the model's own final norm, decoded into full-vocabulary logits.

`Hand` holds what a forward pass gives without the library: the streams from TransformerLens' cache, the model's own
`ln_final` as a black box, W_U, b_U and the output transform. Everything that a lens reports is recomputed from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

from tl_jets import CallableModel, Decoder, Norm, ResidualNetwork, iterative_jet_lens, joint_jet_lens, load
from tl_jets.calculus import full_precision, jet
from tl_jets.cli import parser
from tl_jets.core.measures import MEASURES, Measures, random_directions

EPS = 1e-3  # of every family below
ORDER = 3
NAMES = ["gpt2", "pythia", "llama", "olmo2", "gemma2", "cohere", "granite", "no_norm", "attn_only"]


def specs(*names: str, processing: str = "raw") -> list[zoo.ModelSpec]:
    """One world a family: HookedTransformer where it exists, so that a version's suite covers both and stays short."""
    found = {spec.name: spec for spec in zoo.available(list(names)) if spec.processing == processing}
    return list(found.values())


BRIDGE_LLAMA = [zoo.ModelSpec("llama", "bridge", "raw")]
SPECS = specs(*NAMES) + specs("gpt2", "cohere", processing="processed") + BRIDGE_LLAMA
SPECS = list(dict.fromkeys(SPECS))
GPT2 = specs("gpt2")
SMALL = GPT2 + BRIDGE_LLAMA
SCALES = ["none", "match", "orthogonal"]
by_spec = functools.partial(pytest.mark.parametrize, "spec", ids=str)


class Hand:
    """A model's own streams and decoder on one input; additive logits are [..., batch, pos, d_vocab]."""

    def __init__(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None):
        self.model = model
        self.valid = torch.ones_like(tokens).bool() if attention_mask is None else attention_mask.bool()
        extra = {} if attention_mask is None else {"attention_mask": attention_mask}
        with full_precision(), torch.no_grad():
            self.logits, self.cache = model.run_with_cache(tokens, **extra)
        self.n_layers = model.cfg.n_layers
        self.final = self.cache[f"blocks.{self.n_layers - 1}.hook_resid_post"].double()
        self.W_U, self.b_U = model.W_U.double(), model.b_U.double()
        zero = torch.zeros_like(self.final[:1, :1])
        self.bias = self.norm(zero)
        ratio = self.logits.double() / self.truth
        if float(ratio.std() / ratio.mean()) < 1e-5:  # a logit scale is part of additive logits
            self.W_U, self.b_U = self.W_U * ratio.median(), self.b_U * ratio.median()
        self.constant = self.bias @ self.W_U + self.b_U
        one = torch.ones_like(zero)
        self.centers_first = bool((self.norm(self.final + one) - self.norm(self.final)).abs().max() < 1e-9)
        self.has_norm = bool((self.norm(2 * self.final) - 2 * self.norm(self.final)).abs().max() > 1e-3)

    def norm(self, x: Tensor) -> Tensor:
        """The model's own final norm."""
        if getattr(self.model.cfg, "normalization_type", None) is None or not hasattr(self.model, "ln_final"):
            return x
        with full_precision():
            return self.model.ln_final(x)

    def seen(self, x: Tensor) -> Tensor:
        """A state as the norm sees it."""
        return x - x.mean(-1, keepdim=True) if self.centers_first else x

    def size(self, x: Tensor) -> Tensor:
        return (self.seen(x).square().mean(-1) + EPS).sqrt() if self.has_norm else torch.ones_like(x[..., 0])

    def gained(self, x: Tensor) -> Tensor:
        """w * x, from the norm as a black box."""
        return (self.norm(x) - self.bias) * self.size(x)[..., None]

    def stream(self, label: str) -> Tensor:
        if label == "final_post":
            return self.final
        layer, kind = label.split("_")
        return self.cache[f"blocks.{layer}.hook_resid_{kind}"].double()

    def decode(self, states: Tensor) -> Tensor:
        return states @ self.W_U + self.b_U

    @property
    def truth(self) -> Tensor:
        return self.decode(self.norm(self.final))

    def transform(self, logits: Tensor) -> Tensor:
        if hasattr(self.model, "adapter"):
            scaled = self.model.adapter.apply_output_logits_transform(logits.clone())
            # 3.9 applies a folded logit scale twice in the adapter: the model's own logits decide.
            close = torch.allclose(self.truth, self.logits.double(), rtol=1e-6, atol=1e-6)
            return logits if close else scaled
        cap = self.model.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def scale(self, x: Tensor, mode: str) -> Tensor:
        x, y = self.seen(x), self.seen(self.final)
        if mode == "none":
            return torch.ones_like(x[..., 0])
        match, overlap = y.norm(dim=-1) / x.norm(dim=-1), (x * y).sum(-1)
        return match if mode == "match" else torch.where(overlap > 0, y.square().sum(-1) / overlap, match)

    def jets(self, x: Tensor, order: int, mode: str = "none") -> Tensor:
        """Values of all orders up to `order`, [order+1, batch, pos, d_model]."""
        with torch.no_grad():
            return jet(self.norm, self.scale(x, mode)[..., None] * x, self.final, order).partial_sums

    def measures(self, lens: Tensor) -> dict[str, Tensor]:
        """Every measure of additive logits [..., batch, pos, d_vocab]."""
        truth = self.truth.expand_as(lens)
        centered = [value - value.mean(-1, keepdim=True) for value in (truth, lens)]
        log_p, log_q = (self.transform(value).log_softmax(-1) for value in (truth, lens))
        return {
            "remainder_norm": (truth - lens).norm(dim=-1) / truth.norm(dim=-1),
            "cosine": F.cosine_similarity(truth, lens, dim=-1, eps=0),
            "centered_cosine": F.cosine_similarity(*centered, dim=-1, eps=0),
            "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
            "top1_agreement": (truth.argmax(-1) == lens.argmax(-1)).double(),
        }

    def control_center(self, x: Tensor, directions: Tensor) -> Tensor:
        """A center of x's length and angle to the final stream, as the norm sees them."""
        x, y = self.seen(x), self.seen(self.final)
        along = (x * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True)
        return along * y + (x - along * y).norm(dim=-1, keepdim=True) * directions

    def directions(self, shape: tuple[int, ...] = (), seed: int = 0) -> Tensor:
        """The control's draws, whose properties are tested in test_measures."""
        places = (self.valid.cumsum(1) - 1).clamp_min(0)
        norm = Norm("LN" if self.centers_first else "RMS")
        flat = random_directions(norm, self.final.flatten(0, 1), shape, places.flatten(), seed)
        return flat.unflatten(-2, self.final.shape[:2])


def at(hand: Hand, values: Tensor, axis: int = -1) -> Tensor:
    """Real positions only: [..., batch, pos, ...] -> [..., row, ...]."""
    return values.movedim((axis - 1, axis), (0, 1))[hand.valid]


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=rtol, atol=atol)


def check_measures(hand: Hand, found: Measures, lens: Tensor, rtol: float, atol: float, *, top1: bool = True) -> None:
    for name, wanted in hand.measures(lens).items():
        if name != "top1_agreement" or top1:
            # A length or an angle near zero is the root of a rounded square.
            slack = math.sqrt(atol) if name == "remainder_norm" and atol < 1e-8 else atol
            near = at(hand, wanted) < 1e-4
            here = at(hand, getattr(found, name)).double()
            close(here[~near], at(hand, wanted)[~near], rtol, atol)
            close(here[near], at(hand, wanted)[near], rtol, slack)


def check_iterative(lens: Any, hand: Hand, *, rtol: float = 1e-9, atol: float = 1e-10, ids: bool = True) -> Tensor:
    """Everything in a lens at all positions, from full logits; returns them [layer, order, batch, pos, d_vocab]."""
    order, mode, k = lens.orders[-1], lens.center_scale, lens.top_ids.shape[-1]
    streams = [hand.stream(label) for label in lens.labels]
    full = hand.decode(torch.stack([hand.jets(x, order, mode) for x in streams]))
    # The two parts: their sum must be the brute-force jet, which fixes alpha and beta.
    alpha, beta = (value[..., None].double() for value in (lens.alpha, lens.beta))
    own = alpha * torch.stack([hand.gained(x) @ hand.W_U for x in streams])[:, None]
    borrowed = beta * (hand.gained(hand.final) @ hand.W_U)
    size = at(hand, full, -2).abs().max().clamp_min(1)
    close(at(hand, own + borrowed + hand.constant, -2) / size, at(hand, full, -2) / size, rtol, atol)
    assert not bool(lens.beta[:, 0][..., hand.valid].any())
    # A float32 lens may rank near-ties otherwise: then values alone are compared.
    if ids:
        assert torch.equal(at(hand, lens.top_ids, -2), at(hand, full.topk(k).indices, -2))
        own_best = at(hand, (own + hand.constant).argmax(-1))
        assert torch.equal(at(hand, lens.own_top_ids), own_best)
        assert torch.equal(at(hand, lens.borrowed), at(hand, full.argmax(-1)) != own_best)
        assert torch.equal(at(hand, lens.model_top_ids), at(hand, hand.truth.argmax(-1)))
    values = full.gather(-1, lens.top_ids.clamp_min(0))
    close(at(hand, lens.full_values, -2), at(hand, values, -2), rtol, atol * float(size))
    own_values = (own + hand.constant).gather(-1, lens.top_ids.clamp_min(0))
    close(at(hand, lens.own_values, -2), at(hand, own_values, -2), rtol, atol * float(size))
    lengths = [(part - part.mean(-1, keepdim=True)).norm(dim=-1) for part in (own, borrowed)]
    share = torch.where(lens.beta == 0, 0, lengths[1] / (lengths[0] + lengths[1]))
    close(at(hand, lens.borrowed_share), at(hand, share), rtol, atol)
    check_measures(hand, lens.measures, full, rtol, atol, top1=ids)
    # The series' radius and the bound on what is left after each order, before the gain.
    y = hand.seen(hand.final)
    scaled = torch.stack([hand.scale(x, mode)[..., None] * hand.seen(x) for x in streams])
    if hand.has_norm:
        rho = (y - scaled).square().mean(-1).sqrt() / (scaled.square().mean(-1) + EPS).sqrt()
        close(at(hand, lens.rho), at(hand, rho), rtol, atol)
        gain = hand.gained(hand.final) / y
        left = (hand.norm(hand.final) - torch.stack([hand.jets(x, order, mode) for x in streams])) / gain
        assert bool(at(hand, left.square().mean(-1).sqrt() <= lens.tail_bound * (1 + 1e-6) + 1e-5).all())
        wanted = torch.stack([rho ** (j + 1) / (1 - rho) for j in lens.orders], 1).masked_fill(
            rho[:, None] >= 1, math.inf
        )
        sure = (rho[:, None] - 1).abs().expand_as(wanted) > 1e-4
        close(lens.tail_bound[sure & hand.valid], wanted[sure & hand.valid], 10 * rtol, atol)
    return full


def check_iterative_control(lens: Any, hand: Hand, *, seed: int = 0, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    order, mode, directions = lens.orders[-1], lens.center_scale, hand.directions(seed=seed)
    logits = []
    for label in lens.labels:
        x = hand.stream(label)
        center, y = hand.control_center(x, directions), hand.seen(hand.final)
        close(at(hand, center.norm(dim=-1)), at(hand, hand.seen(x).norm(dim=-1)))
        cosines = [F.cosine_similarity(value, y, dim=-1) for value in (center, hand.seen(x))]
        close(at(hand, cosines[0]), at(hand, cosines[1]))
        logits.append(hand.decode(hand.jets(center, order, mode)))
    check_measures(hand, lens.control, torch.stack(logits), rtol, atol)


@functools.cache
def setting(spec: zoo.ModelSpec) -> tuple[Any, ResidualNetwork, Tensor, Hand]:
    model = zoo.build(spec)
    tokens = zoo.tokens(model)
    return model, ResidualNetwork(model, "block"), tokens, Hand(model, tokens)


# --- the iterative lens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "mode"),
    [(spec, mode) for spec in SPECS for mode in SCALES if mode == "none" or spec in SMALL or spec.name == "no_norm"],
    ids=str,
)
def test_iterative_lens_is_brute_force(spec, mode):
    _, net, tokens, hand = setting(spec)
    sequential = spec.name not in ("pythia", "cohere", "attn_only")
    lens = iterative_jet_lens(net, tokens, order=ORDER, center_scale=mode, incl_mid=sequential, top_k=4, seed=5)
    layers = [
        label for i in range(hand.n_layers) for label in ((f"{i}_pre", f"{i}_mid") if sequential else (f"{i}_pre",))
    ]
    assert lens.labels == [*layers, "final_post"]
    assert lens.alpha.shape == (len(lens.labels), ORDER + 1, *tokens.shape)
    assert lens.alpha.dtype is torch.float64
    check_iterative(lens, hand)
    check_iterative_control(lens, hand, seed=5)
    # At the final stream every order is the model, whose own reading that is.
    assert bool((lens.kl[-1] < 1e-10).all()) and bool(lens.top1_agreement[-1].all())
    assert not bool(lens.borrowed[-1].any()) and not bool(lens.borrowed_share[-1].any())
    if hand.has_norm and mode == "none":
        close(lens.alpha[-1], (1 / hand.size(hand.final)).expand(ORDER + 1, -1, -1))


@by_spec(SPECS)
def test_order_0_is_the_logit_lens(spec):
    _, net, tokens, hand = setting(spec)
    lens = iterative_jet_lens(net, tokens, order=0, top_k=3, targets=[7, 12])
    logits = torch.stack([hand.decode(hand.norm(hand.stream(label))) for label in lens.labels])
    assert torch.equal(lens.top_ids[:, 0], logits.topk(3).indices)
    close(lens.full_values[:, 0], logits.topk(3).values)
    close(lens.target_logits[:, 0], logits[..., [7, 12]])
    # After the model's transform the last layer is the model itself.
    close(hand.transform(logits[-1]), hand.logits, 1e-8, 1e-8)


@by_spec([spec for spec in SPECS if spec.world == "bridge" and spec.processing == "raw"])
def test_order_0_is_transformer_lens_own(spec):
    analysis = pytest.importorskip("transformer_lens.tools.analysis", reason="new in TransformerLens 4")
    if not hasattr(analysis, "logit_lens"):
        pytest.skip("new in TransformerLens 4")
    model, net, tokens, hand = setting(spec)
    mid = spec.name not in ("pythia", "cohere", "attn_only")
    lens = iterative_jet_lens(net, tokens, order=0, incl_mid=mid, top_k=4, targets=[7, 12])
    with full_precision():
        theirs = analysis.logit_lens(model, tokens, positions=None, incl_mid=mid, top_k=4).readout
        ranked = analysis.logit_lens(model, tokens, positions=None, incl_mid=mid, targets=[7, 12]).readout
    assert torch.equal(theirs.top_ids.reshape(lens.top_ids[:, 0].shape), lens.top_ids[:, 0])
    values = torch.stack([hand.transform(layer) for layer in lens.full_values[:, 0]])  # a scale is in them already
    close(theirs.values.reshape(values.shape), values, 1e-9, 1e-9)
    assert torch.equal(ranked.target_ranks.reshape(lens.target_ranks[:, 0].shape), lens.target_ranks[:, 0])


@by_spec(SMALL)
def test_targets(spec):
    _, net, tokens, hand = setting(spec)
    names = ["w17", 5, "w40"]
    lens = iterative_jet_lens(net, tokens, order=2, targets=names)
    full = torch.stack([hand.decode(hand.jets(hand.stream(label), 2)) for label in lens.labels])
    ids = [17, 5, 40]
    assert lens.target_names == names
    close(lens.target_logits, full[..., ids])
    ranks = (full[..., None] > full[..., None, ids]).sum(-2)
    assert torch.equal(lens.target_ranks, ranks)
    assert torch.equal(lens.rank_trajectory(5), ranks[..., 1])
    close(lens.logit_difference("w40", "w17"), full[..., 40] - full[..., 17])
    one = iterative_jet_lens(net, tokens, order=2, targets="w40")
    assert torch.equal(one.rank_trajectory(), ranks[..., 2])
    # One target a position: what comes next, aligned with `positions`.
    following = tokens[:, 1:]
    each = iterative_jet_lens(net, tokens, order=2, positions=range(6), targets=following)
    gathered = full[..., :6, :].gather(-1, following[..., None].expand(*full.shape[:2], -1, -1, -1))
    close(each.target_logits, gathered)
    assert torch.equal(each.rank_trajectory(), (full[..., :6, :] > gathered).sum(-1))
    assert torch.equal(each.target_ids, following[..., None])
    two = iterative_jet_lens(net, tokens, order=2, targets=torch.stack([tokens, tokens.flip(1)], -1))
    close(two.logit_difference(0, 1), two.target_logits[..., 0] - two.target_logits[..., 1])
    for wrong in ("w3", 17):
        with pytest.raises(ValueError, match="target must be one of"):
            lens.rank_trajectory(wrong)
    with pytest.raises(ValueError, match="target must be one of"):
        lens.rank_trajectory()
    with pytest.raises(ValueError, match="pass targets="):
        iterative_jet_lens(net, tokens).rank_trajectory("w3")


def same(found: Any, wanted: Any, index: Any = ..., rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """All of one lens is a part of the other's, whose trailing [..., batch, pos] are taken at `index`."""
    for name in ("rho", "alpha", "beta", "borrowed_share", "tail_bound", "weights", "gap"):
        if getattr(found, name, None) is not None:
            torch.testing.assert_close(
                getattr(found, name), getattr(wanted, name)[index], rtol=rtol, atol=atol, equal_nan=True
            )
    assert torch.equal(found.own_top_ids, wanted.own_top_ids[index])
    for name in ("top_ids", "full_values"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name).movedim(-1, 0)[index].movedim(0, -1), equal_nan=True
        )
    for kind in ("measures", "control", "uniform", "control_uniform"):
        for name in MEASURES if hasattr(found, kind) else ():
            one, other = getattr(getattr(found, kind), name), getattr(getattr(wanted, kind), name)[index]
            slack = 1e-7 if name == "remainder_norm" else atol
            torch.testing.assert_close(one, other, rtol=max(rtol, 1e-8), atol=slack, equal_nan=True)


@by_spec(SMALL)
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_batch_and_position_slices_commute_with_evaluation(spec, lens_of, monkeypatch):
    """Controls, too: a draw belongs to its place in the prompt."""
    _, net, tokens, _ = setting(spec)
    whole = lens_of(net, tokens, order=2)
    same(lens_of(net, tokens[1:2], order=2), whole, (..., slice(1, 2), slice(None)))
    same(lens_of(net, tokens[:, :5], order=2), whole, (..., slice(None), slice(0, 5)))
    same(lens_of(net, tokens[2], order=2), whole, (..., slice(2, 3), slice(None)))
    for positions, chosen in ((-1, [6]), (2, [2]), ([0, -2, 3], [0, 5, 3]), (range(3), [0, 1, 2])):
        part = lens_of(net, tokens, order=2, positions=positions)
        assert part.positions == chosen
        assert torch.equal(part.tokens, tokens[:, chosen])
        same(part, whole, (..., slice(None), chosen))
    if lens_of is joint_jet_lens:
        monkeypatch.setattr("tl_jets.lenses.joint.CHUNK_SIZE", 5)  # positions whose weights are solved at once
        same(joint_jet_lens(net, tokens, order=2), whole)
    else:
        same(iterative_jet_lens(net, tokens, order=2, chunk_size=5), whole)


@by_spec(SMALL)
def test_layers_are_chosen_by_number_or_label(spec):
    _, net, tokens, _ = setting(spec)
    whole = iterative_jet_lens(net, tokens, order=1, incl_mid=True)
    n = net.view.n_layers
    for layers, labels in (
        ([0, n], ["0_pre", "final_post"]),
        (1, ["1_pre"]),
        (["1_mid", -1], ["1_mid", "final_post"]),
        ("0_mid", ["0_mid"]),
    ):
        part = iterative_jet_lens(net, tokens, order=1, layers=layers)
        assert part.labels == labels
        index = [whole.labels.index(label) for label in labels]
        assert torch.equal(part.top_ids, whole.top_ids[index])
        close(part.kl, whole.kl[index])
        close(part.control.kl, whole.control.kl[index])


@by_spec(SMALL)
def test_without_measures(spec):
    _, net, tokens, _ = setting(spec)
    plain, whole = (iterative_jet_lens(net, tokens, order=2, measures=flag) for flag in (False, True))
    assert torch.equal(plain.top_ids, whole.top_ids)
    close(plain.own_values, whole.own_values)
    close(plain.borrowed_share, whole.borrowed_share)
    assert plain.measures is None and plain.control is None
    for name in ("kl", "cosine", "borrowed"):
        assert hasattr(whole, name) and not hasattr(plain, name)
        with pytest.raises(AttributeError, match=f"{name} needs a lens run with measures=True"):
            getattr(plain, name)
    assert list(plain.average().columns) == ["layer", "order", "rho", "borrowed_share"]
    assert len(plain.to_dataframe()) == 3 * 5 * plain.valid.sum() * len(plain.labels)
    with pytest.raises(AttributeError, match="no attribute 'entropy'"):
        _ = whole.entropy


@by_spec(SMALL)
def test_without_the_control(spec):
    _, net, tokens, _ = setting(spec)
    plain, whole = (iterative_jet_lens(net, tokens, order=2, seed=seed) for seed in (None, 0))
    assert plain.control is None and whole.control is not None
    for name in MEASURES:
        close(getattr(plain.measures, name), getattr(whole.measures, name))
    assert torch.equal(plain.own_top_ids, whole.own_top_ids)
    columns = [name for name in whole.average().columns if not name.startswith("control_")]
    assert list(plain.average().columns) == columns
    assert not any(name.startswith("control_") for name in plain.to_dataframe().columns)


# --- padding, hooks, caches, precisions -----------------------------------------------------------------------------


@by_spec(SMALL + specs("pythia", processing="processed"))
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_left_padding(spec, lens_of):
    model, net, _, _ = setting(spec)
    tokens, mask = zoo.padded(model, (7, 4, 6))
    lens = lens_of(net, tokens, order=2, attention_mask=mask)
    assert torch.equal(lens.valid, mask.bool())
    check_padding(lens)
    if lens_of is iterative_jet_lens:
        check_iterative(lens, Hand(model, tokens, mask))
        check_iterative_control(lens, Hand(model, tokens, mask))
    for row, length in enumerate((7, 4, 6)):
        alone = lens_of(net, tokens[row : row + 1, 7 - length :], order=2)
        # A padded forward pass rounds otherwise: its sums run over other lengths.
        same(alone, lens, (..., slice(row, row + 1), slice(7 - length, None)), 1e-7, 1e-8)


def check_padding(lens: Any) -> None:
    """Everything is missing at padding, and nothing elsewhere; averages are those of what is there."""
    tables = [lens.measures, lens.control]
    tables += [getattr(lens, kind) for kind in ("uniform", "control_uniform") if hasattr(lens, kind)]
    values = [lens.alpha, lens.borrowed_share, lens.rho, *(v for table in tables for _, v in table.items())]
    for value in values:
        assert torch.equal(value.isnan(), ~lens.valid.expand_as(value))
    for value in (lens.full_values, lens.own_values):
        assert torch.equal(value.isnan(), ~lens.valid[..., None].expand_as(value))
    for value in (lens.top_ids.movedim(-1, 0), lens.own_top_ids, lens.model_top_ids):
        assert torch.equal(value == -1, ~lens.valid.expand_as(value))
    assert not bool((lens.borrowed & ~lens.valid).any())
    for name, mean in lens.measures.mean().items():
        close(mean, getattr(lens.measures, name)[..., lens.valid & ~lens.sinks.mask].mean(-1))


@by_spec(SMALL)
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_prompts_of_unequal_length(spec, lens_of):
    _, net, _, _ = setting(spec)
    prompts = ["w5 w9 w33 w4 w8", "w21 w7", "w3"]
    lens = lens_of(net, prompts, order=1)
    assert lens.valid.sum(1).tolist() == [6, 3, 2]  # with <s>
    check_padding(lens)
    for row, prompt in enumerate(prompts):
        alone = lens_of(net, prompt, order=1)
        same(alone, lens, (..., slice(row, row + 1), slice(0, alone.tokens.shape[1])), 1e-7, 1e-8)
    without_bos = lens.valid & (torch.arange(lens.valid.shape[1]) > 0)
    for averages, kept in ((lens.average(), without_bos), (lens.average(include_sinks=True), lens.valid)):
        if lens_of is iterative_jet_lens:
            cell = averages[(averages.layer == "1_pre") & (averages.order == 1)].iloc[0]
            assert cell.kl == pytest.approx(float(lens.kl[1, 1][kept].mean()))
            assert cell.control_kl == pytest.approx(float(lens.control.kl[1, 1][kept].mean()))
            assert cell.rho == pytest.approx(float(lens.rho[1][kept].mean()))
            assert cell.borrowed_share == pytest.approx(float(lens.borrowed_share[1, 1][kept].mean()))
        else:
            assert averages.weights.tolist() == ["weighted", "uniform", "control", "control_uniform"]
            for row, kind in enumerate((lens.measures, lens.uniform, lens.control, lens.control_uniform)):
                assert averages.kl[row] == pytest.approx(float(kind.kl[kept].mean()))
    rows = lens.to_dataframe()
    assert set(zip(rows.batch, rows.pos, strict=True)) == {(b, p) for b, n in enumerate((6, 3, 2)) for p in range(n)}


@by_spec(SMALL[:1])
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_the_last_position_of_prompts_of_unequal_length(spec, lens_of, as_users_run_it):
    _, net, _, _ = setting(spec)
    for last in (-1, np.int64(-1), torch.tensor(-1), [np.int64(-1)]):
        lens = lens_of(net, ["w5 w9 w33 w4 w8", "w21 w7", "w3"], positions=last)
        assert lens.positions.tolist() == [[5], [2], [1]] and bool(lens.valid.all())
        assert lens_of(net, ["w5 w9 w33", "w21 w7 w1"], positions=last).positions == [3]


def steer(tensor: Tensor, hook: Any) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return tensor + torch.randn(tensor.shape[-1], generator=generator, dtype=torch.float64).to(tensor)


def ablate_head(tensor: Tensor, hook: Any) -> Tensor:
    # A Bridge of 3.9 gives heads flat.
    heads = tensor.view(*tensor.shape[:2], zoo.N_HEADS, -1).clone() if tensor.ndim == 3 else tensor.clone()
    heads[:, :, 1] = 0
    return heads.view(tensor.shape)


HOOKS = {
    "steer": ("blocks.1.hook_resid_pre", steer),
    "ablate": ("blocks.0.attn.hook_z", ablate_head),
    "mlp": ("blocks.0.hook_mlp_out", lambda tensor, hook: 0.5 * tensor),
}


@pytest.mark.parametrize(
    ("spec", "kind"),
    [(spec, kind) for spec in SMALL for kind in HOOKS] + [(spec, "steer") for spec in specs("pythia", "gemma2")],
    ids=str,
)
def test_lenses_follow_the_modified_model(spec, kind):
    model, _, tokens, plain = setting(spec)
    name, edit = HOOKS[kind]
    with model.hooks(fwd_hooks=[(name, edit)]):
        hand = Hand(model, tokens)
        lens = iterative_jet_lens(model, tokens, order=2)
        joint = joint_jet_lens(model, tokens, order=1, weights="uniform", granularity="block")
    with full_precision():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, edit)])
    assert float((logits - plain.logits).abs().max()) > 1e-2
    assert torch.equal(lens.model_top_ids, logits.argmax(-1))
    check_iterative(lens, hand)
    close(hand.transform(hand.truth), logits, 1e-8, 1e-8)
    # An edit of the stream is a component of its own, and no other edit is one.
    edits = [label for label in joint.labels if label.startswith("edit:")]
    assert edits == (["edit:blocks.1.hook_resid_pre"] if kind == "steer" else [])
    check_joint(joint, hand, 1)


@by_spec(SMALL)
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_cache_trace_text_and_model_are_the_same_input(spec, lens_of):
    model, net, _, _ = setting(spec)
    prompt = "w5 w9 w33 w4"
    tokens = model.to_tokens(prompt)
    lens = lens_of(net, prompt, order=1, seed=3)
    assert torch.equal(lens.tokens, tokens)
    with full_precision():
        cache = model.run_with_cache(tokens)[1]
    bare = {"granularity": net.granularity} if lens_of is joint_jet_lens else {}
    for other in (
        lens_of(model, tokens, order=1, seed=3, **bare),
        lens_of(net, net.trace(prompt), order=1, seed=3),
        lens_of(net, net.at("head").trace(prompt), order=1, seed=3),
        lens_of(net, tokens, cache=cache, order=1, seed=3),
        lens_of(net, tokens.tolist(), order=1, seed=3),
    ):
        same(other, lens)
    seeded = lens_of(net, prompt, order=1, seed=4)
    assert float((seeded.control.kl - lens.control.kl).abs().max()) > 1e-6


@by_spec(SMALL)
def test_float32_is_accurate(spec):
    _, _, tokens, _ = setting(spec)
    model = zoo.build(spec, torch.float32)
    lens = iterative_jet_lens(model, tokens, order=2, top_k=3)
    assert lens.alpha.dtype is torch.float64 and lens.full_values.dtype is torch.float32
    hand = Hand(model, tokens)
    wanted = iterative_jet_lens(zoo.build(spec), tokens, order=2, top_k=3)
    # Relative to the float64 model's own lens: orders of divergent series magnify the forward pass's rounding.
    close(lens.alpha, wanted.alpha, 1e-3, 1e-3)
    check_iterative(lens, hand, rtol=1e-3, atol=1e-3, ids=False)
    close(
        lens.kl,
        hand.measures(hand.decode(torch.stack([hand.jets(hand.stream(s), 2) for s in lens.labels])))["kl"],
        2e-3,
        2e-4,
    )


@by_spec(GPT2)
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
def test_bf16_models_are_read_in_float32(spec, lens_of):
    model = zoo.fresh(spec, torch.bfloat16)
    tokens = zoo.tokens(model)
    lens = lens_of(model, tokens, order=1)
    # The same rounded weights in float64 are the same model, but for the forward pass's rounding.
    exact = lens_of(zoo.fresh(spec, torch.bfloat16).to(torch.float64), tokens, order=1)
    assert lens.full_values.dtype is torch.float32
    torch.testing.assert_close(lens.alpha, exact.alpha, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lens.kl.double(), exact.kl, rtol=1e-2, atol=1e-3)


# --- the joint lens -------------------------------------------------------------------------------------------------


def components(hand: Hand, labels: Sequence[str], net: ResidualNetwork | None = None) -> Tensor:
    """Values of components from TransformerLens' cache; heads are the trace's (tested in test_adapters)."""
    cache, found = hand.cache, []
    first = hand.stream("0_pre")
    positions = cache["hook_pos_embed"].expand_as(first).double() if "pos_embed" in labels else None
    for label in labels:
        if label == "pos_embed":
            found.append(positions)
        elif label == "embed":
            found.append(first if positions is None else first - positions)
        elif label.startswith("edit:"):
            found.append(steer(torch.zeros_like(first), None))
        elif label.endswith("_block_out"):
            layer = int(label.split("_")[0])
            after = "final_post" if layer == hand.n_layers - 1 else f"{layer + 1}_pre"
            found.append(hand.stream(after) - hand.stream(f"{layer}_pre"))
        else:
            found.append(cache[f"blocks.{label[0]}.hook_{label[2:]}"].double())
    return torch.stack(found)


def check_joint(joint: Any, hand: Hand, order: int, centers: Tensor | None = None) -> Tensor:
    """Everything in a joint lens from full logits; returns each center's own, [center, batch, pos, d_vocab]."""
    if centers is None:
        centers = components(hand, joint.labels)
        if any(label.startswith("edit:") for label in joint.labels):  # what the hook added is not the block's
            block = joint.labels.index("0_block_out")
            centers[block] = centers[block] - centers[-1]
    mode = joint.center_scale
    close(joint.weights.sum(0), torch.ones_like(joint.weights[0]))
    assert bool((joint.weights >= 0).all())
    jets = torch.stack([hand.jets(x, order, mode)[-1] for x in centers])
    own = joint.alpha[..., None] * torch.stack([hand.gained(x) for x in centers])
    borrowed = joint.beta[..., None] * hand.gained(hand.final)
    close(own + borrowed + hand.bias, jets, 1e-8, 1e-8)
    w = joint.weights[..., None]
    logits = hand.decode((w * jets).sum(0))
    k = joint.top_ids.shape[-1]
    assert torch.equal(joint.top_ids, logits.topk(k).indices)
    close(joint.full_values, logits.topk(k).values, 1e-8, 1e-8)
    parts = [(w * part).sum(0) @ hand.W_U for part in (own, borrowed)]
    own_logits = parts[0] + hand.constant
    assert torch.equal(joint.own_top_ids, own_logits.argmax(-1))
    close(joint.own_values, own_logits.gather(-1, joint.top_ids), 1e-8, 1e-8)
    assert torch.equal(joint.borrowed, logits.argmax(-1) != own_logits.argmax(-1))
    lengths = [(part - part.mean(-1, keepdim=True)).norm(dim=-1) for part in parts]
    close(joint.borrowed_share, lengths[1] / (lengths[0] + lengths[1]), 1e-8, 1e-8)
    check_measures(hand, joint.measures, logits, 1e-8, 1e-9)
    check_measures(hand, joint.uniform, hand.decode(jets.mean(0)), 1e-8, 1e-9)
    each = hand.decode(jets)
    top = joint.center_top_tokens(3)
    assert torch.equal(top.indices, each.topk(3).indices)
    close(top.values, each.topk(3).values, 1e-8, 1e-8)
    directions = hand.directions((len(centers),))
    random = torch.stack([hand.control_center(x, n) for x, n in zip(centers, directions, strict=True)])
    of_random = torch.stack([hand.jets(x, order, mode)[-1] for x in random])
    check_measures(hand, joint.control_uniform, hand.decode(of_random.mean(0)), 1e-9, 1e-9)
    if not isinstance(joint.gap, Tensor):  # given weights: the control carries the same ones
        check_measures(hand, joint.control, hand.decode((w * of_random).sum(0)), 1e-8, 1e-9)
    return each


def objective(hand: Hand, logits: Tensor, kind: str) -> Tensor:
    if kind == "kl":
        return hand.measures(logits)["kl"]
    error = hand.truth - logits
    return (error - (error.mean(-1, keepdim=True) if kind == "centered_l2" else 0)).norm(dim=-1)


@pytest.mark.parametrize(
    ("spec", "kind", "order", "mode"),
    [(spec, "centered_l2", 0, "none") for spec in SPECS] + [(spec, "l2", 2, "match") for spec in SMALL],
    ids=str,
)
def test_joint_lens_is_brute_force_and_optimal(spec, kind, order, mode):
    _, net, tokens, hand = setting(spec)
    joint = joint_jet_lens(net, tokens, order=order, objective=kind, center_scale=mode)
    assert joint.labels == list(net.components)
    close(components(hand, joint.labels).sum(0), hand.final)
    each = check_joint(joint, hand, order)
    assert float(joint.gap.max()) < 1e-6
    check_optimal(joint, hand, each, kind)
    # The control's weights are optimized, too: never worse than uniform ones.
    uniform = joint_jet_lens(net, tokens, order=order, weights="uniform", center_scale=mode)
    assert uniform.gap is None and uniform.objective == "uniform"
    check_joint(uniform, hand, order)
    if kind == "l2":
        assert bool((joint.control.remainder_norm <= uniform.control.remainder_norm + 1e-9).all())


def check_optimal(joint: Any, hand: Hand, each: Tensor, kind: str) -> None:
    n, shape = len(joint.labels), joint.weights.shape[1:]
    best = objective(hand, torch.einsum("nbp,nbpv->bpv", joint.weights, each), kind)
    generator = torch.Generator().manual_seed(1)
    for draw in range(12):
        other = torch.rand(n, *shape, generator=generator, dtype=torch.float64) ** 4
        other = torch.ones(n, *shape, dtype=torch.float64) if draw == 0 else other
        # Near the optimum is where a wrong one shows.
        other = joint.weights + 0.05 * other if draw > 6 else other
        logits = torch.einsum("nbp,nbpv->bpv", other / other.sum(0), each)
        assert bool((objective(hand, logits, kind) >= best - 1e-6).all()), draw


@by_spec(specs("gpt2", "cohere", "granite"))
def test_joint_lens_with_the_kl_objective(spec):
    _, net, tokens, hand = setting(spec)
    joint = joint_jet_lens(net, tokens, objective="kl")
    check_optimal(joint, hand, check_joint(joint, hand, 0), "kl")
    assert float(joint.gap.max()) < 1e-6
    assert bool((joint.kl <= joint.uniform.kl + 1e-6).all())


@by_spec(specs("gemma2"))
def test_kl_weights_under_a_softcap_are_refused(spec):
    _, net, tokens, _ = setting(spec)
    with pytest.raises(NotImplementedError, match="without a final softcap"):
        joint_jet_lens(net, tokens, objective="kl")


@by_spec(SMALL)
def test_granularities_and_embeddings(spec):
    model, net, tokens, hand = setting(spec)
    own = ResidualNetwork(model)
    assert joint_jet_lens(model, tokens).labels == joint_jet_lens(own, tokens).labels == list(own.components)
    assert own.granularity == parser().parse_args(["lens"]).granularity == "sublayer"
    assert joint_jet_lens(net, tokens).labels == list(net.components) != list(own.components)
    for granularity in ("sublayer", "head"):
        joint = joint_jet_lens(model, tokens, granularity=granularity)
        assert joint.labels == list(net.at(granularity).components)
        trace = net.at(granularity).trace(tokens)
        centers = torch.stack([trace[label] for label in joint.labels])
        close(centers.sum(0), hand.final)
        if granularity == "sublayer":
            close(centers, components(hand, joint.labels))
        check_optimal(joint, hand, check_joint(joint, hand, 0, centers), "centered_l2")
    without = joint_jet_lens(net, tokens, embeddings=False)
    assert without.labels == [label for label in net.components if "embed" not in label]
    check_joint(without, hand, 0)


@by_spec(SMALL)
def test_given_weights(spec):
    _, net, tokens, hand = setting(spec)
    n = len(net.components)
    given = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    joint = joint_jet_lens(net, tokens, order=1, weights=given / given.sum())
    assert joint.gap is None and joint.effective_rank is None and joint.objective == "given"
    close(joint.weights, (given / given.sum())[:, None, None].expand_as(joint.weights))
    check_joint(joint, hand, 1)
    # A lens' own weights fit back in, whatever positions it reads.
    for positions in (None, [1, 4]):
        solved = joint_jet_lens(net, tokens, order=1, positions=positions)
        again = joint_jet_lens(net, tokens, order=1, positions=positions, weights=solved.weights)
        close(again.kl, solved.kl)
        close(again.control.cosine.isnan().double(), torch.zeros_like(again.kl))
    padded = joint_jet_lens(net, ["w3 w4 w5", "w6"])
    again = joint_jet_lens(net, ["w3 w4 w5", "w6"], weights=padded.weights)
    torch.testing.assert_close(again.kl, padded.kl, equal_nan=True)
    lens = joint_jet_lens(net, tokens, weights=[1.0] + [0.0] * (n - 1))
    assert torch.equal(lens.top_ids[..., 0], lens.center_top_tokens().indices[0, ..., 0])


# --- how results look -----------------------------------------------------------------------------------------------


@by_spec(GPT2)
def test_dataframes_hold_the_cells(spec):
    _, net, tokens, _ = setting(spec)
    lens = iterative_jet_lens(net, tokens, order=1, positions=[2, -1], top_k=3)
    frame = lens.to_dataframe()
    assert len(frame) == len(lens.labels) * 2 * tokens.shape[0] * 2 * 3
    for layer, order, batch, p, rank in ((0, 0, 0, 0, 0), (2, 1, 2, 1, 2), (1, 1, 1, 0, 1)):
        cell = frame[
            (frame.layer == lens.labels[layer])
            & (frame.order == order)
            & (frame.batch == batch)
            & (frame.pos == [2, 6][p])
            & (frame["rank"] == rank)
        ]
        assert len(cell) == 1
        cell, index = cell.iloc[0], (layer, order, batch, p)
        assert cell.token == f" w{int(tokens[batch, [2, 6][p]])}"
        assert cell.token_index == lens.top_ids[(*index, rank)]
        assert cell.token_string == f" w{cell.token_index}" or cell.token_index < 3
        assert cell.logit == lens.full_values[(*index, rank)] and cell.own_logit == lens.own_values[(*index, rank)]
        assert cell.borrowed_share == lens.borrowed_share[index]
        for name in MEASURES:
            assert cell[name] == getattr(lens, name)[index]
            assert cell[f"control_{name}"] == getattr(lens.control, name)[index]
    assert len(lens.to_dataframe(top_k=1)) == len(frame) / 3
    for wrong in (0, -1, 4):
        with pytest.raises(ValueError, match=r"top_k must lie in 1\.\.3"):
            lens.to_dataframe(top_k=wrong)
    joint = joint_jet_lens(net, tokens, positions=[2, -1])
    frame = joint.to_dataframe()
    cell = frame[(frame.center == "1_block_out") & (frame.batch == 1) & (frame.pos == 6)].iloc[0]
    index = (joint.labels.index("1_block_out"), 1, 1)
    assert (cell.weights, cell.rho, cell.alpha) == tuple(
        float(value[index]) for value in (joint.weights, joint.rho, joint.alpha)
    )
    assert cell.token_index == joint.center_top_tokens().indices[(*index, 0)]


def word(token: Tensor) -> str:
    """What the tiny tokenizer's token adds after another one."""
    return " " + {0: "<unk>", 1: "<s>", 2: "</s>"}.get(int(token), f"w{int(token)}")


@by_spec(GPT2[:1])
def test_a_lens_is_indexed_by_layers_moves_and_completes(spec):
    _, net, tokens, _ = setting(spec)
    lens = iterative_jet_lens(net, tokens, order=1, targets=[3])
    part = lens[["final_post", "1_pre"]]
    assert part.labels == ["final_post", "1_pre"] and part.orders == lens.orders
    index = [lens.labels.index(label) for label in part.labels]
    assert torch.equal(part.kl, lens.kl[index]) and torch.equal(part.control.cosine, lens.control.cosine[index])
    assert torch.equal(part.top_ids, lens.top_ids[index]) and torch.equal(part.target_ranks, lens.target_ranks[index])
    assert torch.equal(part.tokens, lens.tokens) and torch.equal(lens["1_pre"].rho, lens.rho[[1]])
    frame, whole = lens["1_pre"].to_dataframe(), lens.to_dataframe()
    assert frame.equals(whole[whole.layer == "1_pre"].reset_index(drop=True))
    for wrong in ("3_pre_", [], ["1_pre", "L0H0"]):
        with pytest.raises(ValueError, match="indexed by its layers"):
            lens[wrong]
    joint = joint_jet_lens(net, tokens)
    for result in (lens, joint):
        moved = result.to("meta")
        assert moved.kl.device.type == moved.top_ids.device.type == "meta" and result.kl.device.type == "cpu"
        assert {"kl", "cosine", "to", "top_ids"} <= set(dir(result))


@by_spec(SMALL)
def test_a_lens_is_indexed_by_names_of_transformer_lens(spec, tmp_path):
    """The layer that a name means has the stream of that name in TransformerLens' own cache."""
    model, net, tokens, _ = setting(spec)
    with full_precision():
        _, cache = model.run_with_cache(tokens)
    computed, norm = iterative_jet_lens(net, tokens, order=0, center_scale="none"), net.decoder.norm
    for lens in (computed, load(computed.save(tmp_path / "lens.safetensors"))):
        for name in [
            ("resid_pre", 0),
            ("resid_pre", -1),
            ("resid_post", 0),
            ("resid_post", -1),
            "blocks.1.hook_resid_pre",
        ]:
            own = norm(cache[name]) @ net.decoder.W_U + net.decoder.b_U
            wanted = own.topk(lens.top_ids.shape[-1]).values
            torch.testing.assert_close(lens[name].full_values[0, 0][lens.valid], wanted[lens.valid])
        assert lens[[("resid_post", 0), "0_pre"]].labels == ["1_pre", "0_pre"]
        for wrong in (("resid_pre", 99), "blocks.0.hook_nothing", ("mlp_out", 0)):
            with pytest.raises(ValueError, match=r"TransformerLens' names|indexed by its layers"):
                lens[wrong]
    assert not torch.equal(computed["resid_pre", 0].full_values, computed["resid_post", 0].full_values)


@by_spec(SMALL)
def test_a_joint_lens_is_indexed_by_names_of_transformer_lens(spec, tmp_path):
    """The effects of a component are those of TransformerLens' own activation, through the norm at its own scale."""
    model, net, tokens, _ = setting(spec)
    with full_precision():
        _, cache = model.run_with_cache(tokens)
    computed, norm = (
        joint_jet_lens(net, tokens, granularity="sublayer", linearize="detached", targets=[3, 5]),
        net.decoder.norm,
    )
    final = norm.center(cache["resid_post", -1])
    scale = (final.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()
    for joint in (computed, load(computed.save(tmp_path / "joint.safetensors"))):
        for name in (("mlp_out", -1), "blocks.0.hook_attn_out", "hook_embed"):
            logits = norm.scale(norm.center(cache[name]) * scale) @ net.decoder.W_U
            wanted = (logits - logits.mean(-1, keepdim=True))[..., [3, 5]]
            torch.testing.assert_close(joint[name][joint.valid], wanted[joint.valid].double())
        assert torch.equal(joint["0_mlp_out"], joint["mlp_out", 0])
        for wrong in (("mlp_out", 99), "blocks.0.hook_nothing", ("resid_pre", 0), "0_mlp"):
            with pytest.raises(ValueError, match=r"TransformerLens' names|indexed by one of its components"):
                joint[wrong]


@by_spec(GPT2)
def test_top_tokens_and_repr(spec):
    _, net, _, _ = setting(spec)
    prompts = ["w5 w9 w33", "w21"]
    lens, joint = iterative_jet_lens(net, prompts, order=1, top_k=2), joint_jet_lens(net, prompts, top_k=2)
    words = lens.top_tokens()
    assert list(words) == lens.labels
    ids = lens.top_ids[1]
    for order, batch, pos, k in ((0, 0, 3, 1), (1, 1, 0, 0)):
        assert words["1_pre"][order][batch][pos][k] == word(ids[order, batch, pos, k])
    assert words["0_pre"][0][1][3] == [None, None]  # padding
    assert joint.top_tokens()[0][2] == [word(token) for token in joint.top_ids[0, 2]]
    for text in ("IterativeJetLens(", "0_pre..final_post", "orders 0..1", "tokens [2, 4]", "'none'"):
        assert text in repr(lens)
    for text in ("JointJetLens(", "order 0", "tokens [2, 4]", "'centered_l2'"):
        assert text in repr(joint)


def test_plain_callables():
    """A network without TransformerLens, a tokenizer or learned positions."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
    decoder = Decoder(
        norm=Norm("RMS"), W_U=torch.randn(5, 9, generator=generator, dtype=torch.float64), b_U=W[0, 0, :1].expand(9)
    )
    table = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    net = ResidualNetwork(
        CallableModel(lambda z: table[z], [{"a": lambda x: x @ W[1]}, {"b": lambda x: torch.tanh(x @ W[2])}], decoder)
    )
    tokens = torch.tensor([[1, 4, 8]])
    lens = iterative_jet_lens(net, tokens, order=2, top_k=9)
    assert lens.labels == ["0_pre", "1_pre", "final_post"]
    x = table[tokens]
    y = net.trace(tokens)["final_post"]
    value = oracles.nested_jvp_coefficients(lambda h: oracles.rms_norm(h), x, y - x, 2).sum(0)
    close(lens.full_values[0, 2], (value @ decoder.W_U + decoder.b_U).sort(-1, descending=True).values)
    assert lens.to_dataframe().token_string[0] == str(int(lens.top_ids[0, 0, 0, 0, 0]))
    assert lens.top_tokens()["0_pre"][0][0][2] == [str(token) for token in lens.top_ids[0, 0, 0, 2].tolist()]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        iterative_jet_lens(net, tokens, targets="a")
    assert joint_jet_lens(net, tokens).labels == ["embed", "a_out", "b_out"]


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = [
    ({"order": -1}, ValueError, "order must be an integer >= 0; got -1"),
    ({"order": 1.0}, TypeError, "order must be an integer >= 0; got 1.0"),
    ({"order": True}, TypeError, "order must be an integer >= 0; got True"),
    ({"order": "1"}, TypeError, "order must be an integer >= 0; got '1'"),
    ({"center_scale": "half"}, ValueError, "center_scale must be one of .* got 'half'"),
    ({"top_k": 0}, ValueError, "top_k must be an integer >= 1; got 0"),
    ({"top_k": zoo.D_VOCAB + 1}, ValueError, "k must be between 1 and d_vocab = 61, got 62"),
    ({"top_k": 2.5}, TypeError, "top_k must be an integer >= 1; got 2.5"),
    ({"positions": 7}, ValueError, r"positions must lie in -7\.\.6 for this input; got 7"),
    ({"positions": [0, -8]}, ValueError, r"positions must lie in -7\.\.6 for this input; got -8"),
    ({"positions": []}, ValueError, "positions must name at least one position; got none"),
    ({"positions": [2, 3, -5]}, ValueError, "positions must be distinct"),
    ({"positions": True}, TypeError, "positions must be None, an integer or a sequence of integers; got True"),
    ({"positions": [True, False]}, TypeError, "positions must be None, an integer or"),
    ({"positions": torch.ones(7).bool()}, TypeError, "positions must be None, an integer or"),
    ({"positions": slice(0, 2)}, TypeError, "Write a slice as a range"),
    ({"positions": 1.0}, TypeError, "positions must be None, an integer or"),
    ({"positions": "12"}, TypeError, "positions must be None, an integer or"),
]
REFUSED_BY_THE_ITERATIVE_LENS = [
    ({"chunk_size": 0}, ValueError, "chunk_size must be an integer >= 1; got 0"),
    ({"layers": [0, "9_pre"]}, ValueError, r"layers must be 0\.\.2, stream labels such as .*; got '9_pre'"),
    ({"layers": [3]}, ValueError, r"layers must be 0\.\.2, stream labels.*; got 3"),
    ({"layers": []}, ValueError, "layers must name at least one stream; got none"),
    ({"layers": [True]}, ValueError, "layers must be .*; got True"),
    ({"layers": "0_attn_out"}, ValueError, "layers must be .*; got '0_attn_out'"),
    ({"layers": [1, "1_pre"]}, ValueError, "layers must be distinct streams"),
    ({"layers": [1], "incl_mid": True}, ValueError, "incl_mid adds streams to layers=None; got layers, too"),
    ({"targets": "w3 w4"}, ValueError, "A target must be a single token that the tokenizer knows; 'w3 w4' is 2"),
    ({"targets": ""}, ValueError, "A target must be a single token that the tokenizer knows; '' is 0"),
    (
        {"targets": "unheard"},
        ValueError,
        r"A target must be a single token that the tokenizer knows; 'unheard' is 1: \['<unk>'\]",
    ),
    ({"targets": "id:61"}, ValueError, r"targets must be token ids in 0\.\.60, or strings of one; got 'id:61'"),
    ({"targets": zoo.D_VOCAB}, ValueError, r"targets must be token ids in 0\.\.60, or strings of one; got 61"),
    ({"targets": [3, -1]}, ValueError, r"targets must be token ids in 0\.\.60, or strings of one; got -1"),
    ({"targets": []}, ValueError, "targets must name at least one token; got none"),
    ({"targets": True}, TypeError, "targets must be strings, token ids, or a tensor of ids; got True"),
    ({"targets": [1.5]}, TypeError, "targets must be strings, token ids, or a tensor of ids; got 1.5"),
    ({"targets": torch.zeros(3, 7)}, ValueError, "A tensor of targets must hold ids .* got torch.float32"),
    ({"targets": torch.zeros(3, 7).bool()}, ValueError, "A tensor of targets must hold ids .* got torch.bool"),
    ({"targets": torch.zeros(3, 6).long()}, ValueError, r"aligned with positions; got torch.int64 \(3, 6\)"),
    ({"targets": torch.tensor([3, 4])}, ValueError, r"A tensor of targets .* may be a list"),
    (
        {"targets": torch.zeros(3, 7).long(), "positions": [1, 2]},
        ValueError,
        r"batch and pos \(3, 2\), aligned with positions; got torch.int64 \(3, 7\)",
    ),
    ({"targets": torch.full((3, 7), 61)}, ValueError, "targets must be token ids from 0 to 60"),
]
REFUSED_BY_THE_JOINT_LENS = [
    ({"objective": "mse"}, ValueError, "objective must be one of .* got 'mse'"),
    ({"weights": "best"}, ValueError, "weights must be 'optimal', 'uniform' or numbers on the simplex; got 'best'"),
    ({"weights": [0.5, 0.5]}, ValueError, "weights"),
    ({"weights": [0.7, 0.5, -0.2, 0.0]}, ValueError, "weights"),
    ({"weights": [0.5, 0.5, 0.5, 0.5]}, ValueError, "weights"),
    ({"weights": torch.full((4, 3, 6), 0.25)}, ValueError, r"batch and pos \(3, 7\), aligned with positions"),
    ({"weights": torch.full((4, 7), 0.25)}, ValueError, r"weights must be \[center\] or \[center, batch, pos\]"),
    ({"weights": [0.25, 0.25, float("nan"), 0.5]}, ValueError, "weights"),
    ({"granularity": "neuron"}, ValueError, "granularity must be one of"),
]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("lens_of", "options", "error", "message"),
    [(lens, *case) for lens in (iterative_jet_lens, joint_jet_lens) for case in REFUSED]
    + [(iterative_jet_lens, *case) for case in REFUSED_BY_THE_ITERATIVE_LENS]
    + [(joint_jet_lens, *case) for case in REFUSED_BY_THE_JOINT_LENS],
)
def test_bad_options_are_refused(lens_of, options, error, message):
    _, net, tokens, _ = setting(GPT2[0])
    with pytest.raises(error, match=message):
        lens_of(net, tokens, **options)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("lens_of", [iterative_jet_lens, joint_jet_lens])
@by_spec(GPT2)
def test_bad_inputs_are_refused(spec, lens_of):
    _model, net, tokens, _ = setting(spec)
    for text in ("", [], ["w3", ""]):
        with pytest.raises(ValueError, match=r"prompt must have at least one character|must hold at least one prompt"):
            lens_of(net, text)
    with pytest.raises(ValueError, match="must fit the context of 32 tokens; got 41"):
        lens_of(net, " ".join(["w5"] * 40))
    with pytest.raises(ValueError, match="tokenizer of another model"):
        lens_of(net, torch.tensor([[3, 61]]))
    with pytest.raises(TypeError, match="Token ids must be integers"):
        lens_of(net, torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match="attention_mask must have the tokens' shape"):
        lens_of(net, tokens, attention_mask=torch.ones(3, 6))
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    with pytest.raises(ValueError, match=r"positions must lie in -5\.\.4 for this input; got 5"):
        lens_of(net, tokens, attention_mask=mask, positions=[0, 5])
    with pytest.raises(ValueError, match="already holds its attention mask"):
        lens_of(net, net.trace(tokens), attention_mask=mask)
    other = ResidualNetwork(zoo.fresh(spec))
    with pytest.raises(ValueError, match="A trace must be of the same model"):
        lens_of(net, other.trace(tokens))
    with pytest.raises(TypeError, match="A model must be"):
        lens_of(torch.nn.Linear(2, 2), tokens)
    training = zoo.fresh(spec)
    training.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        lens_of(training, tokens)
    broken = ResidualNetwork(zoo.fresh(spec))
    with torch.no_grad():
        next(p for name, p in broken.view.model.named_parameters() if "ln_final" in name or "ln_f" in name).fill_(
            math.nan
        )
    with pytest.raises(ValueError, match="A norm must give finite numbers"):
        lens_of(broken, tokens)


# --- a real model ---------------------------------------------------------------------------------------------------

PROMPTS = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside",
    "One day, a big dog saw a cat in the park. The dog wanted to",
    "Tom had a red ball. He threw it to his friend",
]


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
@pytest.mark.parametrize("world", ["bridge"] if zoo.HookedTransformer is None else ["bridge", "hooked"])
def test_objectives_on_a_real_model(world):
    """In KL, kl weights beat both quadratic objectives, and the uniform ones stand beside."""
    net = ResidualNetwork(zoo.load_stories(world), "block")
    trace = net.trace(PROMPTS)
    lenses = {kind: joint_jet_lens(net, trace, objective=kind) for kind in ("l2", "centered_l2", "kl")}
    kl = {kind: float(lens.measures.mean()["kl"]) for kind, lens in lenses.items()}
    assert kl["kl"] < 0.3 < min(kl["centered_l2"], kl["l2"]) < 1.5
    assert kl["centered_l2"] <= kl["l2"] + 0.05
    for lens in lenses.values():
        assert float(lens.gap[lens.valid].max()) < 1e-6
    # Order-0 readings of early layers are no better than a random center's: what the control is for.
    lens = iterative_jet_lens(net, trace, order=2)
    assert bool(lens.borrowed[1:-1, 1][:, lens.valid].double().mean() > 0.5)
    average = lens.average().set_index(["layer", "order"])
    assert average.kl["0_pre", 1] > 0.5 * average.control_kl["0_pre", 1]
    assert average.rho["0_pre", 0] > 1
    matched = iterative_jet_lens(net, trace, order=2, center_scale="match").average().set_index(["layer", "order"])
    assert matched.kl["0_pre", 2] < 0.1 * average.kl["0_pre", 2]
