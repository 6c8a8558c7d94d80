"""Attention sinks and averages without them, against numpy on the streams of models whose sinks are built in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from torch.nn.functional import silu

import tl_jets as tj
from tl_jets.core.averages import averages, middle
from tl_jets.core.numerals import number
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.paths.statistics import path_sums

PROMPTS = torch.tensor([[3, 1, 4, 1, 5], [2, 0, 5, 3, 3], [1, 1, 2, 4, 5]])  # token 0 is a sink


@pytest.fixture(scope="module")
def network():
    """A model whose token 0 has a stream a hundred times as long as others, after the first block only."""
    generator = torch.Generator().manual_seed(4)
    embedding = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    W = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    W_U = torch.randn(8, 11, dtype=torch.float64, generator=generator)
    marker = embedding[0] / embedding[0].square().sum()
    model = tj.CallableModel(
        embed=lambda tokens: embedding[tokens],
        stages=[
            {"0_mlp": lambda x: silu(x @ W[0]) + 20 * silu(100 * (x @ marker)[..., None] - 90) * W[0, 0]},
            {"1_mlp": lambda x: silu(x @ W[1] / 100)},
        ],
        decoder=tj.Decoder(tj.Norm("RMS"), W_U, torch.zeros(11, dtype=torch.float64)),
    )
    return tj.ResidualNetwork(model)


def test_positions_of_long_streams_are_sinks_of_every_result(network):
    wanted = PROMPTS == 0
    assert (network.trace(PROMPTS)["1_pre"].norm(dim=-1)[wanted] > 300).all()
    iterative, joint = tj.iterative_jet_lens(network, PROMPTS), tj.joint_jet_lens(network, PROMPTS)
    for result in (iterative, joint, path_sums(network, PROMPTS)):
        assert torch.equal(result.sinks.mask, wanted) and not result.sinks.bos.any()
        assert "averages leave out 1 of 15 positions: 1 with outlying streams" in repr(result)
        assert bool(result.valid.all())
    kept = iterative.kl[:, :, ~wanted].mean(-1)
    assert iterative.average().kl.to_numpy() == pytest.approx(kept.flatten().numpy())
    assert iterative.average(include_sinks=True).kl.to_numpy() == pytest.approx(iterative.kl.mean((-2, -1)).flatten())
    assert joint.average().kl[0] == pytest.approx(float(joint.kl[~wanted].mean()))
    sums = path_sums(network, PROMPTS)
    assert sums.average()["size"].to_numpy() == pytest.approx(sums.effect[:, ~wanted].abs().mean(-1).numpy())


def test_medians_are_of_whole_prompts_and_of_each_alone(network):
    one = tj.iterative_jet_lens(network, PROMPTS[1:2], positions=[1, 2])
    assert one.sinks.outlying.tolist() == [[True, False]]
    only = tj.iterative_jet_lens(network, PROMPTS[1:2], positions=1)
    with pytest.raises(ValueError, match="no attention sink; here all are BOS or have outlying streams"):
        only.average()
    assert only.average(include_sinks=True).kl.notna().all()


def test_norms_of_a_jet_cache_in_a_notebook_leave_out_sinks(network):
    cache = tj.jet_expand(network, "1_mlp", centers=["embed", "0_mlp_out"], order=0, center_scale="match")(PROMPTS)

    def shown(cache, keep) -> str:
        return f">{number(float(cache['embed > 1_mlp'].norm(dim=-1)[keep].mean()))}<"

    assert shown(cache, PROMPTS != 0) in cache._repr_html_() and shown(cache, cache.valid) not in cache._repr_html_()
    assert "leave out 1 attention sinks" in cache._repr_html_()
    cut = cache.apply_slice_to_pos_dim([0, 1])
    assert shown(cut, PROMPTS[:, :2] != 0) in cut._repr_html_()
    alone = cache.apply_slice_to_batch_dim(1).apply_slice_to_pos_dim(1)  # nothing but the sink
    assert shown(alone, alone.valid) in alone._repr_html_() and "attention sinks" not in alone._repr_html_()


def test_means_of_measures_and_interactions_leave_out_sinks(network):
    others = PROMPTS != 0
    for lens in (tj.iterative_jet_lens(network, PROMPTS), tj.joint_jet_lens(network, PROMPTS)):
        for name, values in lens.measures.items():
            assert torch.allclose(lens.measures.mean()[name], values[..., others].mean(-1))
            assert torch.allclose(lens.measures.mean(include_sinks=True)[name], values.mean((-2, -1)))
    pairs = tj.paths.interactions(network, PROMPTS, positions=None)
    first = pairs.average().iloc[0]
    i, j = pairs.labels.index(first["first"]), pairs.labels.index(first["second"])
    wanted = pairs.matrix[i, j] + (pairs.matrix[j, i] if i != j else 0)
    assert first["effect"] == pytest.approx(float(wanted[others].mean()))
    assert first["size"] == pytest.approx(float(wanted[others].abs().mean()))
    assert "leave out 1 of 15 positions" in repr(pairs)
    assert len(tj.concat([pairs, pairs]).average()) == len(pairs.average())


def test_what_is_shown_of_sinks_alone(network):
    """A position that is a sink is shown if it is the only one; views choose parts by the other positions."""
    only = PROMPTS[1:2], 1
    pairs, sums = (of(network, only[0], positions=only[1]) for of in (tj.paths.interactions, path_sums))
    assert pairs.only_sinks and pairs.counted.all() and "leave out 1 of 1" in repr(pairs)
    assert str(pairs).count("\n") == 1 + len(pairs.average(include_sinks=True))
    assert "<table" in sums._repr_html_() and not path_sums(network, PROMPTS).only_sinks
    lens = tj.iterative_jet_lens(network, only[0], positions=only[1])
    assert torch.equal(lens.measures.mean()["kl"], lens.kl[..., 0, 0])
    effects = torch.zeros(len(sums.labels), 1, 5, 1, dtype=torch.float64)
    effects[0, 0, 1], effects[1, 0, 2] = 100, 1  # the first part is large at the sink only
    sums = replace(path_sums(network, PROMPTS[1:2]), effects=effects)
    assert sums.labels[1] in tj.views.path_tokens(sums, top=1).html
    assert sums.labels[0] not in tj.views.path_tokens(sums, top=1).html


def test_saved_results_keep_their_sinks(network, tmp_path):
    lens = tj.iterative_jet_lens(network, PROMPTS)
    again = tj.load(lens.save(tmp_path / "lens.safetensors"))
    assert torch.equal(again.sinks.mask, lens.sinks.mask) and again.average().equals(lens.average())


def test_medians_intervals_and_groups_stand_beside_means(network):
    lens = tj.iterative_jet_lens(network, PROMPTS, order=0, layers=[0])
    kl, kept = lens.kl[0, 0].numpy(), (PROMPTS != 0).numpy()
    row = lens.average(spread=True).iloc[0]
    assert row.kl == pytest.approx(kl[kept].mean()) and row.kl_median == pytest.approx(np.median(kl[kept]))
    # All 27 ways to draw three prompts of three, each equally likely.
    sums, sizes = np.where(kept, kl, 0).sum(1), kept.sum(1)
    draws = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    assert [row.kl_low, row.kl_high] == pytest.approx([means.min(), means.max()], rel=1e-9)
    table = lens.average(group_by=["b", "a", "b"])
    assert table.columns[0] == "group" and table.group.tolist() == ["b", "a"]
    assert table.kl.tolist() == pytest.approx([kl[[0, 2]].mean(), kl[1][kept[1]].mean()])
    assert lens.average(group_by=["b", "a", "b"], spread=True).kl_low.isna().tolist() == [False, True]
    with pytest.raises(ValueError, match="one label per prompt, 3 here; got 2"):
        lens.average(group_by=["b", "a"])


def test_bos_is_a_sink_at_the_start_only():
    model = zoo.build(next(spec for spec in zoo.available(["llama"]) if spec.world == "bridge"))
    network = tj.ResidualNetwork(model)
    bos = model.tokenizer.bos_token_id
    tokens = torch.tensor([[bos, 5, bos, 9], [5, 6, 7, 8], [0, 0, bos, 5]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]])
    lens = tj.iterative_jet_lens(network, tokens, attention_mask=valid)
    assert lens.sinks.bos.tolist() == [[True, False, False, False], [False] * 4, [False, False, True, False]]
    assert repr(lens).endswith("averages leave out 2 of 10 positions: 2 BOS)")
    effect = ablation_effect(network, tokens[:1], ["1_mlp"], positions=[0, 3])
    assert effect.sinks.bos.tolist() == [[True, False]]
    assert effect.average().kl[0] == pytest.approx(float(effect.kl[0, 0, 1]))


def test_averages_of_what_is_missing():
    values = torch.tensor([[[1.0, float("nan"), 4.0]]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    row = averages([{}], {"rho": values}, valid, spread=True).iloc[0]
    assert row.rho == 2.5 and row.rho_median == 2.5 and np.isnan(row.rho_low)


def test_medians_of_many_values():
    values = torch.randn(3, 2**23, generator=torch.Generator().manual_seed(0))  # more than torch.quantile takes
    assert middle(values).numpy() == pytest.approx(np.median(values.double().numpy(), -1))
    assert middle(torch.tensor([[1.0, 2.0, float("nan"), 5.0, 9.0], [float("nan")] * 5])).tolist()[0] == 3.5
