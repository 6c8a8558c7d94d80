"""Evaluate the paths of a path graph: each prefix once, in chunks, depth first.

Paths with a common prefix share its value. Stage by stage, all prefixes that take a step go through it in one batch. A
batch larger than `chunk_size` is split and its parts are finished one after the other, so at most about stages x
chunk_size streams are held. Prefixes that no path completes are not evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, some
from tl_jets.core.trace import Trace
from tl_jets.paths.graph import Lattice, Source, State, lattice_of
from tl_jets.paths.jet_stages import JetStages

# Evaluators of stages.
Stages = FrozenNetwork | JetStages


@dataclass(frozen=True)
class Prefix:
    """The beginning of a path: its source and steps so far, and the state that its completions depend on."""

    path: Path
    state: State


Prefixes = list[Prefix]


def starts(lattice: Lattice, stages: Stages, stage: int) -> tuple[Prefixes, list[Tensor]]:
    """The sources that start at a stage and can be completed, with their values."""
    values = stages.sources
    found = [
        Prefix(Path(source.label), (lattice.start(source), 0))
        for source in lattice.sources
        if source.start == stage and source.label in values and lattice.is_alive(stage, (lattice.start(source), 0))
    ]
    return found, [values[prefix.path.source] for prefix in found]


def through_stage(
    lattice: Lattice, stages: Stages, rows: Sequence[Sequence[int]], prefixes: Prefixes, values: Tensor, stage: int
) -> tuple[Prefixes, Tensor]:
    """The prefixes after a stage, with their values: first those that skip it, then those that take one of its steps.

    `rows` holds, by stage, the index of each step of the path graph among the stage's writes; `values` are
    [path, batch, pos, d_model].
    """
    onward = [dict(lattice.onward(stage, prefix.state)) for prefix in prefixes]
    stay = [i for i, prefix in enumerate(prefixes) if lattice.is_alive(stage + 1, prefix.state)]
    move = [i for i, steps in enumerate(onward) if steps]
    found, parts = [prefixes[i] for i in stay], [stages.kept(stage, values[stay])]
    if move:
        writes = stages.writes(stage, values[move])
        for index, step in enumerate(lattice.stages[stage]):
            taken = [row for row, i in enumerate(move) if index in onward[i]]
            found += [Prefix(prefixes[move[row]].path.then(step), onward[move[row]][index]) for row in taken]
            parts.append(writes[rows[stage][index], taken])
    return found, torch.cat(parts)


def walk(
    lattice: Lattice,
    stages: Stages,
    rows: Sequence[Sequence[int]],
    chunk_size: int,
    finish: Callable[[Prefixes, Tensor], None],
) -> dict[int, Tensor]:
    """Evaluate all paths in chunks of prefixes; return the sum of all prefixes before each stage, by index.

    `rows` is as in `through_stage`; `finish` receives each finished path once, before the decoder.
    """
    sums: dict[int, Tensor] = {}

    def go_on(prefixes: Prefixes, values: Tensor, stage: int) -> None:
        while True:
            sums[stage] = sums[stage] + values.sum(0) if stage in sums else values.sum(0)
            if stage == len(lattice.stages):
                finish(prefixes, values)
                return
            if len(prefixes) > chunk_size:
                break
            prefixes, values = through_stage(lattice, stages, rows, prefixes, values, stage)
            stage += 1
            if not prefixes:
                return
        for start in range(0, len(prefixes), chunk_size):
            part = slice(start, start + chunk_size)
            following, carried = through_stage(lattice, stages, rows, prefixes[part], values[part], stage)
            if following:
                go_on(following, carried, stage + 1)

    for stage in sorted({source.start for source in lattice.sources}):
        prefixes, values = starts(lattice, stages, stage)
        if prefixes and stage <= len(lattice.stages):
            go_on(prefixes, torch.stack(values), stage)
    return sums


def rows_of(lattice: Lattice, steps: Sequence[Sequence[str]]) -> list[list[int]]:
    """By stage, the indices of the path graph's steps among all steps of the stage."""
    return [[every.index(step) for step in kept] for kept, every in zip(lattice.stages, steps, strict=True)]


def with_edits(lattice: Lattice, trace: Trace) -> Lattice:
    """The path graph with an additional source for every hook edit of a stream of the trace."""
    found = [
        Source(label, place) for place, stream in enumerate(trace.network.streams) for label in trace.edits(stream)
    ]
    known = {source.label for source in lattice.sources}
    return replace(lattice, sources=(*lattice.sources, *(edit for edit in found if edit.label not in known)))


def read_path(trace: Trace, path: str | Path) -> tuple[Path, list[tuple[int, int]]]:
    """A path of the frozen network without its decoder, and the (stage, row) of each step.

    Raises:
        ValueError: Unknown source or step, steps out of order, or `ln_final_bias`, which is in no stream.
    """
    path = Path.parse(path) if isinstance(path, str) else path
    network = trace.network
    lattice = with_edits(lattice_of(network.stages, network.sources, detached=True), trace)
    starts = {source.label: source.start for source in lattice.sources if source.start <= len(network.stages)}
    if path.source not in starts:
        raise ValueError(
            f"A path starts at one of {some(starts)}, and is written `embed > 0_mlp > ln_final`; got {path.source!r}."
        )
    places = {
        step.label: (place, row)
        for place, stage in enumerate(network.stages)
        for row, step in enumerate(stage.steps)
        if step.kind != "attn_bias"
    }
    steps = path.steps[:-1] if path.steps[-1:] == (DECODER_STEP,) else path.steps
    order = [places.get(step, (-1, 0)) for step in steps]
    following = [starts[path.source] - 1, *(stage for stage, _ in order)]
    if any(a >= b for a, b in pairwise(following)):
        raise ValueError(
            f"A path passes through steps of later and later stages, after its source, of {some(places)} at granularity "
            f"{network.granularity!r}; got {str(path)!r}."
        )
    return Path(path.source, steps), order
