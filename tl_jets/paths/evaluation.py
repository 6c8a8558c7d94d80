"""Evaluate the paths of a path graph: all of them, each prefix once, or the largest, by a beam search over prefixes.

**All paths.** Paths with a common prefix share its value. Stage by stage, all prefixes that take a step go through it
in one batch. A batch larger than `chunk_size` is split and its parts are finished one after the other, so at most about
stages x chunk_size streams are held. Prefixes that no path completes are not evaluated.

**The largest** (`search`). After each stage the score of a prefix x is the larger of two sizes:

- the size of the path that ends here: x through the frozen final norm and the unembedding;
- the size of *all its completions together*: <g, x>, where the functional g (the effect on a target; for lengths, the
  product with the model's logits) is pulled back exactly through every later stage, g_s = g_{s+1} + sum A_s' g_{s+1}.

The search is greedy: a prefix with large completions that cancel may be lost, and under `rank="length"` one whose completions
are perpendicular to the model's logits. `PathCache.missed` bounds what was missed; the result
names the dropped prefix of the highest score. The sizes of the returned paths and the remainder are exact. Of the 20 largest
of 1,024 paths of stories260K (four prompts, both ranks, the last position or all) a beam of 40 prefixes found all in 16 of 16
cases, one of 20 at least 17. Cost: a backward sweep for every position and target, then `width` prefixes per stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import CenterScale, jet, norm_jet, rescaled
from tl_jets.core.attribution import LogitAttribution, Rank
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP, FINAL_STREAM, frozen_biases, some
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.paths.graph import PathGraph, Source, State, path_graph


@dataclass(frozen=True, eq=False)
class JetStages:
    """Algorithm 2's stages at one input: jets of order k, `weights` 1 / N_s by stage and for the decoder."""

    trace: Trace
    order: int
    center_scale: CenterScale
    weights: tuple[float, ...]
    split_degrees: bool

    @cached_property
    def sources(self) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Embeddings and edits, by label."""
        trace = self.trace
        found = {label: trace[label] for label in trace.network.sources}
        for stream in trace.network.streams:
            found |= trace.edits(stream)
        return found

    def kept(self, index: int, values: Tensor) -> Tensor:
        """The identity terms of prefixes that skip a stage."""
        return values if self.order else self.weights[index] * values

    def writes(self, index: int, values: Float[Tensor, "path batch pos d_model"]) -> Tensor:
        """The weighted jets of a stage's steps at every prefix [write, path, batch, pos, d_model]."""
        stage = self.trace.network.stages[index]
        gammas, variate = self.trace.stage_function(stage), self.trace[stage.stream]
        centers = rescaled(self.trace.decoder.norm, values, variate, self.center_scale)
        return self.weights[index] * torch.stack([jet(gammas, x, variate, self.order).value for x in centers], 1)

    def terms(
        self, values: Float[Tensor, "path batch pos d_model"], rows: Rows
    ) -> list[tuple[Float[Tensor, "path batch out_pos d_model"], float]]:
        """Weighted jets of the final norm at every path, whole or by degree, with their multiples of b_U."""
        values, variate = rows.at(values, 1), rows.at(self.trace[FINAL_STREAM])
        weight, norm = self.weights[-1], self.trace.decoder.norm
        centers = rescaled(norm, values, variate, self.center_scale)
        series = norm_jet(norm, centers, variate.expand_as(values), self.order)
        if not self.split_degrees:
            return [(weight * series.value(), weight)]
        return [(weight * c, 0.0 if degree else weight) for degree, c in enumerate(series.coefficients())]


def stage_weights(graph: PathGraph, *, order: int, renormalize: bool) -> tuple[float, ...]:
    """1 / N_s by stage and for the decoder: of all paths, or of the kept ones."""
    counts = [moving if renormalize and order else n for n, moving in graph.prefixes()]
    return tuple(1 / max(1, n) for n in counts)


# Evaluators of stages.
Stages = FrozenNetwork | JetStages


class Prefix(NamedTuple):
    """The beginning of a path: its source and steps so far, and the state that its completions depend on."""

    path: Path
    state: State


