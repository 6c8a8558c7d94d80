"""`Circuit`: edges of a residual network as plain data, made of paths, of attributions, or by hand.

An edge (writer, reader, score) says that a step reads what a source or step wrote to the stream. A path `embed > 0_mlp >
L1H2 > ln_final` has the edges `embed -> 0_mlp`, `0_mlp -> L1H2` and `L1H2 -> ln_final`.

**Positions.** A path that is read at one position p is at p after its last step that moves between positions (attention);
the edges before that are at all positions (None).

Example:
    >>> circuit = Circuit.of_paths(["embed > 0_mlp > L1H2 > ln_final", "embed > ln_final"], scores=[2.0, -0.5], position=-1)
    >>> circuit
    Circuit(4 edges of 3 nodes)
    >>> circuit.to_dataframe()
      writer    reader position  score
    0  embed     0_mlp     None    2.0
    1  0_mlp      L1H2     None    2.0
    2   L1H2  ln_final       -1    2.0
    3  embed  ln_final       -1   -0.5
    >>> [str(path) for path in circuit.paths()]
    ['embed > 0_mlp > L1H2 > ln_final', 'embed > ln_final']
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd

from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.results import Result

# Steps that read and write at one position.
_STAYS = re.compile(r"\d+_mlp(_rest)?|L\d+N\d+|ln_final")
MAX_PATHS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Edges between what writes to the stream and what reads it.

    Attributes:
        edges: (writer, reader, score). Writers are sources and steps (`embed`, `L0H3`, `3_mlp`), readers steps and
            `ln_final`; `L1H2_q`, `L1H2_k` and `L1H2_v` are a head's single inputs.
        positions: Of each edge, among each prompt's real tokens; None for all.
    """

    edges: list[tuple[str, str, float]]
    positions: list[int | None]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.positions):
            raise ValueError(
                f"A circuit has a position (or None) for every edge; got {len(self.edges)} edges and "
                f"{len(self.positions)} positions."
            )

    def __repr__(self) -> str:
        return f"Circuit({len(self.edges):,} edges of {len(self.nodes):,} nodes)"

    @classmethod
    def of_edges(cls, edges: Iterable[Sequence[Any]]) -> Circuit:
        """A circuit of (writer, reader) or (writer, reader, score), at all positions; scores are 1 where none is given."""
        found = [(writer, reader, float(score[0]) if score else 1.0) for writer, reader, *score in edges]
        return cls(found, [None] * len(found))

    @classmethod
    def of_paths(
        cls, paths: Iterable[str | Path], scores: Sequence[float] | None = None, *, position: int | None = None
    ) -> Circuit:
        """The edges of some paths, each once.

        Args:
            paths: Paths from a source to `ln_final` (added where it is missing). `ln_final_bias` has no edge.
            scores: A number per path; an edge gets the sum over its paths. None for the number of its paths.
            position: Where paths are read, among each prompt's real tokens; None for all positions.
        """
        parsed = [Path.parse(str(path)) for path in paths]
        weights = [1.0] * len(parsed) if scores is None else [float(score) for score in scores]
        found = []
        for path, score in zip(parsed, weights, strict=True):
            steps = [step for step in path.steps if not step.startswith(DECODER_STEP)]
            labels = [] if path.source.startswith(DECODER_STEP) else [path.source, *steps, DECODER_STEP]
            for index, (writer, reader) in enumerate(pairwise(labels), 1):
                stays = all(_STAYS.fullmatch(step) for step in labels[index:])
                found.append((writer, reader, score, position if stays else None))
        return cls._summed(found)

    @classmethod
    def _summed(cls, found: Iterable[tuple[str, str, float, int | None]]) -> Circuit:
        """A circuit of edges with positions; scores of the same edge add up."""
        total: dict[tuple[str, str, int | None], float] = {}
        for writer, reader, score, position in found:
            key = (writer, reader, position)
            total[key] = total.get(key, 0.0) + score
        return cls([(w, r, score) for (w, r, _), score in total.items()], [place for _, _, place in total])

    @property
    def nodes(self) -> list[str]:
        """Everything that writes or reads, without `ln_final`, each once."""
        every = (node_of(label) for writer, reader, _ in self.edges for label in (writer, reader))
        return [label for label in dict.fromkeys(every) if label != DECODER_STEP]

    def merged(self) -> Circuit:
        """The circuit with a head's inputs q, k and v as one edge, whose score is their sum."""
        pairs = zip(self.edges, self.positions, strict=True)
        return self._summed((writer, node_of(reader), score, place) for (writer, reader, score), place in pairs)

    def top(self, k: int) -> Circuit:
        """The k edges with the largest absolute scores, largest first."""
        order = sorted(range(len(self.edges)), key=lambda i: -abs(self.edges[i][2]))[:k]
        return Circuit([self.edges[i] for i in order], [self.positions[i] for i in order])

    def paths(self, max_paths: int = MAX_PATHS) -> list[Path]:
        """The paths from a writer that reads nothing to `ln_final` along edges, at whatever positions.

        Raises:
            ValueError: More than `max_paths`, or edges in a circle.
        """
        following: dict[str, list[str]] = {}
        for writer, reader, _ in self.edges:
            readers = following.setdefault(writer, [])
            readers += [node_of(reader)] if node_of(reader) not in readers else []
        read = {reader for readers in following.values() for reader in readers}

        def onward(before: tuple[str, ...]) -> Iterator[Path]:
            for reader in following.get(before[-1], ()):
                if reader in before:
                    raise ValueError(f"Edges lead from earlier to later steps; these lead from {reader} to itself.")
                if reader == DECODER_STEP:
                    yield Path(before[0], (*before[1:], DECODER_STEP))
                yield from onward((*before, reader))

        found: list[Path] = []
        for source in (writer for writer in following if writer not in read):
            for path in onward((source,)):
                found.append(path)
                if len(found) > max_paths:
                    raise ValueError(
                        f"At most max_paths = {max_paths:,} paths are listed; here are more. Take fewer edges: top(k)."
                    )
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge: writer, reader, position, score."""
        table = pd.DataFrame(self.edges, columns=["writer", "reader", "score"])
        table.insert(2, "position", pd.Series(self.positions, dtype=object))
        return table

    def to_networkx(self) -> Any:
        """A `networkx.MultiDiGraph`, whose edges have `score` and `position`."""
        import networkx

        graph = networkx.MultiDiGraph()
        for (writer, reader, score), position in zip(self.edges, self.positions, strict=True):
            graph.add_edge(writer, reader, score=score, position=position)
        return graph

    def to_dot(self) -> str:
        """The graph in Graphviz' language, with scores as labels of edges."""
        lines = [f"  {json.dumps(w)} -> {json.dumps(r)} [label={json.dumps(f'{s:.3g}')}];" for w, r, s in self.edges]
        return "\n".join(["digraph circuit {", "  rankdir=BT;", *lines, "}"])


