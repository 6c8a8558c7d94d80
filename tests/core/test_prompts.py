"""`over_prompts`: batches within a memory bound are one call on all prompts, whatever the lengths."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import zoo
from live_memory import peak_bytes
from test_concatenation import check_same

import tl_jets as tj
from tl_jets.core import prompts as module
from tl_jets.core.prompts import batches_of, pattern_bytes, token_bytes

PROMPTS = ["w21 w7 w5", "w3", "w5 w9 w33 w4 w8", "w7 w8", "w30", "w6 w4 w1 w2", "w5 w5 w8"]
LISTS = [[f"w{i + 3}", f"w{i + 9}"] for i in range(len(PROMPTS))]
CALLS: dict[str, Any] = {
    "iterative": (tj.iterative_jet_lens, {"order": 2, "targets": LISTS}),
    "last": (tj.iterative_jet_lens, {"positions": -1, "targets": ["w40", "w17"]}),
    "two": (tj.iterative_jet_lens, {"positions": [0, 1], "measures": False}),
    "joint": (tj.joint_jet_lens, {"granularity": "head", "weights": "uniform", "targets": LISTS}),
    "components": (tj.path_sums, {"targets": LISTS}),
    "lengths": (tj.path_lengths, {}),
    "ablations": (tj.ablation_effect, {"steps": ["0_mlp", "L1H1"], "targets": LISTS}),
}


@pytest.fixture(scope="module")
def net() -> Any:
    return tj.ResidualNetwork(zoo.build(zoo.available(["gpt2"])[0]))


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    """Number of prompts and padded length of every call of a tool."""
    seen: list[list[int]] = []
    padded = module._padded
    monkeypatch.setattr(module, "_padded", lambda rows: seen.append([len(rows), max(map(len, rows))]) or padded(rows))
    return seen


def real(wanted: Any) -> torch.Tensor:
    return getattr(wanted, "valid", torch.ones_like(wanted.tokens, dtype=torch.bool))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("tokens", [1, 9, 1000])
def test_it_is_one_call_on_all_prompts(net, calls, kind, tokens):
    tool, options = CALLS[kind]
    bound = tokens * (token_bytes(net, options.get("granularity")) + 6 * pattern_bytes(net))  # of prompts of 6 tokens
    found = tj.over_prompts(tool, net, PROMPTS, max_bytes=bound, **options)
    assert sum(n for n, _ in calls) == len(PROMPTS)
    assert all(n == 1 or n * length <= tokens for n, length in calls)
    assert len(calls) == {1: 7, 9: 4, 1000: 1}[tokens]
    wanted = tool(net, PROMPTS, **options)
    check_same(found, wanted, kind, real(wanted))


def test_ids_by_position_and_other_forms_of_prompts(net):
    """Targets [batch, pos, target] go with their prompts; padding on the left is taken off."""
    tokens = net.tokenize(PROMPTS)
    mask = tokens["attention_mask"].bool()
    ids = (torch.arange(mask.numel()).view(mask.shape) % 37).masked_fill(~mask, 5)[..., None]
    wanted = tj.iterative_jet_lens(net, PROMPTS, targets=ids)
    rows = [row[own].tolist() for row, own in zip(tokens["input_ids"], mask, strict=True)]
    left = torch.tensor([[0] * (mask.shape[1] - len(row)) + row for row in rows])
    flipped = {"input_ids": left, "attention_mask": mask.flip(1)}
    small = 9 * token_bytes(net)
    for given in (PROMPTS, tuple(PROMPTS), tokens, rows, [torch.tensor(row) for row in rows], flipped):
        found = tj.over_prompts(tj.iterative_jet_lens, net, given, max_bytes=small, targets=ids)
        check_same(found, wanted, "lens", wanted.valid)


def test_batches_hold_every_prompt_once_and_little_padding():
    lengths = [int(n) for n in torch.randint(5, 60, (100,), generator=torch.Generator().manual_seed(0))]
    batches = batches_of(lengths, 256)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    padded = sum(len(batch) * lengths[batch[0]] for batch in batches)
    assert padded <= 1.1 * sum(lengths) and len(batches) <= 1.3 * sum(lengths) / 256 + 1
    assert batches_of([3, 700, 2], 256) == [[1], [0, 2]]
    assert [len(batch) for batch in batches_of([10] * 4, 40, pattern=0.1)] == [2, 2]


@pytest.mark.parametrize("kind", ["iterative", "joint", "components", "lengths", "ablations"])
def test_tools_stay_below_the_bound(kind):
    """What a token more takes, on the embedded model, is below what a batch is counted with."""
    net = tj.ResidualNetwork(tj.load_tinydocs())
    tool, options = CALLS[kind]
    options = {**options, "targets": None} | ({"positions": list(range(16))} if kind == "ablations" else {})
    few, many = (peak_bytes(lambda n=n: tool(net, torch.randint(5, 4000, (n, 16)), **options)) for n in (8, 16))
    assert (many - few) / 128 < token_bytes(net, options.get("granularity"))


def test_attention_patterns_stay_below_the_bound():
    """What grows with the square of the length is counted, too: a frozen network keeps patterns of all layers."""
    net = tj.ResidualNetwork(tj.load_tinydocs())
    tj.path_sums(net, torch.randint(5, 4000, (1, 8)))
    short, middle, long = (
        peak_bytes(lambda n=n: tj.path_sums(net, torch.randint(5, 4000, (1, n)))) for n in (16, 32, 48)
    )
    assert 0.2 < (short - 2 * middle + long) / (2 * 16**2) / pattern_bytes(net) < 1


def test_what_is_of_one_batch_is_refused(net, monkeypatch):
    lens = tj.iterative_jet_lens
    with pytest.raises(ValueError, match="cache belongs to one"):
        tj.over_prompts(lens, net, PROMPTS, cache={})
    with pytest.raises(ValueError, match="weights belongs to one"):
        tj.over_prompts(tj.joint_jet_lens, net, PROMPTS, weights=torch.ones(5))
    with pytest.raises(ValueError, match="one list a prompt, 7; got 2"):
        tj.over_prompts(lens, net, PROMPTS, targets=[["w1"], ["w2"]])
    for given in ("w3 w4", torch.ones(2, 3, dtype=torch.long), [1, 2, 3], ["w3", 4]):
        with pytest.raises(TypeError, match="Prompts must be a list of texts"):
            tj.over_prompts(lens, net, given)
    with pytest.raises(ValueError, match="at least one prompt"):
        tj.over_prompts(lens, net, [])
    with pytest.raises(ValueError, match="max_bytes must be an integer >= 1"):
        tj.over_prompts(lens, net, PROMPTS, max_bytes=0)
    with pytest.raises(TypeError, match="concat joins lenses"):
        tj.over_prompts(lambda net, x: net.trace(x), net, PROMPTS)
    monkeypatch.setattr("tl_jets.core.free_memory.free_bytes", lambda *_: 1000)
    with pytest.raises(ValueError, match=r"The result of 7 prompts must fit in memory.* Take fewer positions"):
        tj.over_prompts(lens, net, PROMPTS)


def test_free_memory_decides_without_a_bound(net, calls, monkeypatch):
    monkeypatch.setattr(module, "free_bytes", lambda device: 4 * 9 * (token_bytes(net) + 6 * pattern_bytes(net)))
    found = tj.over_prompts(tj.iterative_jet_lens, net, PROMPTS)
    assert len(calls) == 4 and found.tokens.device.type == "cpu"
    assert {field.name for field in fields(found)} > {"top_ids"}