Prefixes = list[Prefix]
Finish = Callable[[Prefixes, Tensor], None]


def starts(graph: PathGraph, stages: Stages, stage: int) -> tuple[Prefixes, list[Tensor]]:
    """The sources that start at a stage and can be completed, with their values."""
    values = stages.sources
    found = [
        Prefix(Path(source.label), graph.state(source))
        for source in graph.sources
        if source.start == stage and source.label in values and graph.is_alive(stage, graph.state(source))
    ]
    return found, [values[prefix.path.source] for prefix in found]


def through_stage(
    graph: PathGraph, stages: Stages, prefixes: Prefixes, values: Tensor, stage: int
) -> tuple[Prefixes, Tensor]:
    """The prefixes after a stage, with their values: first those that skip it, then those that take one of its steps.

    `values` are [path, batch, pos, d_model].
    """
    onward = [dict(graph.onward(stage, prefix.state)) for prefix in prefixes]
    stay = [i for i, prefix in enumerate(prefixes) if graph.is_alive(stage + 1, prefix.state)]
    move = [i for i, steps in enumerate(onward) if steps]
    found, parts = [prefixes[i] for i in stay], [stages.kept(stage, values[stay])]
    if move:
        writes, rows = stages.writes(stage, values[move]), taken_rows(graph, stages, stage)
        for index, (step, row) in enumerate(zip(graph.stages[stage], rows, strict=True)):
            taken = [n for n, i in enumerate(move) if index in onward[i]]
            found += [Prefix(prefixes[move[n]].path.then(step), onward[move[n]][index]) for n in taken]
            parts.append(writes[row, taken])
    return found, torch.cat(parts)


def taken_rows(graph: PathGraph, stages: Stages, stage: int) -> list[int]:
    """Indices of the path graph's steps among all writes of a stage."""
    every = [step.label for step in stages.trace.network.stages[stage].steps]
    return [every.index(step) for step in graph.stages[stage]]


def evaluate(graph: PathGraph, stages: Stages, chunk_size: int, finish: Finish) -> dict[int, Tensor]:
    """Evaluate all paths in chunks of prefixes; return the sum of all prefixes before each stage, by index.

    `finish` receives each finished path once, before the decoder.
    """
    sums: dict[int, Tensor] = {}

    def go_on(prefixes: Prefixes, values: Tensor, stage: int) -> None:
        while True:
            sums[stage] = sums[stage] + values.sum(0) if stage in sums else values.sum(0)
            if stage == len(graph.stages):
                finish(prefixes, values)
                return
            if len(prefixes) > chunk_size:
                break
            prefixes, values = through_stage(graph, stages, prefixes, values, stage)
            stage += 1
            if not prefixes:
                return
        for start in range(0, len(prefixes), chunk_size):
            part = slice(start, start + chunk_size)
            following, carried = through_stage(graph, stages, prefixes[part], values[part], stage)
            if following:
                go_on(following, carried, stage + 1)

    for stage in sorted({source.start for source in graph.sources}):
        prefixes, values = starts(graph, stages, stage)
        if prefixes and stage <= len(graph.stages):
            go_on(prefixes, torch.stack(values), stage)
    return sums


