"""Taking finished paths, all of them or the largest, and making a `PathCache` of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP, FINAL_STREAM
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.paths.cache import PathCache
from tl_jets.paths.evaluation import Prefixes, Stages, starts
from tl_jets.paths.measures import Rank, Yardstick

if TYPE_CHECKING:
    from tl_jets.paths.expansion import PathExpansion


@dataclass
class Best:
    """The largest paths seen so far.

    Attributes:
        yardstick: What sizes are.
        rank: `"length"` or `"effect"`.
        limit: How many to keep.
        paths: Their names, largest first.
        states: What the unembedding reads of them [path, batch, out_pos, d_model].
        bias_weights: Their multiples of b_U [path].
        sizes: Theirs [path].
    """

    yardstick: Yardstick
    rank: Rank
    limit: int
    paths: list[Path]
    states: Tensor
    bias_weights: Tensor
    sizes: Tensor

    @classmethod
    def none(cls, yardstick: Yardstick, rank: Rank, limit: int, like: Tensor) -> Best:
        """No path yet; `like` is a state [batch, out_pos, d_model]."""
        empty = like.new_zeros(0)
        return cls(yardstick, rank, limit, [], like.new_zeros(0, *like.shape), empty, empty.double())

    def add(self, paths: list[Path], states: Tensor, bias_weights: Tensor) -> None:
        """Keep those of some paths that are among the largest; of equals, those that came first."""
        sizes = self.yardstick.sizes(self.yardstick.augmented(states, bias_weights), self.rank)
        every, sizes = [*self.paths, *paths], torch.cat([self.sizes, sizes])
        order = sizes.argsort(descending=True, stable=True)[: self.limit]
        self.paths = [every[i] for i in order.tolist()]
        self.states = torch.cat([self.states, states])[order]
        self.bias_weights = torch.cat([self.bias_weights, bias_weights])[order]
        self.sizes = sizes[order]


class Collector:
    """Takes finished paths, all of them or the largest, and makes a `PathCache` of them."""

    def __init__(self, expansion: PathExpansion, trace: Trace, rows: Rows, stages: Stages):
        self.expansion, self.trace, self.rows, self.stages = expansion, trace, rows, stages
        self.found: dict[str, tuple[Tensor, float]] = {}
        self.best: Best | None = None
        self.truth = trace.network.decoder.norm(trace[FINAL_STREAM][:, rows.positions])
        if expansion.top is not None:
            yardstick = Yardstick.of(trace, rows, expansion.targets)
            self.best = Best.none(yardstick, expansion.rank, expansion.top, self.truth)

    def add(self, prefixes: Prefixes, values: Tensor) -> None:
        """Decode finished paths and take them."""
        for degree, (states, weight) in enumerate(self.stages.terms(values, self.rows.positions)):
            paths = [self.expansion.split(prefix.path.then(DECODER_STEP))[degree] for prefix in prefixes]
            self._take(paths, states, weight)

    def add_constant(self) -> None:
        """Take what the decoder itself adds, where it is a path."""
        lattice = self.expansion.lattice
        prefixes, values = starts(lattice, self.stages, len(lattice.stages) + 1)
        if prefixes:
            self._take([prefix.path for prefix in prefixes], torch.stack(values)[:, :, self.rows.positions], 1.0)

    def _take(self, paths: list[Path], states: Tensor, weight: float) -> None:
        if self.best is not None:
            self.best.add(paths, states, states.new_full((len(states),), weight))
        else:
            self.found |= {str(path): (state, weight) for path, state in zip(paths, states, strict=True)}

    def cache(self, sums: dict[int, Tensor], *, is_exhaustive: bool) -> PathCache:
        """What was taken, in the order of the expansion or of size."""
        if self.best is None:
            terms = {str(path): self.found[str(path)][0] for path in self.expansion}
            weights = self.truth.new_tensor([self.found[label][1] for label in terms])
        else:
            terms = {str(path): state for path, state in zip(self.best.paths, self.best.states, strict=True)}
            weights = self.best.bias_weights
        cells = self.truth.shape[:2]
        found = PathCache(
            expansion=self.expansion,
            trace=self.trace,
            terms=terms,
            weights=weights[:, None, None].expand(-1, *cells),
            truth=self.truth,
            positions=self.rows.positions,
            is_exhaustive=is_exhaustive,
        )
        valid, streams = self.trace.valid, self.trace.network.streams
        remainders = {}
        for place in sorted(set(sums) - {0}):
            stream = self.trace[streams[place]][valid]
            remainders[streams[place]] = float((stream - sums[place][valid]).norm() / stream.norm())
        return replace(found, remainders=remainders | {DECODER_STEP: found.relative_remainder})
