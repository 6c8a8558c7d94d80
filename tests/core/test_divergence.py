"""The warning of jets that leave more than there is: when, with which numbers, and at whose line."""

from __future__ import annotations

import warnings

import pytest
import torch
from commands import run, tinydocs
from torch import Tensor

import tl_jets as tj
from tl_jets import CallableModel, Decoder, Norm
from tl_jets.core.divergence import DivergenceWarning

D = 6


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(length: float) -> tj.ResidualNetwork:
    """An embedding of a length beside a write of length 1, then a normed step; rho of the embedding is about 1 / length."""
    table, write = normal(7, D, seed=1), normal(D, seed=2)
    table = length * table / table.square().mean(-1, keepdim=True).sqrt()
    norm, W = Norm("RMS", eps=1e-12), normal(D, D, seed=3)
    stages = [
        {"0_mlp": lambda x: 0 * x + write / write.square().mean().sqrt()},
        {"1_mlp": lambda x: norm(x) @ W},
    ]
    decoder = Decoder(norm, normal(D, 9, seed=4), normal(9, seed=5))
    return tj.ResidualNetwork(CallableModel(lambda tokens: table[tokens], stages, decoder))


TOKENS = torch.tensor([[1, 4, 2]])


@pytest.mark.parametrize("step", ["1_mlp", "ln_final"])
def test_jets_that_diverge_are_warned_of_with_numbers(step):
    net = network(0.02)
    with pytest.warns(DivergenceWarning) as caught:
        cache = tj.jet_expand(net, step, centers=["embed"], order=2)(TOKENS)
    (warning,) = caught
    assert warning.filename == __file__  # the caller's own line
    text = str(warning.message)
    assert (
        f"Order-2 jets of {step} leave {cache.relative_remainder:,.3g} times" in text and cache.relative_remainder > 100
    )
    trace, size = net.trace(TOKENS), lambda x: x.square().mean(-1).sqrt()
    stream = trace["final_post" if step == "ln_final" else "1_pre"]
    rho = float((size(stream - trace["embed"]) / size(trace["embed"])).max())
    assert f"largest rho of a center is {rho:.3g};" in text and 'center_scale="orthogonal"' in text


def test_what_leaves_less_than_there_is_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for order in (1, 2, 3):
            tj.jet_expand(network(20.0), "1_mlp", centers=["embed"], order=order)(TOKENS)
        diverging = network(0.02)
        tj.jet_expand(diverging, "1_mlp", centers=["embed"], order=0)(TOKENS)  # nothing converges at order 0
        tj.jet_expand(diverging, "1_mlp", centers=["embed"], linearize="detached")(TOKENS)
        tj.exponential_expansion(diverging, 1, through="1_mlp")(TOKENS)  # what filters leave out is no divergence
        tj.exponential_expansion(diverging, linearize="detached")(TOKENS)


def test_paths_and_interactions_are_warned_of():
    net = network(0.02)
    with pytest.warns(DivergenceWarning, match=r"jets of all stages \(at .*\) leave") as caught:
        paths = tj.exponential_expansion(net, 1)(TOKENS)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert f"{max(paths.remainders.values()):,.3g} times" in str(caught[0].message)
    with pytest.warns(DivergenceWarning, match="Order-2 jets of ln_final leave") as caught:
        tj.paths.interactions(net, TOKENS, center_scale="none")
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_default_of_interactions_converges():
    """Degrees 0 to 2 come close to the logit by default, and not with the centers as they are."""
    prompt = "This function is available on Unix and"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = tj.paths.interactions(tinydocs(), prompt)
    logit = float(pairs.logit)
    assert pairs.center_scale == "orthogonal" and abs(float(pairs.degrees.sum()) - logit) < 0.3 * abs(logit)
    with pytest.warns(DivergenceWarning):
        plain = tj.paths.interactions(tinydocs(), prompt, center_scale="none")
    assert abs(float(plain.degrees.sum()) - logit) > abs(logit)


def test_commands_show_the_remainder_and_do_not_warn(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "remainder" in run(capsys, "paths", "--linearize", "jet", "--order", "1")
