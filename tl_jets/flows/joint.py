r"""Joint flow: the effect of a set of components ablated together, divided over them.

Every write w of the set becomes (1 - t) w + t w', with w' its ablated value, at one dose t for all. With a_i the dose of
component i alone,

.. math::
    F(1) - F(0) = \sum_i \int_0^1 \frac{\partial F}{\partial a_i}(t, \ldots, t)\, dt .

The terms are Aumann-Shapley values. They add up to the joint effect, whatever the components do for one another: heads
that stand in for each other get their shares, though ablated one at a time they do nothing. The integral is taken by
Gauss-Legendre nodes, doubled until the sum is the effect within the tolerance.

Source: Aumann and Shapley 1974; integrated gradients, Sundararajan et al. 2017; backup heads, Wang et al. 2022.

Example:
    >>> import tl_jets as tj
    >>> found = tj.joint_flow(tj.load_tinydocs(), "This function is available on Unix and", ["L0H1", "L1H2", "L2H3"], controls=2)
    >>> bool(found.closed.all()), bool(torch.allclose(found.share.sum(0), found.effect, rtol=1e-3))
    (True, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_jets.core.caller import warn_caller
from tl_jets.core.changes import one_look
from tl_jets.core.decoder import in_unit
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.protocol import FINAL_STREAM, Step
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.target_results import target_fields
from tl_jets.core.trace import Trace
from tl_jets.flows.results import FlowResult
from tl_jets.flows.secants import MOST_NODES, legendre
from tl_jets.flows.targets import Measure, Target, read_target
from tl_jets.interventions.ablation_jets import dose_gradients
from tl_jets.interventions.effects import cells_of, exact_trace, real_rows
from tl_jets.interventions.hooks import Mode, hookable, hooks_of_each
from tl_jets.interventions.places import Hooks
from tl_jets.interventions.replays import first_stage, last_streams

# Nodes of the first try.
FIRST_NODES = 4
# Draws of a control set, for each that is asked for: small layers have few different ones.
DRAWS = 20


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class JointFlow(FlowResult):
    """Shares of a joint ablation. Axes: [component, batch, pos, target], float64.

    Positions, targets, their unit and the tolerance as in `FlowResult`.

    Attributes:
        labels: The components that are ablated together.
        mode: The mode of `ablation_hooks`.
        share: Each component's part of the joint effect; they add up to it.
        single: The effect of ablating the component alone.
        gradient: The derivative at the clean run, times the change: attribution patching.
        effect: Target with all ablated, less the clean target [batch, pos, target].
        control_labels: Random sets: for a head or neuron another one of its layer, for a sublayer another layer's.
        control: The joint effects of these sets [control, batch, pos, target].
        gap: Sum of shares less the effect: the error of the nodes.
        nodes: Nodes of the last try.
        seed: Seed of the random sets.
        final: The last stream with all ablated, at the positions that are read; None in an older file.
    """

    labels: list[str]
    mode: str
    share: Float[Tensor, "component batch pos target"]
    single: Float[Tensor, "component batch pos target"]
    gradient: Float[Tensor, "component batch pos target"]
    effect: Float[Tensor, "batch pos target"]
    control_labels: list[list[str]]
    control: Float[Tensor, "control batch pos target"]
    gap: Float[Tensor, "batch pos target"]
    nodes: int
    seed: int | None = None
    final: Float[Tensor, "batch pos d_model"] | None = None

    def __repr__(self) -> str:
        sets = (
            f"{len(self.control)} random sets: {float(self.control.mean()):+.3g}, at most {float(self.control.abs().max()):.3g}"
            if len(self.control)
            else "no random sets"
        )
        still = "" if bool(self.closed.all()) else f"; {int((~self.closed).sum())} OPEN: their shares explain nothing"
        return (
            f"JointFlow({len(self.labels)} components together {float(self.effect.mean()):+.3g}, one by one in sum "
            f"{float(self.single.sum(0).mean()):+.3g}, {sets}; of {self.target_names}{in_unit(self.unit)}; {self.mode}; "
            f"{self.nodes} nodes{still})"
        )

    @property
    def closed(self) -> Bool[Tensor, "batch pos target"]:
        """Whether shares add up to the effect within the tolerance."""
        return self.gap.abs() <= self.tolerance * self.effect.abs()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per component, prompt, position, target: share, single, gradient; effect, closed."""
        names = ("share", "single", "gradient", "effect", "closed")
        return self._table("component", self.labels, {name: getattr(self, name) for name in names})


