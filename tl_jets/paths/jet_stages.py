r"""The stages of Algorithm 2: every stage expanded at all prefixes of paths, with uniform weights.

With N_s prefixes before stage s, a prefix x goes on as

.. math::
    x \text{ past the stage} \;(k \ge 1), \quad \tfrac{1}{N_s} x \;(k = 0), \qquad
    \tfrac{1}{N_s} J^k \gamma_s(x)(h_s) \text{ through a step,}

with h_s the true stream: a path depends only on its own prefix and h_s. N_s counts all prefixes of the full expansion,
so filters keep its weights. `renormalize=True` counts the kept prefixes that carry weight: all of them at order 0,
those that take a step of the stage at higher orders.

Source: Chen et al., *Jet Expansions of Residual Computation*, Algorithm 2. Cost: a jet of the stage, about k + 1
evaluations, for each prefix that takes one of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import CenterScale, Norm, jet, norm_jet
from tl_jets.calculus import center_scale as center_scale_factors
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace
from tl_jets.paths.graph import PathGraph


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

    @cached_property
    def norm(self) -> Norm:
        """The final norm."""
        return self.trace.decoder.norm

    def kept(self, index: int, values: Tensor) -> Tensor:
        """The identity terms of prefixes that skip a stage."""
        return values if self.order else self.weights[index] * values

    def writes(self, index: int, values: Float[Tensor, "path batch pos d_model"]) -> Tensor:
        """The weighted jets of a stage's steps at every prefix [write, path, batch, pos, d_model]."""
        stage = self.trace.network.stages[index]
        gammas, variate = self.trace.stage_function(stage), self.trace[stage.stream]
        centers = self._scaled(values, variate)
        return self.weights[index] * torch.stack([jet(gammas, x, variate, self.order).value for x in centers], 1)

    def terms(
        self, values: Float[Tensor, "path batch pos d_model"], rows: Rows
    ) -> list[tuple[Float[Tensor, "path batch out_pos d_model"], float]]:
        """Weighted jets of the final norm at every path, whole or by degree, with their multiples of b_U."""
        values, variate = rows.at(values, 1), rows.at(self.trace[FINAL_STREAM])
        weight = self.weights[-1]
        series = norm_jet(self.norm, self._scaled(values, variate), variate.expand_as(values), self.order)
        if not self.split_degrees:
            return [(weight * series.value(), weight)]
        return [(weight * c, 0.0 if degree else weight) for degree, c in enumerate(series.coefficients())]

    def _scaled(self, values: Tensor, variate: Tensor) -> Tensor:
        if self.center_scale == "none":
            return values
        return values * center_scale_factors(self.norm, values, variate.expand_as(values), self.center_scale)[..., None]


def stage_weights(graph: PathGraph, *, order: int, renormalize: bool) -> tuple[float, ...]:
    """1 / N_s by stage and for the decoder: of all paths, or of the kept ones."""
    counts = [moving if renormalize and order else n for n, moving in graph.prefixes()]
    return tuple(1 / max(1, n) for n in counts)
