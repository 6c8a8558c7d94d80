r"""Attribution patching over nodes and edges: what each edge carries from a corrupted to a clean run, to first order.

With x_w what w writes in the clean run, x'_w in the corrupted one, and m the logit difference of two tokens,

.. math::
    \text{score}(w \to r) = (x_w - x'_w) \cdot \partial m / \partial h_r ,

with h_r the stream of reader r in the corrupted run. A writer's scores over all its readers sum to its node's score. Scores of
edges into heads are the sums over the query's, the key's and the value's. With `integration_steps` = n the gradient is the mean
over n runs on the way to the clean one, whose sources are x'_s + (k / n) (x_s - x'_s) for k = 1, ..., n (EAP-IG).

Source: Nanda 2023, *Attribution Patching*; Syed et al. 2023, *Attribution Patching Outperforms Automated Circuit Discovery*; Hanna
et al. 2024, *Have Faith in Faithfulness* (EAP-IG). Without steps the same numbers as TransformerLens 4.3's
`tools.analysis.attribution_patching`, which refuses grouped-query attention and norms after attention. Works here for every network
whose steps can be replayed, at any granularity.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> clean, corrupted = "This function is available on Unix and", "This function is available on Windows and"
    >>> circuit = attribution_patching(model, clean, corrupted, targets=[" Unix", " Windows"]).top(3)
    >>> len(circuit.edges)
    3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.circuits.pairs import Pair, readers_of, run, writes_of
from tl_jets.core.changes import one_look
from tl_jets.core.options import check_integers
from tl_jets.core.selection import TargetInput
from tl_jets.paths.circuit import Circuit

# Attributions of edges [batch, pos], by (writer, reader).
Scores = dict[tuple[str, str], Tensor]


@torch.inference_mode(False)
@torch.no_grad()
@one_look()
def attribution_patching(
    model: Any,
    clean: Any,
    corrupted: Any,
    *,
    targets: TargetInput | None = None,
    position: int = -1,
    by_position: bool = False,
    integration_steps: int = 0,
    attention_mask: Tensor | None = None,
) -> Circuit:
    """All edges, with their attributions as scores: means over the prompts, in logits.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (`"head"` granularity for single heads).
        clean: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        corrupted: As many prompts, of the same lengths in tokens.
        targets: Two tokens, or two a prompt: the logit of the first less that of the second is attributed. None for the clean and
            the corrupted prompt's answers.
        position: Where it is read, among each prompt's real tokens.
        by_position: One edge per position, instead of the sum over all. Needs prompts of one length.
        integration_steps: Runs over which gradients are averaged (EAP-IG; 5 are usual); 0 for the gradient in the corrupted run.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Inputs of different lengths or padding, bad targets or position.

    Cost: two forward passes, and for each integration step (at least once) a forward and backward pass in which every head is
    evaluated on a stream of its own.

    Example: in the docstring of `tl_jets.circuits.attribution_patching`.
    """
    check_integers(0, integration_steps=integration_steps)
    pair = Pair.of(model, clean, corrupted, targets, position, attention_mask)
    scores = edge_scores(pair, integration_steps)
    if not by_position:
        return Circuit.of_edges((*edge, float(score.sum(-1).mean())) for edge, score in scores.items())
    if not bool(pair.clean.valid.all()):
        raise ValueError("by_position needs prompts of one length in tokens, without padding. Pass one at a time.")
    edges = [(edge, place, float(x)) for edge, score in scores.items() for place, x in enumerate(score.mean(0))]
    return Circuit([(*edge, score) for edge, _, score in edges], [place for _, place, _ in edges])


def edge_scores(pair: Pair, integration_steps: int = 0) -> Scores:
    """The attribution of every edge, by prompt and position; zero at padding."""
    gradients = _mean_gradients(pair, integration_steps)
    clean, corrupted = writes_of(pair.clean), writes_of(pair.corrupted)
    change = {
        label: (clean[label] - corrupted[label]).masked_fill(~pair.clean.valid[..., None], 0.0) for label in clean
    }
    found: Scores = {}
    for reader, writers in readers_of(pair.clean).items():
        scores = torch.einsum("wbpd,bpd->wbp", torch.stack([change[w] for w in writers]), gradients[reader])
        found |= {(writer, reader): score for writer, score in zip(writers, scores, strict=True)}
    return found


def _mean_gradients(pair: Pair, steps: int) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Gradients in the corrupted run, or their mean over some steps to the clean run's sources."""
    doses = [step / steps for step in range(1, steps + 1)] or [0.0]
    total = _gradients(pair, doses[0])
    for dose in doses[1:]:
        for reader, gradient in _gradients(pair, dose).items():
            total[reader] = total[reader] + gradient
    return {reader: gradient / len(doses) for reader, gradient in total.items()}


def _gradients(pair: Pair, dose: float) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Gradients of the logit difference in readers' streams, in a run at a dose of the way from corrupted to clean sources."""
    trace = pair.corrupted
    moved = sum(dose * (pair.clean[label] - trace[label]) for label in trace.network.sources)
    leaves: dict[str, Tensor] = {}
    sums: dict[int, Tensor] = {}

    def streams(reader: str, live: Mapping[str, Tensor]) -> Tensor:
        if len(live) not in sums:  # one stage's readers come after the same writers
            sums[len(live)] = torch.stack(list(live.values())).sum(0) + moved
        leaves[reader] = torch.zeros_like(sums[len(live)], requires_grad=True)
        return sums[len(live)] + leaves[reader]

    with torch.inference_mode(False), torch.enable_grad():
        total = pair.difference(run(trace, streams)["ln_final"]).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
