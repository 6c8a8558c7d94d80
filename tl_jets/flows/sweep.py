r"""Flow: what an intervention does to a target, through every component, exactly.

A clean run has streams h and writes w; an intervened one (ablation, patch, steering, another prompt) h + dh and w + dw. A
target F of the final stream gives a covector, which every stage's secant map S (`tl_jets.flows.secants`) carries back:

.. math::
    g_L = \int_0^1 \nabla F(h_L + t\, dh_L)\, dt, \qquad g_s = g_{s+1} + S_s^\top g_{s+1}, \qquad
    \text{flow}_m = \langle g_{s+1}, dw_m \rangle .

Each stage is an instance of the fundamental theorem of calculus, so that at every cut of the network flows add up to the
effect F(intervened) - F(clean): what streams carry, and what the intervention writes later. The only error is that of the
nodes. It is known stage by stage (the **gap**), and nodes are added where it is open.

Flow answers how much of the effect goes through a component's write when all others respond as they did. Path patching
asks what happens if one component alone is restored; where an intervention is mild the two agree, which `check` measures.
With one node at the clean run flow is attribution patching. It is a jet of order 1 with centers between two runs.

Source: Chen et al. (arXiv 2410.06024), Lemma 1 (centers may be anywhere); conductance, Dhamdhere et al. 2018; attribution
patching, Nanda 2023, Syed et al. 2023; EAP-IG, Hanna et al. 2024; path patching, Wang et al. 2022.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> found = tj.flow(model, "This function is available on Unix and", tj.ablation_hooks(model, "0_mlp"))
    >>> bool(found.closed.all()), found.labels[0], bool((found.edit.sum(0) - found.effect).abs() < 0.01 * found.effect.abs())
    (True, '0_mlp_out', True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from tl_jets.core.caller import warn_caller
from tl_jets.core.changes import one_look
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM, Granularity
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import target_fields
from tl_jets.core.trace import Trace
from tl_jets.flows.checks import path_patched
from tl_jets.flows.readers import StageReaders
from tl_jets.flows.results import Flow
from tl_jets.flows.secants import FIRST_NODES, PulledBack, pull_back, pull_back_apart
from tl_jets.flows.targets import Measure, Target, read_target
from tl_jets.flows.two_runs import Change, TwoRuns
from tl_jets.interventions.effects import exact_trace, real_rows

# An effect below so many roundings of the target's value is none.
UNMOVED = 8


@torch.inference_mode(False)
@torch.no_grad()
@one_look()
def flow(
    model: Any,
    prompts: Any,
    intervention: Any,
    *,
    targets: TargetInput | None = None,
    against: TargetInput | None = None,
    measure: Measure = "centered",
    positions: int | Sequence[int] = -1,
    granularity: Granularity | None = None,
    nodes: int | Literal["auto"] = "auto",
    tolerance: float = 0.01,
    by_position: bool = False,
    edges: bool = False,
    check: int = 0,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> Flow:
    """A `Flow`: an intervention's effect on targets, divided over the components that it passes.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` (of chosen neurons, say).
        prompts: The clean input: a prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        intervention: TransformerLens hooks, `[(hook_name, function)]` (as of `ablation_hooks`, `patch_hooks`,
            `steering_hooks`); or another input with as many tokens in every prompt; or a `Trace` of it; or the
            `tl_jets.flows.two_runs.TwoRuns` of a trace, whose intervened run can be read, too.
        targets: Tokens whose centered logits are explained; None for the clean run's best.
        against: One token for each target: the logit difference, target - against, is explained.
        measure: `"centered"` (logits, less the mean over the vocabulary), or `"kl"`: KL(clean || intervened), in nats.
        positions: Positions to read, counted among each prompt's real tokens; -1 is the last.
        granularity: `"block"`, `"sublayer"` or `"head"`; None for the network's own (`"sublayer"` for a model).
        nodes: A number for all stages; `"auto"` doubles them, a stage at a time, up to 128, until the gaps are within `tolerance`.
        tolerance: The share of the effect that gaps may have, in absolute sum.
        by_position: Whether to return flows by the position of the write, too.
        edges: Whether to divide flows over edges, too, from every write to every later reader (`Flow.edges`). Readers are
            steps and, at granularity `"head"`, the queries, keys and values of heads.
        check: How many components are verified by path patching: the largest, and as many random ones.
        seed: Chooses the random ones.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Inputs of different lengths or padding, hooks that differ between two passes, or bad options.
        NotImplementedError: A stage that cannot be evaluated on other streams (routed experts, quantized weights).

    Warns:
        UserWarning: An effect stays open: its gap is above the tolerance.

    Cost: two forward passes, for hooks a third up to the last hooked block, and 2 to 7 forward-backward passes through the
    changed stages (ablations in SmolLM2), 50 where an attention sink is moved; nodes of a stage are stacked along the batch
    axis, up to 2,048 tokens. All components at once. `check`: two forward passes a component. `edges`: a backward pass
    through a stage for each of its readers, and the changes of all writes in memory.
    """
    network = ResidualNetwork.of(model, granularity)
    clean = exact_trace(network, prompts, attention_mask)
    _check(check, nodes, tolerance)
    rows = real_rows(clean, positions)
    runs = _two_runs(network, clean, intervention)
    target = read_target(clean, rows, targets, against, measure)
    found = _Sweep(runs, rows, target, None if nodes == "auto" else nodes, tolerance, by_position, edges).result()
    return path_patched(found, runs, rows, target, check, seed) if check else found


def _two_runs(network: ResidualNetwork, clean: Trace, intervention: Any) -> TwoRuns:
    """The runs of an intervention; raises ValueError for given ones of another clean trace or granularity."""
    runs = intervention if isinstance(intervention, TwoRuns) else TwoRuns(network, clean, intervention)
    if runs.clean.recording is not clean.recording or runs.network.granularity != network.granularity:
        raise ValueError(
            "Two runs that are passed as an intervention must be of the clean trace and the granularity that are passed, too; "
            "these are of others. Pass the trace that they were made with, or the hooks themselves."
        )
    return runs


def _check(check: int, nodes: int | str, tolerance: float) -> None:
    """Raise TypeError or ValueError for options out of range."""
    check_integers(0, check=check)
    if nodes != "auto":
        check_integers(1, nodes=nodes)
    if not tolerance > 0:
        raise ValueError(f"tolerance is a share of the effect above 0; got {tolerance!r}.")


@dataclass(frozen=True, eq=False)
class _Written:
    """Components in the order of the network, with what changed and what the intervention itself wrote."""

    labels: list[str]
    changes: Tensor
    edits: Tensor


@dataclass(eq=False)
class _Sweep:
    """One sweep backwards through the stages; lists are filled from the last stage to the first.

    Covectors have the axes [cell, batch, length, d_model], with one cell for each read position and target.
    """

    runs: TwoRuns
    rows: Rows
    target: Target
    nodes: int | None
    tolerance: float
    by_position: bool
    by_edge: bool
    labels: list[str] = field(default_factory=list)
    moved: list[bool] = field(default_factory=list)
    changed: list[Tensor] = field(default_factory=list)
    flow: list[Tensor] = field(default_factory=list)
    edit: list[Tensor] = field(default_factory=list)
    direct: list[Tensor] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    spent: list[Tensor] = field(default_factory=list)
    carried: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    edge_flow: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def _run(self) -> None:
        """Carry the target's gradients back to the first stream that changed."""
        base = self.runs.base
        self.clean, self.effect = self._values()
        covectors = self.last = self._from_target(len(base.stages) + 1)
        # Read at once: every look at a device waits for it.
        flags = [self.runs.stream(stage.stream)[1].any() for stage in base.stages]
        self.moved = torch.stack(flags).tolist() if flags else []
        self.written = self._all_written() if self.by_edge else {}
        for index in reversed(range(len(base.stages))):
            stage = base.stages[index]
            change = self.runs.change(stage)
            self._components(self._written(index, change), covectors)
            if not self.moved[index]:
                return
            point, difference = self.runs.stream(stage.stream)
            pull = self._pull_apart if self.by_edge else self._pull
            pulled = pull(index, change, covectors, point, difference)
            covectors = covectors + pulled.covectors
            self._stage(stage.stream, pulled, products(covectors, difference[None])[0])
        self._components(self._written(-1), covectors)

    def _pull(self, index: int, change: Change, covectors: Tensor, point: Tensor, difference: Tensor) -> PulledBack:
        """Covectors carried back through a stage."""
        function = self.runs.stacked(self.runs.base.stages[index])
        true = products(covectors, change.writes - change.edits).sum(0)
        found = pull_back(
            lambda stream: function(stream).sum(0),
            point, difference, covectors, true, self._allowed(index + 1),
            nodes=self.nodes, first=self._first_nodes(), together=self.runs.together,
        )  # fmt: skip
        self.spent.append(found.gap.abs())
        return found

    def _pull_apart(
        self, index: int, change: Change, covectors: Tensor, point: Tensor, difference: Tensor
    ) -> PulledBack:
        """The same, reader by reader, with flows on the edges into each."""
        readers = StageReaders(self.runs, self.runs.base.stages[index], change)
        true = products(covectors, (change.writes - change.edits)[readers.steps])
        found = pull_back_apart(
            lambda points, weights: readers.gradients(points, weights, covectors),
            point, difference, readers.part_of, true, self._allowed(index + 1),
            nodes=self.nodes, first=self._first_nodes(), together=self.runs.together,
        )  # fmt: skip
        apart = rearrange(found.covectors.double(), "reader cell ... -> (reader cell) ...")
        sent = [products(apart, changes) for place, changes in self.written.items() if place < index]
        self.readers += readers.labels[::-1]
        n_cells = found.covectors.shape[1]
        sent = rearrange(torch.cat(sent), "writer (reader cell) batch -> reader writer cell batch", cell=n_cells)
        self.edge_flow += sent.flip(0)
        self.spent.append(found.gap.abs().sum(0))
        return found._replace(covectors=found.covectors.sum(0), gap=found.gap.sum(0))

    def _first_nodes(self) -> int:
        return max(FIRST_NODES, self.counts[-1] // 2)

    def _all_written(self) -> dict[int, Tensor]:
        """The changes of all components, by stage; -1 for the sources."""
        found: dict[int, Tensor] = {}
        for index in reversed(range(len(self.runs.base.stages))):
            stage = self.runs.base.stages[index]
            found[index] = self._written(index, self.runs.change(stage)).changes
            if not self.moved[index]:
                break
        else:
            found[-1] = self._written(-1).changes
        return dict(sorted(found.items()))

    def _written(self, index: int, change: Change | None = None) -> _Written:
        """What a stage wrote, and hooks on the stream after it; -1 for the sources."""
        base = self.runs.base
        following = base.streams[0] if change is None else base.next_stream(base.stages[index])
        added = {**(self.runs.sources() if change is None else {}), **self.runs.stream_edits(following)}
        values = torch.stack([*added.values(), torch.zeros_like(self.last[0])])[:-1]
        if change is None:
            return _Written(list(added), values, values)
        labels = [*(step.write for step in change.steps), *added]
        return _Written(labels, torch.cat([change.writes, values]), torch.cat([change.edits, values]))

    def _values(self) -> tuple[Tensor, Tensor]:
        """The target's clean values and its change, [cell, batch]."""
        clean, other = (self.target(self.rows.at(run[FINAL_STREAM])) for run in (self.runs.clean, self.runs.other))
        return tuple(rearrange(x, "batch pos target -> (pos target) batch") for x in (clean, other - clean))  # type: ignore[return-value]

    def _from_target(self, left: int) -> Tensor:
        """The covectors of the final stream."""
        point, change = self.runs.stream(FINAL_STREAM)
        shape = (*self.rows.index.shape, self.target.ids.shape[-1])
        ones = torch.eye(shape[1] * shape[2], dtype=torch.float64, device=point.device)
        cells = ones.view(-1, 1, *shape[1:]).expand(-1, *shape)
        pulled = pull_back(
            lambda stream: self.target(self.rows.at(stream)),
            point, change, cells, self.effect, self._allowed(left), nodes=self.nodes,
        )  # fmt: skip
        self.spent.append(pulled.gap.abs())
        self._stage(DECODER_STEP, pulled, products(pulled.covectors, change[None])[0])
        return pulled.covectors

    def _allowed(self, left: int) -> Tensor:
        """The gap that a stage may have: what is left of the tolerance, divided by a quarter of the stages left."""
        spent = torch.stack(self.spent).sum(0) if self.spent else 0.0
        return (self.tolerance * self.effect.abs() - spent).clamp_min(0) * min(1.0, 4 / left)

    def _stage(self, label: str, pulled: PulledBack, carried: Tensor) -> None:
        self.stages.append(label)
        self.gaps.append(pulled.gap)
        self.carried.append(carried)
        self.counts.append(pulled.nodes)
        self.evaluations.append(pulled.evaluations)

    def _components(self, written: _Written, covectors: Tensor) -> None:
        """Flows of components, from the last to the first."""
        self.labels += written.labels[::-1]
        self.changed += written.changes.flatten(1).any(1).flip(0)
        self.flow += products(covectors, written.changes, by_position=self.by_position).flip(0)
        self.edit += products(covectors, written.edits).flip(0)
        self.direct += products(self.last, written.changes).flip(0)

    def result(self) -> Flow:
        """Run the sweep and return what it found."""
        self._run()
        runs, ids = self.runs, self.target.ids
        n_pos = ids.shape[1]

        def shaped(values: list[Tensor]) -> Tensor:
            """Values of several cells on a leading axis, from the first to the last."""
            stacked = torch.stack(values[::-1]) if values else self.effect.new_zeros(0, *self.effect.shape)
            return rearrange(stacked, "each (pos target) batch ... -> each batch pos target ...", pos=n_pos)

        every = shaped(self.flow)
        whole = runs.clean.tokens.masked_fill(~runs.clean.valid, -1)
        prompts = [whole, Sinks.of(runs.clean, Rows.of(runs.clean, None)).mask] if self.by_position else []
        tokens, sinks = [each[:, None].repeat(1, n_pos, 1) for each in prompts] or (None, None)
        found = Flow(
            labels=self.labels[::-1],
            flow=every.sum(-1) if self.by_position else every,
            edit=shaped(self.edit),
            direct=shaped(self.direct),
            effect=shaped([self.effect])[0],
            clean=shaped([self.clean])[0],
            stages=self.stages[::-1],
            gap=shaped(self.gaps),
            carried=shaped(self.carried),
            nodes=self.counts[::-1],
            evaluations=self.evaluations[::-1],
            measure=self.target.measure,
            tolerance=self.tolerance,
            readers=[*self.readers[::-1], DECODER_STEP] if self.by_edge else None,
            edge_flow=self._edges(n_pos) if self.by_edge else None,
            by_position=every if self.by_position else None,
            prompt_tokens=tokens,
            prompt_sinks=sinks,
            sinks=Sinks.of(runs.clean, self.rows),
            **target_fields(runs.clean, self.rows, ids, self.target.names, unit=self.target.unit, named=[whole]),
        )
        return self._checked(found)

    def _checked(self, found: Flow) -> Flow:
        """The flow of the components that changed; warns. All is read at once, as every look at a device waits for it."""
        # The same run is not always the same to the last bit: matrix products depend on where memory lies.
        rounding = UNMOVED * torch.finfo(self.last.dtype).eps * found.clean.abs().clamp_min(1.0)
        reached = (found.effect.abs() > rounding).flatten(1).any(1)
        flags = [*self.changed[::-1], *reached, (~found.closed).sum()]
        *flags, still_open = torch.stack([flag.long() for flag in flags]).tolist()
        self._warn(found, flags[len(found.labels) :], still_open)
        kept = [i for i, changed in enumerate(flags[: len(found.labels)]) if changed]
        labels = [found.labels[i] for i in kept]
        names = ("flow", "edit", "direct", "by_position")
        parts = {name: _chosen(getattr(found, name), kept, 0) for name in names}
        return replace(found, labels=labels, edge_flow=_chosen(found.edge_flow, kept, 1), **parts)

    def _edges(self, n_pos: int) -> Tensor:
        """Flows on edges [reader, writer, batch, pos, target]; zero to readers that are not later."""
        direct = torch.stack(self.direct[::-1]) if self.direct else self.effect.new_zeros(0, *self.effect.shape)
        rows = [nn.functional.pad(own, (0, 0) * 2 + (0, len(direct) - len(own))) for own in self.edge_flow[::-1]]
        stacked = torch.stack([*rows, direct])
        return rearrange(stacked, "reader writer (pos target) batch -> reader writer batch pos target", pos=n_pos)

    def _warn(self, found: Flow, reached: list[int], still_open: int) -> None:
        """Warn of effects that stay open, and of prompts that the intervention does not reach."""
        missed = [prompt for prompt, is_reached in enumerate(reached) if not is_reached]
        if missed:
            warn_caller(
                f"The intervention moves no target of prompts {missed}: it does nothing there, or acts on padding or after the "
                f"positions that are read. Positions in hooks are columns of the padded row, -1 its last.",
                UserWarning,
            )
        if still_open:
            warn_caller(
                f"{still_open} of {found.closed.numel()} effects stay open: the error of the nodes is up to "
                f"{100 * float(found.gap_share.max()):.3g}% of the effect, above the tolerance of {100 * self.tolerance:.3g}%. "
                f"Flows of open effects explain nothing; take nodes='auto', or a smaller intervention.",
                UserWarning,
            )


def _chosen(values: Tensor | None, kept: list[int], axis: int) -> Tensor | None:
    """Some slices of an axis, without an index, whose copy to a device waits for it."""
    if values is None:
        return None
    parts = [values.narrow(axis, i, 1) for i in kept]
    return torch.cat(parts, axis) if parts else values.narrow(axis, 0, 0)


def products(covectors: Tensor, changes: Tensor, *, by_position: bool = False) -> Tensor:
    """Inner products of covectors [cell, batch, length, d_model] with changes [part, batch, length, d_model].

    [part, cell, batch], or [part, cell, batch, length]; float64.
    """
    letters = "pcbl" if by_position else "pcb"
    return torch.einsum(f"cbld,pbld->{letters}", covectors.double(), changes.double())
