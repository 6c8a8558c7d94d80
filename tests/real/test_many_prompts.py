"""A hundred prompts of 5 to 60 tokens: within the memory bound, and the ranks are Hugging Face's own."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

import pytest
import torch
from live_memory import peak_bytes

import tl_jets as tj
from tl_jets.core.prompts import token_bytes

pytestmark = pytest.mark.real

# Padded tokens of a batch.
TOKENS = 512


@pytest.fixture(scope="module")
def prompts(network) -> list[str]:
    """Pieces of Python's documentation."""
    words = re.sub(r"[^\w.,;:()' -]+", " ", " ".join(topics[name] for name in sorted(topics))).split()
    draw, found = torch.Generator().manual_seed(0), []
    while len(found) < 100:
        start, n = (int(torch.randint(most, (), generator=draw)) for most in (len(words) - 60, 50))
        text = " ".join(words[start : start + n + 1])
        if 5 <= network.tokenize(text)["input_ids"].shape[1] <= 60:
            found.append(text)
    return found


def test_a_hundred_prompts_are_read_within_the_bound(network, prompts, reference):
    bound, found = TOKENS * token_bytes(network), []
    taken = peak_bytes(
        lambda: found.append(tj.answer_lens(network, prompts, order=0, layers=[5, 15, 25, 29, -1], max_bytes=bound))
    )
    lens = found[0]
    assert taken < bound
    for b in (0, 33, 99):
        tokens = network.tokenize(prompts[b])["input_ids"]
        streams, logits = reference.run(tokens)
        answer = int(logits[-1].argmax())
        assert lens.target_ids[b, 0, 0] == answer
        for i, layer in enumerate((5, 15, 25, 29, 30)):
            read = reference.normed(streams[layer][-1]) @ reference.W_U
            rank = int((read > read[answer]).sum())
            assert abs(int(lens.target_ranks[i, 0, b, 0, 0]) - rank) <= 2 + rank // 100  # float32
    table = lens.trajectories().set_index(["target", "layer"])
    ranks = table.rank_median["<answer>"]
    others = table.rank_median["<other answer>"]
    assert ranks.is_monotonic_decreasing and ranks["final_post"] == 0 and ranks["5_pre"] > 10 * ranks["25_pre"]
    assert (others[["25_pre", "29_pre", "final_post"]] > 10 * (1 + ranks.iloc[2:])).all(), others
