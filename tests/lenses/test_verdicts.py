"""Verdicts on lenses whose answer is known by construction: the control wins, the series diverges, order 1 leads."""

from __future__ import annotations

import pytest
import torch

import tl_jets as tj
from tl_jets.lenses.verdicts import changing, verdict_of

TOKENS = torch.arange(20)[None]


def model(write: torch.Tensor, gains: torch.Tensor) -> tj.CallableModel:
    """A model of one block that adds a vector to every stream; what the unembedding does not read, the block removes."""
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(20, 16, dtype=torch.float64, generator=generator)
    embedding = torch.where(gains == 0, -write, embedding)
    W_U = torch.randn(16, 31, dtype=torch.float64, generator=generator) * gains[:, None]
    return tj.CallableModel(
        embed=lambda tokens: embedding[tokens],
        stages=[{"0_mlp": lambda x: write.expand_as(x).clone()}],
        decoder=tj.Decoder(tj.Norm("RMS"), W_U, torch.zeros(31, dtype=torch.float64)),
    )


def direction(index: int, length: float) -> torch.Tensor:
    return length * torch.eye(16, dtype=torch.float64)[index]


def test_what_the_unembedding_does_not_read_is_found_by_the_layer_and_missed_by_its_control():
    """The block removes what W_U is blind to: the layer's stream has the answer, random vectors like it have it less."""
    gains = torch.ones(16, dtype=torch.float64)
    gains[5] = 0
    lens = tj.iterative_jet_lens(model(direction(5, 4.0), gains), TOKENS, order=1)
    verdict = lens.verdict()
    assert verdict.own.tolist() == [[True, True]] and verdict.n_controls == 20
    assert float(verdict.rho[0]) < 1 and float(verdict.leads[0]) == 1
    assert verdict.lines == [
        "Order 1 beats its control at every layer.",
        "Order 0 (the logit lens) beats its control at every layer; the answer first leads at 0_pre, and from there on.",
    ]


def test_where_the_layer_points_away_from_the_answer_its_control_wins():
    """The block moves the stream along the one direction that W_U reads: nothing of the answer is in the layer."""
    gains = torch.full((16,), 0.05, dtype=torch.float64)
    gains[5] = 3
    verdict = tj.iterative_jet_lens(model(direction(5, 8.0), gains), TOKENS, order=1).verdict()
    assert not verdict.own.any()
    assert verdict.lines[0].startswith("Order 1 says nothing of its own at any layer: the control is as good")


def test_a_series_that_diverges_is_said_first():
    verdict = tj.iterative_jet_lens(model(direction(5, 90.0), torch.ones(16).double()), TOKENS, order=2).verdict()
    assert float(verdict.rho[0]) > 1
    assert "Order 2" in verdict.lines[0] and "its series diverges at 1 of 1 layers (0_pre)" in verdict.lines[0]


def test_draws_and_missing_controls():
    net = tj.ResidualNetwork(model(direction(5, 3.0), torch.ones(16).double()))
    lens = tj.iterative_jet_lens(net, TOKENS, positions=[4], order=0)
    assert "is not judged: 1 draw of its control" in lens.verdict().lines[0] and lens.verdict().own is None
    more = [tj.iterative_jet_lens(net, TOKENS, positions=[4], order=0, seed=i).control.kl for i in range(1, 8)]
    verdict = lens.verdict(controls=more)
    draws = torch.stack([lens.control.kl, *more])[..., 0, 0, 0, 0]
    kl = lens.kl[0, 0, 0, 0]
    assert verdict.n_controls == 8 and float(verdict.wins[0, 0]) == pytest.approx(float((kl < draws).double().mean()))
    assert float(verdict.ratio[0, 0]) == pytest.approx(float(kl / draws.quantile(0.5)))
    once = tj.iterative_jet_lens(net, TOKENS, positions=[4], order=0, draws=8)
    torch.testing.assert_close(once.control_draws[0, 0, 0, 0], draws, rtol=1e-9, atol=0)
    torch.testing.assert_close(once.verdict().ratio, verdict.ratio)
    assert once.verdict().n_controls == 8 and once.verdict().lines == verdict.lines and lens.control_draws is None
    assert once["final_post"].control_draws.shape == (1, 1, 1, 1, 8)
    both = tj.iterative_jet_lens(net, torch.cat([TOKENS, TOKENS.flip(1)]), order=1, draws=3, seed=2)
    halves = [tj.iterative_jet_lens(net, x, order=1, draws=3, seed=2) for x in (TOKENS, TOKENS.flip(1))]
    torch.testing.assert_close(tj.concat(halves).control_draws, both.control_draws)
    for i in range(3):
        alone = tj.iterative_jet_lens(net, both.tokens, order=1, seed=2 + i).control
        torch.testing.assert_close(both.control_draws[..., i], alone.kl)
    with pytest.raises(ValueError, match="draws must be an integer >= 1"):
        tj.iterative_jet_lens(net, TOKENS, draws=0)
    for options in ({"seed": None}, {"measures": False}):
        bare = tj.iterative_jet_lens(net, TOKENS, **options).verdict()
        assert bare.own is None and "without a control: it is no evidence about a layer" in bare.lines[0]
    last = tj.iterative_jet_lens(net, TOKENS, layers=[-1]).verdict()
    assert last.lines == ["Only the final stream was read: it is the model itself."]
    assert "The detached reading" in tj.iterative_jet_lens(net, TOKENS, linearize="detached").verdict().lines[0]


