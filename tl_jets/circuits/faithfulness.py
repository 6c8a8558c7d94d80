r"""Faithfulness of circuits: how much of a logit difference a circuit recovers when everything outside it is replaced.

With m the logit difference of two tokens, and the writes outside the circuit replaced (`tl_jets.circuits.pairs`),

.. math::
    \text{recovered} = \frac{m(\text{circuit}) - m(\text{corrupted})}{m(\text{clean}) - m(\text{corrupted})} ,

1 for the clean run, 0 for the corrupted one; a circuit can do more than 1, or less than 0. What is outside, by `level`:

- ``"node"``: all that the writers outside write. A writer of the circuit reaches every reader.
- ``"edge"``: what arrives along the edges outside. The same writer may be replaced for one reader and kept for another.

==============  =====================================================================================
baseline        a write outside becomes
==============  =====================================================================================
``corrupted``   what the same writer writes in the corrupted run, embeddings too
``zero``        zero; embeddings stay, and so does the bias of an attention layer at head granularity
``mean``        its mean over the real positions of a reference's prompts; embeddings stay
==============  =====================================================================================

Source: Wang et al. 2022, *Interpretability in the Wild*; Hanna et al. 2024, *Have Faith in Faithfulness*. With the corrupted
baseline the same number as `faithfulness` of TransformerLens 4.3, which refuses grouped-query attention.

Example:
    >>> import tl_jets as tj
    >>> network = tj.ResidualNetwork(tj.load_tinydocs())
    >>> clean, corrupted = "This function is available on Unix and", "This module is deprecated since version and"
    >>> paths = tj.exponential_expansion(network, linearize="detached", top=8, rank="effect")(clean, positions=-1)
    >>> found = circuit_faithfulness(network, clean, corrupted, paths, k=[4, 8], random=2)
    >>> found
    CircuitFaithfulness(level 'node', 2 sizes; baselines ['corrupted', 'zero']; <clean answer> - <corrupted answer>)
    >>> list(found.summary().columns[:6])
    ['circuit', 'k', 'baseline', 'nodes', 'edges', 'logit_difference']
"""

from __future__ import annotations

import random as chance
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_jets.circuits.attribution_patching import edge_scores
from tl_jets.circuits.contrast import Contrast
from tl_jets.circuits.controls import Level, attributed, random_edges, random_paths, writer_of
from tl_jets.circuits.pairs import Pair, PairResult, Writes, mean_of, readers_of, run, writes_of
from tl_jets.core.changes import one_look
from tl_jets.core.measures import check_seed
from tl_jets.core.network import trace_of
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, some
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.interventions.sites import network_of
from tl_jets.paths.cache import PathCache
from tl_jets.paths.circuit import Circuit, node_of, ranked
from tl_jets.paths.statistics import PathStatistics