@torch.inference_mode(False)
@torch.no_grad()
@one_look()
def joint_flow(
    model: Any,
    prompts: Any,
    components: Sequence[str],
    *,
    mode: Mode = "zero",
    reference: Any = None,
    ablated_positions: int | Sequence[int] | None = None,
    targets: TargetInput | None = None,
    against: TargetInput | None = None,
    measure: Measure = "centered",
    positions: int | Sequence[int] = -1,
    tolerance: float = 1e-3,
    controls: int = 6,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> JointFlow:
    """A `JointFlow`: the effect of ablating some components together, divided over them.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        prompts: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        components: Heads, sublayers, neurons or blocks, as in `ablation_hooks`.
        mode: `"zero"`, `"mean"` or `"resample"`.
        reference: For `"mean"` and `"resample"`, as in `ablation_hooks`.
        ablated_positions: Positions at which they are ablated, among each prompt's real tokens; None for all.
        targets: Tokens whose centered logits are explained; None for the clean run's best.
        against: One token for each target: the logit difference, target - against, is explained.
        measure: `"centered"` or `"kl"`, as in `flow`.
        positions: Positions to read, counted among each prompt's real tokens; -1 is the last.
        tolerance: Nodes are doubled, up to 128, until the sum is within this share of the effect.
        controls: How many random sets of the same size and layers are ablated, too; fewer if there are no more different ones.
        seed: Seed of the random sets, and of `"resample"`.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Bad components, mode, positions or targets, or too few other components for a control.

    Cost: 5 forward-backward passes for a mild ablation, 13 or 29 for a strong one; single ablations and controls as in
    `ablation_effect`. Warns (UserWarning) of effects that stay open.
    """
    network = hookable(model)
    check_integers(0, controls=controls)
    clean = exact_trace(network, prompts, attention_mask)
    rows = real_rows(clean, positions)
    target = read_target(clean, rows, targets, against, measure)
    labels = _distinct(network, components)
    sets = _random_sets(network, labels, controls, seed)
    known = list(dict.fromkeys([*labels, *chain(*sets)]))
    where = cells_of(clean, ablated_positions)
    hooks = hooks_of_each(network, known, mode=mode, reference=reference, positions=where, seed=seed)
    doses = _Doses(clean, rows, target, dict(zip(known, hooks, strict=True)))
    return replace(doses.result(labels, sets, mode, tolerance), seed=int(seed))


def _distinct(network: ResidualNetwork, components: str | Sequence[str]) -> list[str]:
    labels = [network.label(c) for c in ([components] if isinstance(components, str) else components)]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"Components that are ablated together must be distinct, and at least one; got {labels}.")
    return labels