@torch.no_grad()
def search(
    graph: PathGraph, frozen: FrozenNetwork, attribution: LogitAttribution, rank: Rank, width: int, finish: Finish
) -> tuple[str, float] | None:
    """Find large paths by a beam of `width` prefixes; `finish` receives them before they are decoded.

    Returns the dropped prefix of the highest score, and this score: that of all its completions together, or of itself.
    """
    # g_s before every stage and the decoder, [many * out_pos, batch, pos, d_model], last first
    final = attribution.functionals(rank).to(frozen.final_scale)
    functionals = [frozen.decode_transpose(final, attribution.rows).flatten(0, 1)]
    for frozen_stage, steps in reversed(list(zip(frozen.stages, graph.stages, strict=True))):
        g, taken = functionals[-1], [step.label in steps for step in frozen_stage.stage.steps]
        functionals.append(g + frozen_stage.pulled_back(g, taken) if any(taken) else g)

    def scores(prefixes: Prefixes, values: Tensor, functional: Tensor) -> Tensor:
        states = frozen.decode(values, attribution.rows)
        ends = attribution.sizes(attribution.augmented(states, values.new_zeros(len(values))), rank)
        complete = torch.tensor([prefix.state[0] == 0 for prefix in prefixes], device=ends.device)
        every = torch.einsum("gbtd,nbtd->ngb", functional, values).double().flatten(1)
        together = every.norm(dim=-1) if rank == "length" else every.abs().sum(-1)
        return torch.maximum(torch.where(complete, ends, 0), together)

    prefixes: Prefixes = []
    lost: list[tuple[str, float]] = []
    values = final.new_zeros(0, *functionals[0].shape[1:])
    for stage in range(len(graph.stages) + 1):
        joining, new = starts(graph, frozen, stage)
        prefixes, values = prefixes + joining, torch.cat([values, *(value[None] for value in new)])
        functional = functionals.pop()
        if len(prefixes) > width:
            found = scores(prefixes, values, functional)
            order = found.argsort(descending=True, stable=True)
            lost.append((str(prefixes[int(order[width])].path), float(found[order[width]])))
            keep = order[:width].sort().values
            prefixes, values = [prefixes[i] for i in keep.tolist()], values[keep]
        if stage < len(graph.stages) and prefixes:
            prefixes, values = through_stage(graph, frozen, prefixes, values, stage)
    if prefixes:
        finish(prefixes, values)
    return max(lost, key=lambda prefix: prefix[1], default=None)


class Collector:
    """Finished paths: states [batch, out_pos, d_model] and multiples of b_U; with `top`, only so many of the largest."""

    def __init__(
        self,
        graph: PathGraph,
        split: Callable[[Path], list[Path]],
        rows: Rows,
        stages: Stages,
        attribution: LogitAttribution | None,
        rank: Rank,
        top: int | None,
    ):
        self.graph, self.split, self.rows, self.stages = graph, split, rows, stages
        self.attribution, self.top = attribution, top
        self.rank: Rank = rank
        # State, multiple of b_U and size by path; with `top`, the largest first.
        self.found: dict[str, tuple[Tensor, float, float]] = {}

    def add(self, prefixes: Prefixes, values: Tensor) -> None:
        """Decode and collect finished paths."""
        for degree, (states, weight) in enumerate(self.stages.terms(values, self.rows)):
            self._take([self.split(prefix.path.then(DECODER_STEP))[degree] for prefix in prefixes], states, weight)

    def add_constant(self) -> None:
        """Collect the decoder's own constant, if it is one of the paths."""
        prefixes, values = starts(self.graph, self.stages, len(self.graph.stages) + 1)
        if prefixes:
            self._take([prefix.path for prefix in prefixes], self.rows.at(torch.stack(values), 1), 1.0)

    def _take(self, paths: list[Path], states: Tensor, weight: float) -> None:
        labels = [str(path) for path in paths]
        if self.attribution is None:
            self.found |= {label: (state, weight, 0.0) for label, state in zip(labels, states, strict=True)}
            return
        parts = self.attribution.augmented(states, states.new_full((len(states),), weight))
        sizes = self.attribution.sizes(parts, self.rank)
        for label, state, size in zip(labels, states, sizes.tolist(), strict=True):
            self.found[label] = state, weight, size
        # Ties keep the earlier path; a view would hold the states of the others.
        largest = sorted(self.found.items(), key=lambda item: -item[1][2])[: self.top]
        self.found = {label: (state.clone(), weight, size) for label, (state, weight, size) in largest}

    def terms(self, paths: Iterable[Path]) -> tuple[dict[str, Tensor], list[float]]:
        """The collected states and multiples of b_U, in the order of `paths`, or by size with `top`."""
        found = {str(path): self.found[str(path)] for path in paths} if self.top is None else self.found
        return {label: state for label, (state, *_) in found.items()}, [weight for _, weight, _ in found.values()]


