"""Circuits to compare with: the largest attributions of the same number, and paths or edges drawn at random."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from torch import Tensor

from tl_jets.circuits.pairs import Pair, readers_of
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP, some
from tl_jets.paths.circuit import Circuit
from tl_jets.paths.graph import PathGraph, path_graph

Level = Literal["node", "edge"]
# Writer, reader (or "") and position (or None for all).
Cell = tuple[str, str, int | None]
# Random paths drawn for each path before a control is left smaller.
TRIES = 20


def cells_of(pair: Pair, circuit: Circuit, level: Level) -> set[Cell]:
    """What is in a circuit: edges, or nodes that write (with reader ""), by position if the circuit has positions."""
    length, writers = pair.clean.tokens.shape[1], readers_of(pair.clean)[DECODER_STEP]
    by_position = any(position is not None for position in circuit.positions)
    found = set()
    for (writer, reader, _), position in zip(circuit.edges, circuit.positions, strict=True):
        places = [None] if not by_position else range(length) if position is None else [position % length]
        found |= {(writer_of(writer, writers), reader if level == "edge" else "", place) for place in places}
    return found


def attributed(pair: Pair, scores: Mapping[tuple[str, str], Tensor], like: Circuit, level: Level) -> Circuit:
    """The circuit of the largest attributions: as many edges, or nodes that write, as `like` has.

    Nodes are edges to `ln_final` here, and the sources of `like` are among them: without any, nothing is recovered.
    """
    taken, sources = cells_of(pair, like, level), pair.network.sources
    by_position = any(place is not None for _, _, place in taken)
    if by_position and not bool(pair.clean.valid.all()):
        raise ValueError("A circuit with positions needs prompts of one length, without padding. Pass one at a time.")
    total: dict[tuple[str, str], Tensor] = {}
    for (writer, reader), score in scores.items():
        edge = (writer, DECODER_STEP if level == "node" else reader)
        total[edge] = total.get(edge, 0) + score.mean(0)
    first = [cell for cell in taken if level == "node" and cell[0] in sources]
    edges, positions = [], []
    for (writer, reader), values in total.items():
        for place, value in enumerate(values.tolist()) if by_position else [(None, float(values.sum()))]:
            if (writer, "", place) not in first:
                edges.append((writer, reader, value))
                positions.append(place)
    best = Circuit(edges, positions).top(len(taken) - len(first))
    own = [(writer, DECODER_STEP, 0.0) for writer, _, _ in first]
    return Circuit([*own, *best.edges], [*(place for _, _, place in first), *best.positions])


def random_paths(pair: Pair, paths: Sequence[Path], like: Circuit, level: Level, draw: random.Random) -> Circuit:
    """The circuit of random paths with the sources and lengths of these, as many as fit into the size of theirs.

    Each is drawn uniformly from all such paths; one that would make more nodes or edges than `like` has is left out.
    """
    graph = path_graph(pair.network.stages, pair.network.sources, detached=True)
    starts = {source.label: source.start for source in graph.sources}
    unknown = [path.source for path in paths if path.source not in starts]
    if unknown:
        raise ValueError(f"Random paths start where the paths do, at one of {some(starts)}; got {unknown[0]!r}.")
    size = len(cells_of(pair, like, level))
    found: list[Path] = []
    for path in [*paths, *draw.choices(paths, k=TRIES * len(paths))]:
        drawn = Path(path.source, _steps(graph, starts[path.source], path.length, draw))
        if len(cells_of(pair, Circuit.of_paths([*found, drawn]), level)) <= size:
            found.append(drawn)
        if len(cells_of(pair, Circuit.of_paths(found), level)) == size:
            break
    return Circuit.of_paths(found)


def random_edges(pair: Pair, circuit: Circuit, draw: random.Random) -> Circuit:
    """As many edges of the network as a circuit has, at the same positions."""
    every = [(writer, reader, 1.0) for reader, writers in readers_of(pair.clean).items() for writer in writers]
    return Circuit(draw.sample(every, len(circuit.edges)), circuit.positions)


def writer_of(label: str, writers: Collection[str]) -> str:
    """The writer that a source of paths is part of: `3_mlp` for `3_mlp_bias`, unless the bias is a write of its own."""
    return label if label in writers else label.removesuffix(BIAS)


def _steps(graph: PathGraph, start: int, length: int, draw: random.Random) -> tuple[str, ...]:
    """So many steps from a stage on, uniformly over all choices."""

    def ways(stage: int, left: int) -> int:
        counts = graph.completions(stage, 0)
        return counts[left] if 0 <= left < len(counts) else 0

    steps: list[str] = []
    for stage in range(start, len(graph.stages)):
        skip, left = ways(stage + 1, length - len(steps)), ways(stage + 1, length - len(steps) - 1)
        if draw.randrange(skip + len(graph.stages[stage]) * left) >= skip:
            steps.append(draw.choice(graph.stages[stage]))
    return tuple(steps)
