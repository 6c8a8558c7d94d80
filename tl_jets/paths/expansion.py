"""Algorithm 2 and its exact variant: a model as a sum over all paths from input to output.

A network of L stages with one write each has 2^L paths from every source, each named by the writes that it passes
through. There are two forms:

- ``linearize="jet"``, the paper's: each stage is expanded at all prefixes with uniform weights, and leaves a remainder.
  *Read before use*: a jet of order k >= 1 carries the model's own stream into every path, so most paths decode to the
  model's own answer, whatever they pass through.
- ``linearize="detached"``, exact: norm scales, attention patterns and gates are frozen at this input. Each stage is
  affine, and by eq. 5 paths from the embeddings and the biases sum to the model's logits.

On stories260K (10 sublayers, 1,024 paths, float64; 99 positions of four prompts, `demos/jet_or_detached_paths.py`):

===================================  ==========  ===========================================
form                                 remainder   paths that decode to the model's own answer
===================================  ==========  ===========================================
jets, order 0                        1.0         1%
jets, order 1                        38          92%
jets, order 1, norm-matched centers  0.14        53%
detached                             1.5e-15     1%
===================================  ==========  ===========================================

Source: Chen et al., *Jet Expansions of Residual Computation*, Algorithm 2, eq. 5; Golden, arXiv 2505.24293.

Example:
    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(2, 4, 4, dtype=torch.float64)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4, dtype=torch.float64),
    ...     stages=[{"0_mlp": lambda x: torch.relu(x @ W[0])}, {"1_mlp": lambda x: torch.relu(x @ W[1])}],
    ...     decoder=Decoder(Norm("RMS"), torch.randn(4, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)),
    ... )
    >>> expansion = exponential_expansion(model, linearize="detached", sources="embed")
    >>> print(expansion)
    4 detached paths of callables, 2 stages
      embed > ln_final
      embed > 0_mlp > ln_final
      embed > 1_mlp > ln_final
      embed > 0_mlp > 1_mlp > ln_final
    >>> paths = expansion(torch.tensor([[0, 3, 1]]))
    >>> paths.relative_remainder < 1e-14
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args

import torch
from torch import Tensor

from tl_jets.calculus import CENTER_SCALES, CenterScale
from tl_jets.core.attribution import LogitAttribution, Rank
from tl_jets.core.divergence import warn_of
from tl_jets.core.frozen_network import FrozenNetwork, Linearize, chunk_size, read_order
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.trace import Trace
from tl_jets.jets.accuracy import Check
from tl_jets.jets.cache import JetCache
from tl_jets.paths.cache import PathCache
from tl_jets.paths.evaluation import (
    Collector,
    JetStages,
    absent_constants,
    evaluate,
    search,
    stage_weights,
    with_constants,
    with_edits,
)
from tl_jets.paths.graph import PathGraph, count_text, narrowed, path_graph

MAX_PATHS = 4096
SHOWN = 10


def exponential_expansion(
    model: Any,
    order: int | None = None,
    *,
    linearize: Linearize = "jet",
    through: str | Iterable[str] | None = None,
    avoiding: str | Iterable[str] | None = None,
    sources: str | Iterable[str] | None = None,
    max_length: int | None = None,
    top: int | None = None,
    rank: Rank = "length",
    targets: TargetInput | None = None,
    center_scale: CenterScale = "none",
    renormalize: bool = False,
    split_degrees: bool = False,
    max_paths: int = MAX_PATHS,
) -> PathExpansion:
    """All paths of a model from input to output (Algorithm 2, or exact detached paths), not yet evaluated.

    Filters take labels of steps and sources (`"3_mlp"`, `"L3H2"`, `"embed"`, `"3_mlp_bias"`), kinds (`"attn"`, `"mlp"`,
    `"head"`, `"block"`, `"bias"`), or sequences of them. They select from the full expansion and change no path.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (whose granularity says what a write is).
        order: k >= 0 of the jets, None is 1; detached paths have none.
        linearize: `"jet"`, the paper's, or `"detached"`, exact.
        through: Keep paths that pass through each of these (for a kind: through any step of it).
        avoiding: Keep paths that pass through none of these: `"attn"` gives the n-gram paths.
        sources: Keep paths that start here; None for embeddings, hook edits and, detached, the biases that the model has.
        max_length: Keep paths with at most this many writes.
        top: Keep only the largest paths, largest first; the others are the remainder. Exact if the filters leave at
            most `max_paths`; otherwise (detached only) a greedy beam search, see `tl_jets.paths.evaluation`.
        rank: Size for `top`: `"length"` of the logits centered over the vocabulary, or `"effect"` on the targets.
        targets: Tokens for `rank="effect"`; None for the model's own best token.
        center_scale: Rescale the centers of jets: `"none"` (the paper's), `"match"` or `"orthogonal"`.
        renormalize: Spread the weights of jets over the paths that are kept.
        split_degrees: Split each path's jet of the final norm by degree: `> ln_final[0]` (its own part), `> ln_final[1]`, ...
        max_paths: Refuse to evaluate more.

    Returns:
        A `PathExpansion`: iterate over it for the paths; call it on a prompt, tokens or a trace to get a `PathCache`.

    Raises:
        ValueError: A bad option or one without effect, an unknown name in a filter, or filters that leave no path.
        TypeError: A bad order.

    Source: Chen et al., Algorithm 2.
    """
    network, order = ResidualNetwork.of(model), read_order(linearize, order, 1)
    filters: dict[str, Any] = {"through": through, "avoiding": avoiding, "sources": sources}
    filters = {key: names if isinstance(names, str | None) else tuple(names) for key, names in filters.items()}
    filters["max_length"] = max_length
    is_detached = linearize == "detached"
    absent = absent_constants(network) if is_detached else ()
    whole = path_graph(network.stages, network.sources, detached=is_detached, absent=absent)
    graph = narrowed(whole, network.stages, **filters)
    jets = center_scale, renormalize, split_degrees
    found = PathExpansion(network, linearize, order, whole, graph, filters, top, rank, targets, *jets, max_paths)
    found.check_options()
    return found


@dataclass(frozen=True, eq=False, repr=False)
class PathExpansion:
    """The paths of a model that the filters keep, not yet evaluated: iterable, short ones first, lazily.

    Fields are the options of `exponential_expansion`, `whole` (all paths) and `graph` (those kept).
    """

    network: ResidualNetwork
    linearize: Linearize
    order: int
    whole: PathGraph
    graph: PathGraph
    filters: Mapping[str, Any]
    top: int | None = None
    rank: Rank = "length"
    targets: Any = None
    center_scale: CenterScale = "none"
    renormalize: bool = False
    split_degrees: bool = False
    max_paths: int = MAX_PATHS

    def check_options(self) -> None:
        """Raise for options that are bad or without effect, and for filters that leave no path."""
        check_choice("rank", self.rank, get_args(Rank))
        check_integers(1, top=1 if self.top is None else self.top, max_paths=self.max_paths)
        check_choice("center_scale", self.center_scale, CENTER_SCALES)
        of_jets = self.order or self.renormalize or self.split_degrees or self.center_scale != "none"
        if self.linearize == "detached" and of_jets:
            raise ValueError(
                "order, renormalize, split_degrees and center_scale are options of jets; detached paths have no weights, degrees, "
                "centers or order. Leave them out, or use linearize='jet'."
            )
        if self.top is None and self.rank == "effect":
            raise ValueError(
                "rank says which paths top= keeps; got rank='effect' without top. Pass top=, or leave rank out."
            )
        if self.rank == "length" and self.targets is not None:
            raise ValueError(
                f"targets are what rank='effect' with top= reads; got {self.targets!r} without it. Leave them out, or give "
                f"them to statistics(targets=...) of what is evaluated."
            )
        if not self.count and not any("edit:" in str(value) for value in self.filters.values()):
            raise ValueError(
                f"Filters must leave a path; {_shown(self.filters)} leave none of {count_text(self.whole.count)}. Relax them."
            )

    # Read by JetCache for an expansion of the decoder
    stage = None
    steps = (DECODER_STEP,)

    @property
    def degrees(self) -> int:
        """Number of terms of each path."""
        return self.order + 1 if self.split_degrees else 1

    @property
    def count(self) -> int:
        """Number of paths before `top`, an exact integer; from biases that the model has, though they may cancel."""
        return self.degrees * self.graph.count

    @property
    def count_by_length(self) -> tuple[int, ...]:
        """Number of paths with 0, 1, 2, ... writes."""
        return tuple(self.degrees * n for n in self.graph.count_by_length)

    @property
    def kind(self) -> str:
        """`detached`, or `order-1 jet`."""
        return self.linearize if self.linearize == "detached" else f"order-{self.order} jet"

    @property
    def is_complete(self) -> bool:
        """Whether every path of the network is kept."""
        return self.top is None and self.graph.count == self.whole.count

    def __iter__(self) -> Iterator[Path]:
        for path in self.graph:
            yield from self.split(path)

    def __contains__(self, path: object) -> bool:
        wanted = Path.parse(str(path))
        if not self.split_degrees:
            return wanted in self.graph
        whole = Path(wanted.source, (*wanted.steps[:-1], DECODER_STEP))
        return whole in self.graph and wanted in self.split(whole)

    def split(self, path: Path) -> list[Path]:
        """The terms of a path: the path itself, or one term per degree."""
        if not self.split_degrees:
            return [path]
        steps = path.steps[:-1]
        return [Path(path.source, (*steps, f"{DECODER_STEP}[{degree}]")) for degree in range(self.degrees)]

    def check(self, cache: JetCache) -> Check:
        """The largest relative difference between the logits of all detached paths and the model's."""
        trace, valid = cache.trace, cache.valid
        if self.linearize != "detached" or not self.is_complete or trace.logits is None:
            raise ValueError(
                "check compares the sum of all detached paths with the model's logits; these are jets, or not all of them, "
                "or of a trace without logits. Look at `remainders`, or at relative_remainder."
            )
        found = trace.decoder.transformed(cache.logits())
        own = cache.here(trace.logits).to(found)
        return Check(float((found - own)[valid].abs().max() / own[valid].abs().max()), {}, 1)

    def __repr__(self) -> str:
        graph = self.graph
        parts = {source.label: graph.starting_at([source.label]) for source in graph.sources if not source.is_bias}
        texts = [f"{count_text(self.degrees * part.count)} from {label}" for label, part in parts.items()]
        biases = [source.label for source in graph.sources if source.is_bias]
        if biases:
            texts.append(f"{count_text(graph.starting_at(biases).count)} from {len(biases)} biases")
        chosen = "" if self.top is None else f"; the {self.top} largest by {self.rank}"
        return (
            f"PathExpansion({self.network.view.name}, {len(self.network.stages)} stages: {count_text(self.count)} {self.kind} "
            f"paths, {', '.join(texts)}{chosen}{'; ' + _shown(self.filters) if _shown(self.filters) else ''})"
        )

    def __str__(self) -> str:
        head = (
            f"{count_text(self.count)} {self.kind} paths of {self.network.view.name}, {len(self.network.stages)} stages"
        )
        lines = [head, *(f"  {path}" for path in islice(self, SHOWN))]
        return "\n".join(lines + ([f"  ... {count_text(self.count - SHOWN)} more"] if self.count > SHOWN else []))

    def __call__(
        self,
        text_or_tokens: Any,
        *,
        positions: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> PathCache:
        """Evaluate on one input.

        Args:
            text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace` (which keeps the result).
            positions: Positions to read; None for all. Memory is proportional to their number.
            attention_mask: Passed to the model (left padding needs it).
            cache: A ready `ActivationCache` of the same input.

        Returns:
            A `PathCache`. Detached paths from constants that are zero are omitted.

        Raises:
            ValueError: More than `max_paths` paths; bad positions or input.
            NotImplementedError: Detached paths of a model that cannot be frozen.

        Cost: each prefix once: for 2^L paths, 2^L applications of a frozen stage, in batches, or 2^L jets.
        """
        self._check_count()
        with torch.inference_mode(False):
            trace = trace_of(self.network, text_or_tokens, attention_mask, cache)
            if isinstance(text_or_tokens, Trace) and text_or_tokens.network is self.network:
                return self._remembered(text_or_tokens, positions)
            # A trace without the frozen network, whose graph is as large as the activations.
            return replace(self._remembered(trace, positions), trace=Trace(self.network, trace.recording))

    def _remembered(self, trace: Trace, positions: int | Sequence[int] | None) -> PathCache:
        """Evaluate on a trace of the same network, or return the trace's earlier result."""
        rows = Rows.of(trace, positions)
        known, key = trace.evaluated.setdefault(self, {}), tuple(map(tuple, rows.index.tolist()))
        if key not in known:
            whole = with_edits(self.whole, trace)
            if self.linearize == "detached":
                whole = with_constants(whole, FrozenNetwork.of(trace))
            edited = replace(self, whole=whole, graph=narrowed(whole, self.network.stages, **self.filters))
            known[key] = edited._evaluate(trace, rows)
        return known[key]

    @torch.no_grad()
    def _evaluate(self, trace: Trace, rows: Rows) -> PathCache:
        self._check_count()
        stages = FrozenNetwork.of(trace) if self.linearize == "detached" else self._jets(trace)
        live = replace(self, whole=self.whole.starting_at(stages.sources), graph=self.graph.starting_at(stages.sources))
        if not live.count:
            raise ValueError(
                f"Filters must leave a path that is not zero at this input; {_shown(self.filters)} leave only zero constants. "
                f"Relax them."
            )
        # Without the constants that are zero, there may be few enough to evaluate all.
        beam = live._check_count()
        attribution = None if self.top is None else LogitAttribution.of(trace, rows, self.targets)
        collector = Collector(live.graph, live.split, rows, stages, attribution, self.rank, self.top)
        sums: dict[int, Tensor] = {}
        lost = None
        if beam:
            assert attribution is not None
            assert isinstance(stages, FrozenNetwork)
            width = max(2 * (self.top or 1), self.max_paths // max(1, len(self.network.stages)))
            lost = search(live.graph, stages, attribution, self.rank, width, collector.add)
        else:
            sums = evaluate(live.graph, stages, chunk_size(trace[FINAL_STREAM]), collector.add)
        collector.add_constant()
        terms, weights = collector.terms(live)
        truth = trace.decoder.norm(rows.at(trace[FINAL_STREAM]))
        found = PathCache.of(
            live,
            trace,
            terms,
            weights=truth.new_tensor(weights)[:, None, None].expand(-1, *truth.shape[:2]),
            truth=truth,
            columns=rows.cells,
            is_exhaustive=not beam,
            lost=lost,
        )
        remainders = {}
        for place in sorted(set(sums) - {0}):
            stream = trace[trace.network.streams[place]][trace.valid]
            remainders[trace.network.streams[place]] = float((stream - sums[place][trace.valid]).norm() / stream.norm())
        remainders[DECODER_STEP] = found.relative_remainder
        if self.linearize == "jet" and self.graph.count == self.whole.count:
            of_all = {name: x for name, x in remainders.items() if self.top is None or name != DECODER_STEP}
            place, worst = max(of_all.items(), key=lambda item: item[1], default=("", 0.0))
            warn_of(f"all stages (at {place})", self.order, worst, self.center_scale)
        return replace(found, remainders=remainders)

    def _jets(self, trace: Trace) -> JetStages:
        counted = self.graph if self.renormalize else self.whole
        weights = stage_weights(counted, order=self.order, renormalize=self.renormalize)
        return JetStages(trace, self.order, self.center_scale, weights, self.split_degrees)

    def _check_count(self) -> bool:
        """Whether there are too many paths, but a beam search can be used; raises if it cannot."""
        if self.count <= self.max_paths:
            return False
        if self.top is not None and self.linearize == "detached":
            return True
        lengths = ", ".join(f"{count_text(n)} of {i}" for i, n in enumerate(self.count_by_length[:5]))
        raise ValueError(
            f"At most max_paths = {self.max_paths:,} paths are evaluated; here are {count_text(self.count)} (by number of "
            f"writes: {lengths}, ...). Narrow them with max_length=, through=, avoiding= ('attn' leaves the n-gram paths) or "
            f"sources=; take a coarser granularity; detached, ask for top=; or raise max_paths. For sums over all paths "
            f"there are tl_jets.path_lengths and tl_jets.path_sums."
        )


def _shown(filters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in filters.items() if value is not None)