# Writers whose clean writes a reader gets, each at some positions [batch, pos].
Kept = dict[str, dict[str, Bool[Tensor, "batch pos"]]]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class CircuitFaithfulness(PairResult):
    """Logit differences that circuits give. Axes: [circuit, baseline, batch].

    Targets and their unit as in `PairResult`.

    Attributes:
        kinds: `paths` (or `circuit`), `attribution`, `random` (one per draw) and `nothing`, aligned to the circuit axis.
        k: The number of paths or edges of each.
        circuits: The circuits.
        baselines: What replaces the rest, aligned to the baseline axis.
        level: `"node"` or `"edge"`.
        logit_difference: Logit of the first target less that of the second, in `unit`.
        clean: The same in the clean run.
        corrupted: The same in the corrupted run.
        seed: Seed of the random circuits.
    """

    kinds: list[str]
    k: list[int]
    circuits: list[Circuit]
    baselines: list[str]
    level: Level
    logit_difference: Float[Tensor, "circuit baseline batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    seed: int | None = None

    def __repr__(self) -> str:
        return (
            f"CircuitFaithfulness(level {self.level!r}, {len(set(self.k) - {0})} sizes; baselines {self.baselines}; "
            f"{self._difference_name})"
        )

    def _body(self) -> str:
        return dataframe_html(self.summary())

    @property
    def recovered(self) -> Float[Tensor, "circuit baseline"]:
        """The formula of the module, of means over the prompts."""
        low = self.corrupted.mean()
        return (self.logit_difference.mean(-1) - low) / (self.clean.mean() - low)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per circuit and baseline: circuit, k, baseline, nodes, edges, logit_difference, recovered."""
        every = zip(self.kinds, self.k, self.circuits, strict=True)
        rows = [(kind, k, base, len(x.nodes), len(x.edges)) for kind, k, x in every for base in self.baselines]
        values = {"logit_difference": self.logit_difference.mean(-1), "recovered": self.recovered}
        frame = pd.DataFrame(rows, columns=["circuit", "k", "baseline", "nodes", "edges"])
        return frame.assign(**{name: x.flatten().tolist() for name, x in values.items()})

    def summary(self) -> pd.DataFrame:
        """The same with one row for all random draws: their mean, and the lowest and highest `recovered`."""
        groups = self.to_dataframe().groupby(["circuit", "k", "baseline"], sort=False)
        table = pd.DataFrame(groups.mean())
        table["lowest"], table["highest"] = groups["recovered"].min(), groups["recovered"].max()
        return table.reset_index()


@one_look()
def circuit_faithfulness(
    model: Any,
    clean: Any,
    corrupted: Any,
    paths: PathCache | PathStatistics | Contrast | Circuit | Sequence[str | Path],
    *,
    k: int | Sequence[int] | None = None,
    level: Level = "node",
    targets: TargetInput | None = None,
    position: int = -1,
    reference: Any = None,
    random: int = 5,
    seed: int = 0,
    attention_mask: Tensor | None = None,
) -> CircuitFaithfulness:
    """How much of a logit difference the first k paths, or edges, recover, beside controls of the same size.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork`. For a model the granularity is that of the labels.
        clean: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        corrupted: As many prompts, of the same lengths in tokens.
        paths: Paths, best first (a `PathCache` and `PathStatistics` are ordered by their effects on `targets`), a `Contrast` by
            path, or a `Circuit`, whose edges are ordered by their absolute scores.
        k: How many of them; several for a curve; None for all.
        level: What is outside a circuit, `"node"` or `"edge"` (see the module).
        targets: Two tokens, or two a prompt: the logit of the first less that of the second is measured. None for the clean and
            the corrupted prompt's answers.
        position: Where it is read, among each prompt's real tokens.
        reference: Prompts for the baseline `mean`, which is left out without them.
        random: Number of random circuits for each k: paths of the same sources and lengths, as many as fit into as many nodes
            or edges; for a `Circuit`, as many edges.
        seed: What they are drawn from.
        attention_mask: Passed to the model (left padding needs it).

    Returns:
        A `CircuitFaithfulness` of the circuits, of those of attribution patching with as many nodes or edges (see `level`), of
        random ones, and of `nothing`.

    Raises:
        ValueError: Inputs of different lengths or padding, bad targets, labels that the network lacks, or clean and corrupted
            prompts with the same logit difference.
        NotImplementedError: A step that cannot be replayed.

    Cost: an attribution patching; for each circuit and baseline an evaluation of the network, or at most one per reader (edges).
    Example: in the docstring of `tl_jets.circuits.faithfulness`.
    """
    check_choice("level", level, get_args(Level))
    check_integers(0, random=random)
    check_seed(seed)
    chosen = paths.merged() if isinstance(paths, Circuit) else ordered_paths(paths, targets)
    labels = chosen.nodes if isinstance(chosen, Circuit) else [x for path in chosen for x in (path.source, *path.steps)]
    pair = Pair.of(network_of(model, labels), clean, corrupted, targets, position, attention_mask)
    candidates = _candidates(pair, chosen, k, level, random, seed)
    ends, baselines = pair.ends(), _baselines(pair, reference)
    with torch.no_grad():
        kept = [_kept(pair, circuit, level) for _, _, circuit in candidates]
        found = torch.stack([torch.stack([_measured(pair, own, base) for base in baselines.values()]) for own in kept])
    kinds, sizes, circuits = (list(column) for column in zip(*candidates, strict=True))
    about: dict[str, Any] = {"kinds": kinds, "k": sizes, "circuits": circuits, "baselines": list(baselines)}
    return CircuitFaithfulness(**about, level=level, logit_difference=found, seed=int(seed), **ends, **pair.header)


def _candidates(
    pair: Pair, chosen: Circuit | list[Path], k: int | Sequence[int] | None, level: Level, random: int, seed: int
) -> list[tuple[str, int, Circuit]]:
    """The circuits to measure, of the first k of some edges or paths and controls: kind, k and circuit."""
    whole = isinstance(chosen, Circuit)
    known, draw = len(chosen.edges if whole else chosen), chance.Random(seed)
    sizes = [known] if k is None else [k] if isinstance(k, int) else list(k)
    for size in sizes:
        check_integers(1, k=size)
        if size > known:
            raise ValueError(f"k must be at most the number of {'edges' if whole else 'paths'}, {known}; got {size}.")
    found, scores = [("nothing", 0, Circuit([], []))], edge_scores(pair)
    for size in sizes:
        circuit = chosen.top(size) if whole else Circuit.of_paths(chosen[:size])
        found.append(("circuit" if whole else "paths", size, circuit))
        found.append(("attribution", size, attributed(pair, scores, circuit, level)))
        for _ in range(random):
            like = (
                random_edges(pair, circuit, draw) if whole else random_paths(pair, chosen[:size], circuit, level, draw)
            )
            found.append(("random", size, like))
    return found


def ordered_paths(paths: Any, targets: TargetInput | None) -> list[Path]:
    """Paths, those of a result by the size of their effect."""
    if isinstance(paths, Contrast):
        paths.to_circuit()  # which refuses parts that are not paths
        return [Path.parse(label) for label in paths.labels]
    if isinstance(paths, PathCache):
        paths = paths.statistics(targets=targets)
    if isinstance(paths, PathStatistics):
        return [path for path, _ in ranked(paths)]
    return [Path.parse(str(path)) for path in ([paths] if isinstance(paths, str | Path) else paths)]


def _baselines(pair: Pair, reference: Any) -> dict[str, Writes]:
    """What replaces the writes outside a circuit."""
    own, network = writes_of(pair.clean), pair.network
    stays = {*network.sources, *(step.label for step in network.steps if step.kind == "attn_bias")}
    found = {
        "corrupted": writes_of(pair.corrupted),
        "zero": {label: write if label in stays else torch.zeros_like(write) for label, write in own.items()},
    }
    if reference is not None:
        means = mean_of(trace_of(network, reference), pair.clean)
        found["mean"] = {label: write if label in stays else means[label] for label, write in own.items()}
    return found


def _kept(pair: Pair, circuit: Circuit, level: Level) -> Kept:
    """The writers that every reader gets from the clean run, and where."""
    readers, valid = readers_of(pair.clean), pair.clean.valid
    places: dict[tuple[str, str], Tensor] = {}
    for (writer, reader, _), position in zip(circuit.edges, circuit.positions, strict=True):
        edge = writer_of(writer, readers[DECODER_STEP]), node_of(reader)
        if edge[0] not in readers.get(edge[1], ()):
            raise ValueError(
                f"An edge leads from a source or step to a later step or to {DECODER_STEP}; got {writer} -> {reader}. At "
                f"granularity {pair.network.granularity!r} the writers are {some(readers[DECODER_STEP])}."
            )
        edge = (edge[0], "") if level == "node" else edge
        places[edge] = places.get(edge, torch.zeros_like(valid)) | _at(pair, position)
    if level == "edge":
        found: Kept = {}
        for (writer, reader), where in places.items():
            found.setdefault(reader, {})[writer] = where
        return found
    return {r: {w: where for (w, _), where in places.items() if w in before} for r, before in readers.items()}


def _at(pair: Pair, position: int | None) -> Bool[Tensor, "batch pos"]:
    """Where an edge is."""
    valid = pair.clean.valid
    if position is None:
        return torch.ones_like(valid)
    rows = Rows.of(pair.clean, position)
    return torch.zeros_like(valid).scatter(1, rows.index, rows.keep)


def _measured(pair: Pair, kept: Kept, base: Writes) -> Float[Tensor, " batch"]:
    """The logit difference of a run in which readers get the kept writers' own writes, and the baseline of all others."""
    before = readers_of(pair.clean)
    needed = {DECODER_STEP}.union(*kept.values())
    sums: dict[int, Tensor] = {}
    known: dict[Any, Tensor] = {}

    def streams(reader: str, live: Mapping[str, Tensor]) -> Tensor | None:
        if reader not in needed:
            return None
        size, own = len(before[reader]), kept.get(reader, {})
        key = (size, *((writer, id(where)) for writer, where in own.items()))
        if key not in known:
            if size not in sums:
                sums[size] = torch.stack([base[writer] for writer in before[reader]]).sum(0)
            stream = sums[size]
            for writer, where in own.items():
                stream = stream + torch.where(where[..., None], live[writer] - base[writer], 0.0)
            known[key] = stream
        return known[key]

    return pair.difference(run(pair.clean, streams)[DECODER_STEP])