def test_sentences_name_the_layers():
    labels = [f"{i}_pre" for i in range(6)] + ["final_post"]
    kl = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.5, 0.5, 0.0])[:, None, None].expand(7, 1, 5).double()
    rho = torch.tensor([9.0, 3.0, 0.5, 2.0, 0.5, 0.5, 0.0])[:, None].expand(7, 5).double()
    leads = torch.tensor([0, 0, 1, 0, 1, 1, 1]).bool()[:, None].expand(7, 5)
    given = {"rho": rho, "leads": leads, "controls": [torch.full_like(kl, 0.9)], "is_detached": False}
    mixed = verdict_of(labels, [1], kl=kl, **given)
    assert mixed.lines == [
        "Order 1 beats its control at 3 of 6 layers (2_pre, 4_pre..5_pre), not elsewhere; its series diverges at 3 of 6 "
        "layers (0_pre..1_pre, 3_pre); the answer first leads at 2_pre, in all at 3 of 6 layers (2_pre, 4_pre..5_pre)."
    ]
    tail = verdict_of(labels, [0], kl=kl.clone().index_fill(0, torch.tensor(2), 1.0), **given)
    assert tail.lines[0].startswith(
        "Order 0 (the logit lens) says nothing of its own before 4_pre: the control is as good;"
    )
    close = verdict_of(labels, [0], kl=torch.full_like(kl, 0.85), **given)  # below all controls, by less than a fifth
    assert not close.own.any() and (close.wins == 1).all()


def test_a_layer_between_its_controls_is_undecided():
    """KL .3 of the median control's, but above one draw in five: no evidence, and not "as good" either."""
    labels = [f"{i}_pre" for i in range(4)] + ["final_post"]
    kl = torch.tensor([1.0, 0.3, 0.5, 0.1, 0.0])[:, None, None].expand(5, 1, 2).double()
    draws = [torch.full_like(kl, value) for value in (1.0, 1.0, 1.0, 1.0, 0.2)]
    given = {"rho": torch.zeros(5, 2).double(), "leads": torch.tensor([[0, 0], [0, 1], [0, 1], [1, 1], [1, 1]]).bool()}
    found = verdict_of(labels, [0], kl=kl, controls=draws, is_detached=False, **given)
    assert found.own[:, 0].tolist() == [False, False, False, True]
    assert found.undecided[:, 0].tolist() == [False, True, True, False]
    near = "best at 1_pre, KL 0.30 of the median control's, below 80% of draws"
    lead = "; the answer first leads at most positions at 3_pre, and from there on."
    name = "Order 0 (the logit lens) says nothing certain of its own"
    assert found.lines == [f"{name} before 3_pre: {near}{lead}"]
    shorter = {"rho": given["rho"][[0, 1, 2, 4]], "leads": torch.zeros(4, 2).bool()}
    short = verdict_of(
        [*labels[:3], "final_post"],
        [0],
        kl=kl[[0, 1, 2, 4]],
        controls=[d[:4] for d in draws],
        is_detached=False,
        **shorter,
    )
    assert short.lines == [f"{name} at any layer: {near}; the answer leads at the end only."]


def test_layers_where_something_changes():
    values = torch.tensor([[5.0], [5.0], [5.0], [1.0], [1.0], [1.0], [1.0], [0.0]])
    best = [[1], [1], [1], [1], [1], [2], [2], [3]]
    assert changing(values, best, 8) == list(range(8))
    assert changing(values, best, 5) == [0, 3, 5, 6, 7]


def test_the_first_layer_that_leads_is_found_by_looking():
    net = tj.ResidualNetwork(tj.load_tinydocs())
    lens = tj.iterative_jet_lens(net, ["This function is available on Unix and", "If the file does"], order=1)
    found = lens.first_leads()
    wanted = torch.full_like(found, -1)
    for order, b, pos in lens.valid[None].expand_as(found).nonzero().tolist():
        answer, layers = int(lens.model_top_ids[b, pos]), lens.top_ids[:, order, b, pos, 0].tolist()
        wanted[order, b, pos] = next(i for i in range(len(layers) + 1) if all(token == answer for token in layers[i:]))
    assert torch.equal(found, wanted) and (found == -1).any() and len(found[0].unique()) > 2
    assert (lens[["0_pre"]].first_leads()[0][lens.valid] == 1).any(), "after the last layer: it never leads"


def test_a_verdict_on_some_layers_says_nothing_of_the_others():
    net, prompt = tj.ResidualNetwork(tj.load_tinydocs()), "This function is available on Unix and"
    (some,) = tj.iterative_jet_lens(net, prompt, order=0, layers=[1], positions=-1, draws=8).verdict().lines
    assert "at any layer read" in some and some.endswith("the answer leads at none of the layers read.")
    (every,) = tj.iterative_jet_lens(net, prompt, order=0, positions=-1, draws=8).verdict().lines
    assert "layer read" not in every and "layers read" not in every