def ranked(statistics: Any) -> list[tuple[Path, float]]:
    """The paths of a `PathStatistics` with their mean effects (of two targets, the difference), by mean absolute effect."""
    if statistics.by != "path":
        raise ValueError(f"A circuit is made of statistics by 'path'; got by {statistics.by!r}.")
    effects = statistics.effects[..., 0]
    if statistics.effects.shape[-1] == 2:
        effects = effects - statistics.effects[..., 1]
    cells = effects[:, statistics.valid]
    order = cells.abs().mean(-1).argsort(descending=True, stable=True).tolist()
    means = cells.mean(-1).tolist()
    return [(Path.parse(statistics.labels[i]), means[i]) for i in order]


def circuit_of(statistics: Any, k: int | None, by_position: bool) -> Circuit:
    """The circuit of the first k ranked paths."""
    paths = ranked(statistics)[:k]
    one = isinstance(statistics.positions, list) and len(statistics.positions) == 1
    if by_position and not one:
        raise ValueError(
            f"by_position needs paths read at one position; got {statistics.positions}. Pass positions=-1."
        )
    position = int(statistics.positions[0]) if by_position else None
    return Circuit.of_paths([path for path, _ in paths], [score for _, score in paths], position=position)


def node_of(label: str) -> str:
    """The node of a reader or writer: `L1H2` of its input `L1H2_q`.

    Example:
        >>> node_of("L1H2_q"), node_of("3_mlp")
        ('L1H2', '3_mlp')
    """
    return label[:-2] if re.fullmatch(r"L\d+H\d+_[qkv]", label) else label
