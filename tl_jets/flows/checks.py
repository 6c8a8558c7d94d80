"""Flows of some components against path patching, mediator by mediator.

The effect that a component m mediates is measured from both ends:

==============  ================================================================================================
mediation       definition
==============  ================================================================================================
``restored``    F(intervened) - F(intervened, with m's write of the clean run)
``moved``       F(clean, with m's write of the intervened run) - F(clean)
``mediated``    their mean
==============  ================================================================================================

Where the model is linear between the two runs, all are the same, and equal the flow.

Source: Vig et al. 2020 (causal mediation); Wang et al. 2022 (path patching).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tl_jets.core.protocol import FINAL_STREAM, Step
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.flows.results import Flow
from tl_jets.flows.targets import Target
from tl_jets.flows.two_runs import Hooks, TwoRuns
from tl_jets.interventions.hooks import patch_hooks

# Steps whose writes hooks can set.
PATCHED = ("attn", "mlp", "head", "neuron")


@torch.no_grad()
def path_patched(flow: Flow, runs: TwoRuns, rows: Rows, target: Target, count: int, seed: int) -> Flow:
    """The flow with its `check` of `count` components of the largest flow and `count` others, drawn at random.

    Components that the intervention itself edits are left out: restoring one undoes the intervention.

    Cost: up to four forward passes, and two for each component.
    """
    steps = {step.write: step for step in runs.network.steps if step.kind in PATCHED}
    sizes = flow.flow.abs().sum((1, 2, 3))
    edited = flow.edit.abs().sum((1, 2, 3)) > 1e-3 * sizes
    order = [i for i in sizes.argsort(descending=True).tolist() if flow.labels[i] in steps and not bool(edited[i])]
    drawn = np.random.default_rng(seed).permutation(order[count:])[:count].tolist()
    chosen = sorted([*order[:count], *drawn])
    if not chosen:
        raise ValueError(
            "A check needs a component that mediates, an attention, MLP, head or neuron; none changed here."
        )
    mediators = [steps[flow.labels[i]] for i in chosen]
    restored = _values(runs, target, rows, runs.hooks, runs.other, _patches(runs, mediators, [], runs.clean))
    moved = _values(runs, target, rows, [], runs.clean, _patches(runs, mediators, runs.hooks, runs.other))
    clean, other = (target(rows.at(run[FINAL_STREAM])) for run in (runs.clean, runs.other))
    columns = {"flow": flow.flow[chosen], "restored": other - restored, "moved": moved - clean}
    columns["mediated"] = (columns["restored"] + columns["moved"]) / 2
    return replace(flow, check=flow._table("component", [flow.labels[i] for i in chosen], columns), seed=int(seed))


def _patches(runs: TwoRuns, mediators: list[Step], hooks: Hooks, of: Trace) -> list[Hooks]:
    """For each mediator, hooks that set its write to that of a run: of the input of `of`, under `hooks`."""
    mask = of.recording.memo.get("attention_mask")
    source = {"input_ids": of.tokens, "attention_mask": of.valid.long() if mask is None else mask}
    with runs.network.view.hooks(hooks):  # type: ignore[attr-defined]
        return [[hook] for hook in patch_hooks(runs.network, [step.label for step in mediators], source)]


def _values(runs: TwoRuns, target: Target, rows: Rows, hooks: Hooks, of: Trace, patches: list[Hooks]) -> Tensor:
    """The target in a run under its hooks and, one after another, patches [component, batch, pos, target]."""
    states = (runs.run([*hooks, *patch], of)[FINAL_STREAM] for patch in patches)
    return torch.stack([target(rows.at(state)) for state in states])
