"""`PathCache`: the paths of an input, evaluated, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.attribution import LogitAttribution
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP
from tl_jets.core.selection import TargetInput
from tl_jets.jets.accuracy import Check
from tl_jets.jets.cache import JetCache
from tl_jets.paths.circuit import Circuit
from tl_jets.paths.missed import patterns, sum_of_squares
from tl_jets.paths.statistics import By, PathStatistics, statistics_of


@dataclass(frozen=True, eq=False, repr=False)
class PathCache(JetCache):
    """The evaluated paths of one input: a `JetCache` by path. Paths and `remainder` sum to the model.

    Attributes:
        expansion: The evaluated expansion. It lists the paths of `labels`, or more if only the largest were kept.
        weights: Multiple of b_U in each path: 1 / N for jets; detached, 1 for `ln_final_bias` and 0 for all others.
        remainders: By stream, |stream - sum of all evaluated prefixes| / |stream| over all real tokens. `ln_final` is
            that of the kept paths at `positions`; a beam search and a slice of the prompts give `ln_final` only.
        is_exhaustive: Whether all paths of the expansion were evaluated; False after a beam search.
        lost: After a beam search, the dropped prefix with the largest sum of completions (or own size), and this size, in the
            unit of `rank`. A missing path that is larger begins with a dropped prefix, and cancels with others that do (see
            `tl_jets.paths.evaluation` for lengths).
    """

    remainders: dict[str, float] = field(default_factory=dict)
    is_exhaustive: bool = True
    lost: tuple[str, float] | None = None

    def __repr__(self) -> str:
        chosen = "" if self.is_exhaustive else ", by beam search"
        chosen += f", which dropped {self.lost[0]} ... ({self.lost[1]:.3g} in sum)" if self.lost else ""
        return (
            f"PathCache({len(self):,} {self.kind} paths of {list(self.truth.shape)}{chosen}; relative remainder "
            f"{self.relative_remainder:.3g})"
        )

    @property
    def paths(self) -> list[Path]:
        """The paths, aligned to `labels`."""
        return [Path.parse(label) for label in self.labels]

    @property
    def remainder(self) -> Float[Tensor, "*cells d_model"]:
        """What the unembedding reads, less all paths; it also carries the rest of b_U."""
        return self.truth - sum(self.terms.values(), torch.zeros_like(self.truth))

    def remainder_logits(self) -> Float[Tensor, "*cells d_vocab"]:
        """The model's additive logits less those of all paths."""
        return self.traced("Logits").decoder.logits(self.remainder, 1 - self.weights.sum(0))

    def logits(self, path: str | Path | None = None) -> Float[Tensor, "*cells d_vocab"]:
        """Additive logits (before a final softcap) of one path, or of the sum of all."""
        if path is None:
            return self.traced("Logits").decoder.logits(self.truth - self.remainder, self.weights.sum(0))
        return super().logits(path)

    def statistics(self, *, by: By = "path", targets: TargetInput | None = None) -> PathStatistics:
        """Norm, cosine, share and effect of each path, or of sums of paths, relative to the model's logits.

        Args:
            by: `"path"`; `"length"`, sums by number of writes; `"component"`, for each step the sum of the paths
                through it; `"source"`, sums by where paths start.
            targets: Ids or strings of one token, one list of them a prompt, or ids [batch, out_pos, target]; None for
                the model's own best token.

        Returns:
            A `PathStatistics`. Sums by length or source add up to all paths; those by component overlap.

        Raises:
            ValueError: A slice dropped the batch or position dimension, or left only padding.
        """
        check_choice("by", by, get_args(By))
        trace, rows = self.traced("Statistics"), self.rows("Statistics")
        groups = _groups(self.paths, by)
        states, weights = self.stack(), self.weights[:, rows.keep][:, 0]
        if by != "path":
            states = torch.stack([states[index].sum(0) for index in groups.values()])
            weights = torch.stack([weights[index].sum() for index in groups.values()])
        attribution = LogitAttribution.at(trace, rows, self.truth[self.valid], targets)
        counts = [len(index) for index in groups.values()]
        lengths = [path.length for path in self.paths] if by == "path" else None
        return statistics_of(
            trace, attribution, self.tokens, list(groups), states, weights, by=by, counts=counts, lengths=lengths
        )

    def missed(self, *, sweeps: int = 64, seed: int = 0) -> float:
        """The root of the sum of squared effects, on the expansion's target, of all paths that the cache lacks.

        No such path has a larger absolute effect. It is exact, and so a bound, if the steps have at most `sweeps` patterns of
        signs; else it comes of an unbiased estimate of the sum (`tl_jets.paths.missed`), which scatters by tens of percent.

        Args:
            sweeps: Patterns of signs, a backward sweep each.
            seed: Seed of the patterns.

        Raises:
            ValueError: Jets, several prompts, positions or targets, or filters by length or `through`.
        """
        check_integers(1, sweeps=sweeps)
        found, targets = self.expansion, self.expansion.targets
        rows = self.rows("A bound")
        simple = found.linearize == "detached" and not found.graph.through and found.graph.max_length is None
        effects = self.statistics(targets=targets).effects
        if not simple or effects[0].numel() != 1:
            raise ValueError(
                "A bound on missed paths is for detached paths without through= and max_length=, of one prompt, position and "
                f"target; got {found!r} at {effects[0].numel()} of them."
            )
        pairs = zip(self.paths, effects, strict=True)
        known = sum(float(value) ** 2 for path, value in pairs if path.source != DECODER_STEP + BIAS)
        signs, count = patterns(sum(map(len, found.graph.stages)), sweeps, seed)
        total = sum_of_squares(self.traced("A bound"), found.graph, rows, targets, signs, count)
        return max(0.0, total - known) ** 0.5

    def to_circuit(
        self, k: int | None = None, *, targets: TargetInput | None = None, by_position: bool = False
    ) -> Circuit:
        """The edges of the k paths with the largest effects, as a `Circuit`.

        Args:
            k: Number of paths; None for all.
            targets: Whose effect; of two targets, the first less the second; None for the model's own best token.
            by_position: Whether edges after a path's last attention are at the position that is read, not at all.

        Raises:
            ValueError: by_position with paths read at several positions.
        """
        return self.statistics(targets=targets).to_circuit(k, by_position=by_position)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path and real position, in the order of `labels`: see `PathStatistics.to_dataframe`."""
        return self.statistics().to_dataframe()

    def check(self) -> Check:
        """Compare the sum of all paths with the model's logits (detached), or with the plain jets (reorganized).

        Raises:
            ValueError: Paths are missing, are plain jets (whose sum is not the model), or a slice left only padding.
        """
        return super().check()

    def _at(self, change: Callable[[Tensor, int], Tensor], **where: Any) -> PathCache:
        found = cast(PathCache, super()._at(change, **where))
        known = self.remainders if found.prompts == self.prompts else {}
        return replace(found, remainders=known | {DECODER_STEP: found.relative_remainder})


def _groups(paths: list[Path], by: By) -> dict[str, list[int]]:
    """Indices of the paths in each sum, by label."""
    found: dict[str, list[int]] = {}
    if by == "length":
        found = {str(n): [] for n in range(max(path.length for path in paths) + 1)}
    for index, path in enumerate(paths):
        labels_of = {
            "path": [str(path)],
            "length": [str(path.length)],
            "source": [path.source],
            "component": path.steps[: path.length],
        }
        for label in labels_of[by]:
            found.setdefault(label, []).append(index)
    return found
