r"""Ablation of one path: the model's answer without what arrives along the path, while later computation responds.

The model evaluates every step of the path again, without what the previous step sent:

.. math::
    \delta_0 = \text{source}, \qquad
    \delta_i = \gamma_{s_i}(h_{s_i}) - \gamma_{s_i}(h_{s_i} - \delta_{i-1}), \qquad
    \text{answer} = \upsilon(h_L - \delta_n) ,

with h the true streams. Inputs of a step along other paths stay, as in path patching. In an affine network delta_n is
the path itself; elsewhere the difference measures how far patterns, gates and norms respond.

Source: Wang et al. 2022, *Interpretability in the Wild* (path patching; here the other input is zero); Goldowsky-Dill
et al. 2023, *Localizing Model Behavior with Path Patching*.

Example:
    >>> import tl_jets as tj
    >>> network = tj.ResidualNetwork(tj.load_tinydocs())
    >>> prompt = "This function is available on Unix and"
    >>> effect = path_ablation(network, prompt, ["embed > 0_mlp > ln_final", "embed > 1_attn > 3_mlp > ln_final"])
    >>> effect
    AblationEffect(2 ablations, path; 1 prompts at [7]; of ['<answer>'])
    >>> bool((effect.centered < 0).any())
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tl_jets.core.changes import one_look
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, FINAL_STREAM
from tl_jets.core.selection import TargetInput
from tl_jets.core.trace import Trace
from tl_jets.interventions.effects import AblationEffect, cells_of, effect_of, real_rows
from tl_jets.interventions.replays import changes_without, logits_of, stack_size
from tl_jets.paths.evaluation import along, read_path


@torch.no_grad()
@one_look()
def path_ablation(
    model: Any,
    prompts: Any,
    paths: str | Path | Sequence[str | Path],
    *,
    targets: TargetInput | None = None,
    positions: int | Sequence[int] = -1,
    ablated_positions: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> AblationEffect:
    """An `AblationEffect` of each of some paths, in mode `"path"` (path patching with zero).

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (whose granularity says what the steps are).
        prompts: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        paths: `embed > 0_attn > 3_mlp > ln_final`, one or several: a source (an embedding, an edit, or a bias such as
            `3_mlp_bias`), and steps in the order of the network.
        targets: Tokens whose logits are reported, as in `ablation_effect`; None for the model's own best token.
        positions: Positions to read, counted among each prompt's real tokens; -1 is the last.
        ablated_positions: Positions of the source from which a path is ablated, counted in the same way; None for all.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Unknown source or step, steps out of order, or `ln_final_bias`; bad positions, targets or input.
        NotImplementedError: A path from a bias in a model that cannot be frozen (see `exponential_expansion`).

    Cost: two evaluations of each stage that the paths pass through, more if many prefixes end in one (each is evaluated
    once, together with the others), and the unembedding for every path.
    """
    network = ResidualNetwork.of(model)
    trace = trace_of(network, prompts, attention_mask)
    wanted = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not wanted:
        raise ValueError("path_ablation needs at least one path; got none.")
    parsed = [read_path(trace, path) for path in wanted]
    rows = real_rows(trace, positions)
    where, final = cells_of(trace, ablated_positions), trace[FINAL_STREAM]

    def source(label: str) -> Tensor:
        whole = _source(trace, label)
        return whole if where is None else torch.where(where[..., None], whole, 0.0)

    stages = trace.network.stages
    sent = along(parsed, source, lambda stage, parts: changes_without(trace, stages[stage], parts).transpose(0, 1))

    def answers() -> Iterator[Tensor]:
        for start in range(0, len(parsed), stack_size(trace)):
            ends = [sent[path] for path, _ in parsed[start : start + stack_size(trace)]]
            yield from logits_of(trace, final - torch.stack(ends), rows)

    clean = next(logits_of(trace, final[None], rows))
    return effect_of(trace, clean, answers(), [str(path) for path in wanted], "path", rows, targets=targets)


def _source(trace: Trace, label: str) -> Tensor:
    if not label.endswith(BIAS):
        return trace[label]
    with torch.enable_grad():  # the constant of a frozen step, which a trace's label of the same name need not be
        found = FrozenNetwork.of(trace).sources.get(label)
    return torch.zeros_like(trace[FINAL_STREAM]) if found is None else found.detach()


def verdict(effect: float, fall: float) -> str:
    """Compare a path's effect on a logit with the fall of the logit when the path is ablated.

    Args:
        effect: Contribution of the path to the target's centered logit in the frozen network.
        fall: Decrease of this logit when the path is ablated, in the same unit.

    Returns:
        `"confirmed"` if fall / effect lies in [0.5, 2], `"refuted"` if it is below 0.1 or effect is 0, else `"partly"`.

    Source: ours; the bounds are a convention. `demos/top_paths.py` compares with shuffled falls.

    Example:
        >>> verdict(1.0, 0.6), verdict(1.0, 0.2), verdict(1.0, -0.6)
        ('confirmed', 'partly', 'refuted')
    """
    ratio = fall / effect if effect else math.inf
    return "confirmed" if 0.5 <= ratio <= 2 else "refuted" if ratio < 0.1 or not effect else "partly"
