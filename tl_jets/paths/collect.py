"""Collect finished paths: all of them, or the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_jets.core.attribution import Rank, Yardstick
from tl_jets.core.path import Path
from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.selection import Rows
from tl_jets.paths.evaluation import Prefixes, Stages, starts
from tl_jets.paths.graph import Lattice


@dataclass
class Best:
    """The largest paths by `rank`, largest first, with their states [path, batch, out_pos, d_model] and sizes."""

    yardstick: Yardstick
    rank: Rank
    limit: int
    paths: list[Path]
    states: Tensor
    bias_weights: Tensor
    sizes: Tensor

    @classmethod
    def none(cls, yardstick: Yardstick, rank: Rank, limit: int, like: Tensor) -> Best:
        """An empty collection; `like` is a state [batch, out_pos, d_model]."""
        empty = like.new_zeros(0)
        return cls(yardstick, rank, limit, [], like.new_zeros(0, *like.shape), empty, empty.double())

    def add(self, paths: list[Path], states: Tensor, bias_weights: Tensor) -> None:
        """Add paths and keep the largest; ties keep the earlier path."""
        sizes = self.yardstick.sizes(self.yardstick.augmented(states, bias_weights), self.rank)
        every, sizes = [*self.paths, *paths], torch.cat([self.sizes, sizes])
        order = sizes.argsort(descending=True, stable=True)[: self.limit]
        self.paths = [every[i] for i in order.tolist()]
        self.states = torch.cat([self.states, states])[order]
        self.bias_weights = torch.cat([self.bias_weights, bias_weights])[order]
        self.sizes = sizes[order]


class Collector:
    """Collects finished paths, all (`found`: state [batch, out_pos, d_model], multiple of b_U) or the `best`."""

    def __init__(
        self, lattice: Lattice, split: Callable[[Path], list[Path]], rows: Rows, stages: Stages, best: Best | None
    ):
        self.lattice, self.split, self.rows, self.stages, self.best = lattice, split, rows, stages, best
        self.found: dict[str, tuple[Tensor, float]] = {}

    def add(self, prefixes: Prefixes, values: Tensor) -> None:
        """Decode and collect finished paths."""
        for degree, (states, weight) in enumerate(self.stages.terms(values, self.rows.positions)):
            paths = [self.split(prefix.path.then(DECODER_STEP))[degree] for prefix in prefixes]
            self._take(paths, states, weight)

    def add_constant(self) -> None:
        """Collect the decoder's own constant, if it is one of the paths."""
        prefixes, values = starts(self.lattice, self.stages, len(self.lattice.stages) + 1)
        if prefixes:
            self._take([prefix.path for prefix in prefixes], torch.stack(values)[:, :, self.rows.positions], 1.0)

    def _take(self, paths: list[Path], states: Tensor, weight: float) -> None:
        if self.best is not None:
            self.best.add(paths, states, states.new_full((len(states),), weight))
        else:
            self.found |= {str(path): (state, weight) for path, state in zip(paths, states, strict=True)}

    def terms(self, paths: Iterable[Path]) -> tuple[dict[str, Tensor], list[float] | Tensor]:
        """The collected states and multiples of b_U, in the order of `paths`, or by size if a `best` was kept."""
        if self.best is not None:
            named = zip(self.best.paths, self.best.states, strict=True)
            return {str(path): state for path, state in named}, self.best.bias_weights
        found = {str(path): self.found[str(path)] for path in paths}
        return {label: state for label, (state, _) in found.items()}, [weight for _, weight in found.values()]