def with_edits(graph: PathGraph, trace: Trace) -> PathGraph:
    """The path graph with an additional source for every hook edit of a stream of the trace."""
    found = [
        Source(label, place) for place, stream in enumerate(trace.network.streams) for label in trace.edits(stream)
    ]
    known = {source.label for source in graph.sources}
    return replace(graph, sources=(*graph.sources, *(edit for edit in found if edit.label not in known)))


def absent_constants(network: ResidualNetwork) -> frozenset[str]:
    """Constants that no bias of the model gives, by its weights; all may be there if these are not known."""
    has_biases = getattr(network.view, "has_biases", None)
    if has_biases is None:
        return frozenset()
    bare = {layer for layer in range(network.n_layers) if not has_biases(layer)}
    constants = zip(network.stages, frozen_biases(network.stages), strict=True)
    found = {label for stage, labels in constants for label, _ in labels if stage.steps[0].layer in bare}
    bias, b_U = network.decoder.norm.bias, network.decoder.b_U
    has_last = bool(b_U.any()) or (bias is not None and bool(bias.any()))
    return frozenset(found if has_last else {*found, DECODER_STEP + BIAS})


def with_constants(graph: PathGraph, frozen: FrozenNetwork) -> PathGraph:
    """The path graph with constants that are not zero at this input though no bias gives them, as a hook's."""
    there = graph.absent & frozen.sources.keys()
    if not there:
        return graph
    network = frozen.trace.network
    every = path_graph(network.stages, network.sources, detached=True).sources
    added = tuple(source for source in every if source.label in there)
    return replace(graph, sources=(*graph.sources, *added), absent=graph.absent - there)


def along(
    paths: Iterable[tuple[Path, list[tuple[int, int]]]],
    source: Callable[[str], Tensor],
    writes: Callable[[int, Tensor], Tensor],
) -> dict[Path, Tensor]:
    """What arrives at the ends of paths and of their prefixes, by path: each is evaluated once, those into a stage together.

    Args:
        paths: Paths with their places, as of `read_path`.
        source: The value of a source.
        writes: What a stage's steps make [write, path, ...] of values [path, ...].
    """
    sent: dict[Path, Tensor] = {}
    ends: dict[int, dict[Path, tuple[Path, int]]] = {}
    for path, order in paths:
        prefix = Path(path.source)
        sent[prefix] = sent[prefix] if prefix in sent else source(path.source)
        for step, (stage, row) in zip(path.steps, order, strict=True):
            ends.setdefault(stage, {})[prefix.then(step)] = prefix, row
            prefix = prefix.then(step)
    for stage in sorted(ends):
        before = list(dict.fromkeys(prefix for prefix, _ in ends[stage].values()))
        found = writes(stage, torch.stack([sent[prefix] for prefix in before]))
        sent |= {path: found[row, before.index(prefix)] for path, (prefix, row) in ends[stage].items()}
    return sent


def read_path(trace: Trace, path: str | Path) -> tuple[Path, list[tuple[int, int]]]:
    """A detached path of a trace's network without the decoder, and the (stage, write) index of each step.

    Raises:
        ValueError: An unknown source or step, steps out of order, or `ln_final_bias`, which is in no stream.
    """
    path = Path.parse(str(path))
    network, steps = trace.network, path.steps[:-1] if path.steps[-1:] == (DECODER_STEP,) else path.steps
    graph = with_edits(path_graph(network.stages, network.sources, detached=True), trace)
    starts = [source.label for source in graph.sources if source.start <= len(network.stages)]
    if path.source not in starts:
        raise ValueError(
            f"A path starts at one of {some(starts)}, and is written `embed > 0_mlp > ln_final`; got {path.source!r}."
        )
    if Path(path.source, (*steps, DECODER_STEP)) not in graph:
        raise ValueError(
            f"A path passes through steps of later and later stages, after its source, of {some(sum(graph.stages, ()))} at "
            f"granularity {network.granularity!r}; got {str(path)!r}."
        )
    where = {step.label: (s, row) for s, stage in enumerate(network.stages) for row, step in enumerate(stage.steps)}
    return Path(path.source, steps), [where[step] for step in steps]
