"""Positions count among each prompt's real tokens, in every tool, however the prompts are padded."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import zoo
from torch import Tensor

import tl_jets as tj
from tl_jets import views
from tl_jets.core.selection import Rows

PROMPTS = [[5, 9, 30, 12, 7], [3, 41, 2], [8, 22, 6, 11]]
LENGTHS = [len(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def network() -> tj.ResidualNetwork:
    return tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [batch, pos]."""
    longest = max(LENGTHS)
    tokens, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        at = slice(0, len(prompt)) if side == "right" else slice(longest - len(prompt), longest)
        tokens[row, at], mask[row, at] = torch.tensor(prompt), 1
    return tokens, mask


def results(network: tj.ResidualNetwork, tokens: Any, positions: Any) -> dict[str, pd.DataFrame]:
    """Tables of every tool that takes positions, without the columns that depend on the batch."""
    trace = (
        network.trace(tokens) if not isinstance(tokens, tuple) else network.trace(tokens[0], attention_mask=tokens[1])
    )
    paths = tj.exponential_expansion(network, linearize="detached")
    jets = tj.exponential_expansion(network, order=1, avoiding="attn")
    best = tj.exponential_expansion(network, linearize="detached", top=5, max_paths=12)
    found: dict[str, Any] = {
        "iterative": tj.iterative_jet_lens(network, trace, positions=positions),
        "joint": tj.joint_jet_lens(network, trace, positions=positions, weights="uniform", center_scale="match"),
        "interactions": tj.paths.interactions(network, trace, positions=positions),
        "sums": tj.path_sums(network, trace, positions=positions),
        "lengths": tj.path_lengths(network, trace, positions=positions),
        "paths": paths(trace, positions=positions),
        "jets": jets(trace, positions=positions),
        "best": best(trace, positions=positions),
        "ablations": tj.ablation_effect(network, trace, positions=positions),
        "path ablations": tj.path_ablation(network, trace, "embed > 0_mlp > ln_final", positions=positions),
    }
    return {name: result.to_dataframe() for name, result in found.items()}


@functools.cache
def each_alone(network: tj.ResidualNetwork, positions: tuple[int, ...]) -> list[dict[str, pd.DataFrame]]:
    """What each prompt has alone."""
    return [results(network, torch.tensor([prompt]), positions) for prompt in PROMPTS]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", [-1, [0, -2]], ids=str)
def test_every_tool_reads_each_prompts_own_position(network, side, positions):
    """What each prompt has alone, whatever the padding; tables give the position within the prompt."""
    batch = results(network, padded(side), positions)
    for row, (prompt, alone) in enumerate(
        zip(PROMPTS, each_alone(network, tuple(np.atleast_1d(positions).tolist())), strict=True)
    ):
        wanted = sorted({p % len(prompt) for p in ([positions] if isinstance(positions, int) else positions)})
        for name, table in batch.items():
            own, other = table[table["batch"] == row].drop(columns="batch"), alone[name].drop(columns="batch")
            if name == "interactions":  # the largest first, with ties that are rounding
                own, other = (t.sort_values(["first", "second", "pos"]) for t in (own, other))
            own, other = (t.reset_index(drop=True) for t in (own, other))
            assert sorted(set(own["pos"])) == wanted, name
            if name == "best":  # which paths are largest over all prompts
                continue
            pd.testing.assert_frame_equal(own, other, check_dtype=False, rtol=1e-6, atol=1e-6, obj=name)


@pytest.mark.parametrize("side", ["right", "left"])
def test_results_hold_the_positions_of_every_prompt(network, side):
    tokens, mask = padded(side)
    trace = network.trace(tokens, attention_mask=mask)
    lens = tj.iterative_jet_lens(network, trace, positions=[-1, 1])
    assert lens.positions.tolist() == [[4, 1], [2, 1], [3, 1]]
    assert lens.tokens.tolist() == [[7, 9], [2, 41], [11, 22]] and bool(lens.valid.all())
    # The same positions in all prompts are one list, and what a shorter prompt has not is padding.
    lens = tj.iterative_jet_lens(network, trace, positions=[0, 3])
    assert lens.positions == [0, 3] and lens.valid.tolist() == [[True, True], [True, False], [True, True]]
    assert lens.tokens[:, 0].tolist() == [5, 3, 8]
    deep = tj.iterative_jet_lens(network, trace, positions=-5)
    assert deep.valid.tolist() == [[True], [False], [False]] and deep.positions == [0]
    # All positions: the cells of the padded rows.
    every = tj.iterative_jet_lens(network, trace)
    assert torch.equal(every.tokens, tokens) and torch.equal(every.valid, mask.bool())
    places = every.positions if isinstance(every.positions, list) else every.positions[1][mask[1].bool()].tolist()
    assert places[:3] == [0, 1, 2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_caches_are_sliced_by_prompt_and_position(network, side):
    tokens, mask = padded(side)
    trace = network.trace(tokens, attention_mask=mask)
    cache = tj.exponential_expansion(network, linearize="detached")(trace, positions=[-1, -2])
    assert cache.tokens.tolist() == [[7, 12], [2, 41], [11, 6]] and not cache.is_whole
    second = cache.apply_slice_to_pos_dim([1])
    assert second.tokens.tolist() == [[12], [41], [6]]
    assert second.statistics().positions.tolist() == [[3], [1], [2]]
    assert second.apply_slice_to_batch_dim(1).tokens.tolist() == [41]
    assert cache.apply_slice_to_batch_dim([2, 1]).to_dataframe()["pos"].unique().tolist() == [3, 2, 1]
    assert cache.apply_slice_to_pos_dim(0).tokens.tolist() == [7, 2, 11]
    assert cache.check().passed


def test_views_name_the_position_in_the_prompt(network):
    tokens, mask = padded("left")
    lens = tj.iterative_jet_lens(network, network.trace(tokens, attention_mask=mask), positions=[-1, -2])
    assert "position 2" in views.lens_table(lens, prompt=1).html
    assert "position 2" in views.lens_table(lens, prompt=1, positions=[2]).html
    with pytest.raises(ValueError, match=r"among those of the result, \[2, 1\]"):
        views.lens_table(lens, prompt=1, positions=[4])


def test_positions_are_distinct_in_every_prompt(network):
    trace = network.trace(padded("right")[0], attention_mask=padded("right")[1])
    with pytest.raises(ValueError, match="distinct"):
        Rows.of(trace, [2, -1])  # the same token of the second prompt
    with pytest.raises(ValueError, match=r"-5\.\.4"):
        Rows.of(trace, 5)
    with pytest.raises(ValueError, match="the same positions of the padded row"):
        tj.detached_jacobian(network, trace, positions=-1)