@dataclass(frozen=True, eq=False)
class _Doses:
    """The target of a run, and its gradients, under ablations of some components; `hooks` are theirs, by label."""

    clean: Trace
    rows: Rows
    target: Target
    hooks: dict[str, Hooks]

    @torch.no_grad()
    def ablated(self, sets: list[list[str]]) -> list[Float[Tensor, "batch pos d_model"]]:
        """The last streams with each set ablated, at the positions that are read."""
        runs = [[hook for label in own for hook in self.hooks[label]] for own in sets]
        order = sorted(range(len(runs)), key=lambda i: first_stage(self.clean, runs[i]))
        found = {}
        for final in chain.from_iterable(last_streams(self.clean, [runs[i] for i in order])):
            found[order[len(found)]] = self.rows.at(final)
        return [found[i] for i in range(len(runs))]

    def gradients(self, labels: list[str], dose: float) -> Float[Tensor, "component batch pos target"]:
        """Derivatives by the doses of single components, with all at one dose."""
        each = [self.hooks[label] for label in labels]
        return dose_gradients(self.clean, each, dose, lambda final: self.target(self.rows.at(final)))

    def shares(self, labels: list[str], effect: Tensor, tolerance: float) -> tuple[Tensor, int]:
        """Integrals of the gradients, and their number of nodes."""
        count = FIRST_NODES
        while True:
            parts = [weight * self.gradients(labels, place) for place, weight in legendre(count)]
            total = torch.stack(parts).sum(0)
            if count >= MOST_NODES or bool(((total.sum(0) - effect).abs() <= tolerance * effect.abs()).all()):
                return total, count
            count *= 2

    def result(self, labels: list[str], sets: list[list[str]], mode: str, tolerance: float) -> JointFlow:
        """The shares of the components, beside single ablations, gradients and the control sets."""
        before = self.target(self.rows.at(self.clean[FINAL_STREAM]))
        finals = self.ablated([labels, *([label] for label in labels), *sets])
        effect, *others = (self.target(final) - before for final in finals)
        share, nodes = self.shares(labels, effect, tolerance)
        single, control = others[: len(labels)], others[len(labels) :]
        target = self.target
        found = JointFlow(
            labels=labels,
            mode=mode,
            share=share,
            single=torch.stack(single),
            gradient=self.gradients(labels, 0.0),
            effect=effect,
            control_labels=sets,
            control=torch.stack(control) if control else effect.new_zeros(0, *effect.shape),
            gap=share.sum(0) - effect,
            nodes=nodes,
            final=finals[0],
            tolerance=tolerance,
            measure=target.measure,
            **target_fields(self.clean, self.rows, target.ids, target.names, unit=target.unit),
        )
        _warn_of_open(found)
        return found


def _warn_of_open(found: JointFlow) -> None:
    still_open = ~found.closed
    if bool(still_open.any()):
        missed = float((found.gap / found.effect).abs()[still_open].max())
        warn_caller(
            f"{int(still_open.sum())} of {still_open.numel()} effects stay open: with {found.nodes} nodes, shares miss up to "
            f"{100 * missed:.3g}% of the effect. They explain nothing; ablate fewer components, or positions.",
            UserWarning,
        )


def _random_sets(network: ResidualNetwork, labels: list[str], count: int, seed: int) -> list[list[str]]:
    """Different sets of other components, of the same layers for heads and neurons; fewer if there are no more."""
    steps = {step.label: step for kind in ("block", "sublayer", "head") for step in network.at(kind).steps}
    pools = {label: _others(network, steps, label, set(labels)) for label in labels}
    random, sets = np.random.default_rng(seed), {}
    for _ in range(DRAWS * count):
        own: list[str] = []
        for label, pool in pools.items():
            left = [other for other in pool if other not in own]
            if not left:
                raise ValueError(
                    f"A control set takes as many other components of the same layers; none is left beside {label}. Pass "
                    f"controls=0."
                )
            own.append(left[random.integers(len(left))])
        sets.setdefault(frozenset(own), own)
        if len(sets) == count:
            break
    return list(sets.values())


def _others(network: ResidualNetwork, steps: dict[str, Step], label: str, taken: set[str]) -> list[str]:
    """Components that can stand for one in a control set: of its kind, heads and neurons of its layer."""
    step = steps.get(label) or network.view.fine_step(label)
    assert step is not None  # ablation_hooks knows it
    if step.kind == "neuron":
        size = network.view.blocks[step.layer].mlp.W_out.shape[0]  # type: ignore[attr-defined]
        found = [f"L{step.layer}N{i}" for i in range(size)]
    else:
        is_head = step.kind == "head"
        found = [s.label for s in steps.values() if s.kind == step.kind and (s.layer == step.layer or not is_head)]
    return [other for other in found if other not in taken]
