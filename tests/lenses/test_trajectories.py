"""Ranks of answers by layer over many prompts, against the lens of each prompt alone, in loops."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import zoo

import tl_jets as tj
from tl_jets.core.intervals import median_intervals
from tl_jets.lenses.answers import other_answers

PROMPTS = ["w21 w7 w5", "w3", "w5 w9 w33 w4 w8", "w7 w8", "w30", "w6 w4 w1 w2", "w5 w5 w8", "w40 w2", "w11 w12"]


@pytest.fixture(scope="module")
def net() -> Any:
    return tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))


def alone(net: Any, prompt: str, targets: list[Any], **options: Any) -> Any:
    return tj.iterative_jet_lens(net, prompt, positions=-1, targets=targets, **options)


def leading(best: list[bool]) -> list[bool]:
    """From which layer on all are true."""
    return [all(best[i:]) for i in range(len(best))]


@pytest.mark.parametrize("given", [None, [f"w{i}" for i in (3, 3, 4, 3, 50, 7, 7, 8, 9)]])
def test_the_table_is_that_of_every_prompt_alone(net, given):
    lens = tj.answer_lens(net, PROMPTS, given, order=1, max_bytes=1)
    answers = given or [int(net.view.model(net.view.model.to_tokens(p))[0, -1].argmax()) for p in PROMPTS]
    others = []
    for i, own in enumerate(answers):
        after = answers[i + 1 :] + answers[:i]
        others.append(next(other for other in after if other != own))
    single = [alone(net, p, [own, other], order=1) for p, own, other in zip(PROMPTS, answers, others, strict=True)]
    table = lens.trajectories(include_sinks=True)
    assert list(table.target.unique()) == ["<answer>", "<other answer>"]
    assert len(table) == len(lens.labels) * 2 * 2
    rows = table.set_index(["layer", "order", "target"])
    for k, order in enumerate(lens.orders):
        for t, name in enumerate(lens.target_names):
            ranks = [[int(one.target_ranks[i, k, 0, 0, t]) for one in single] for i in range(len(lens.labels))]
            leads = np.array([leading([r[j] == 0 for r in ranks]) for j in range(len(PROMPTS))]).T
            random = np.array([leading((one.control.top1_agreement[:, k, 0, 0] == 1).tolist()) for one in single]).T
            for i, label in enumerate(lens.labels):
                row = rows.loc[(label, order, name)]
                assert row.rank_median == median(ranks[i])
                interval = scipy.stats.quantile_test(ranks[i], p=0.5).confidence_interval(0.95)
                assert (row.rank_low, row.rank_high) == tuple(interval)
                assert row.leads == pytest.approx(leads[i].mean())
                assert row.leads_low <= row.leads <= row.leads_high
                assert row.control_leads == pytest.approx(random[i].mean())


def test_leads_are_those_of_first_leads(net):
    lens = tj.answer_lens(net, PROMPTS, order=0)
    first = lens.first_leads()[0, :, 0]
    leads = lens.trajectories(include_sinks=True).query("target == '<answer>'").leads
    assert leads.tolist() == pytest.approx([float((first <= i).double().mean()) for i in range(len(lens.labels))])


def test_prompts_count_once_and_sinks_do_not(net):
    lens = tj.iterative_jet_lens(net, PROMPTS, order=0, targets=["w3", "w4"])
    assert lens.sinks.mask.any() and not lens.sinks.mask[lens.valid].all()
    table = lens.trajectories().set_index(["layer", "target"])
    for i, label in enumerate(lens.labels):
        for t, name in enumerate(("w3", "w4")):
            by_prompt = []
            for b in range(len(PROMPTS)):
                real = [p for p in range(lens.valid.shape[1]) if lens.valid[b, p] and not lens.sinks.mask[b, p]]
                by_prompt += [median(int(lens.target_ranks[i, 0, b, p, t]) for p in real)] if real else []
            assert table.rank_median[label, name] == median(by_prompt)
    everything = lens.trajectories(include_sinks=True).set_index(["layer", "target"])
    assert not everything.rank_median.equals(table.rank_median)


def test_intervals_of_medians_cover_them():
    """Of 2,000 samples of 25 from a skewed distribution at least 95% of intervals hold its median, and not all."""
    draws = torch.rand(2000, 25, generator=torch.Generator().manual_seed(0)).double().pow(7)
    low, high = median_intervals(draws)
    share = float(((low <= 0.5**7) & (high >= 0.5**7)).double().mean())
    assert 0.945 <= share <= 0.975
    assert median_intervals(draws[:, :5]).isnan().all()


def test_refusals(net):
    with pytest.raises(ValueError, match="Trajectories are of targets"):
        tj.iterative_jet_lens(net, PROMPTS).trajectories()
    with pytest.raises(ValueError, match="all 3 are 'w1'"):
        other_answers(["w1"] * 3)
    only_bos = net.tokenize("w3")["input_ids"][:, :1]
    with pytest.raises(ValueError, match="no attention sink"):
        tj.iterative_jet_lens(net, only_bos, targets="w3").trajectories()
    with pytest.raises(ValueError, match="single token"):
        tj.answer_lens(net, PROMPTS[:2], ["w3 w4", "w5"])


def test_targets_as_tables_and_commands_write_them():
    network = tj.ResidualNetwork(tj.load_tinydocs())
    (ids,) = network.tokenizer([" is"], add_special_tokens=False)["input_ids"]
    written = ["\u00b7is", f"id:{ids[0]}", " is", ids[0], "\\n"]
    lens = tj.iterative_jet_lens(network, "A list of", order=0, positions=-1, targets=written)
    newline = network.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    assert lens.target_ids.flatten().tolist()[-5:] == [ids[0]] * 4 + [newline]
