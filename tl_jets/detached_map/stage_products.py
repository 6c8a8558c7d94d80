r"""All maps of one prompt from one input at once: many vectors through the frozen stages, read at every output on the way.

With X the vectors at every position, a frozen stage takes :math:`X \to X + \sum_i A_i X`, and :math:`A_i X` at the output position
is the map to its write i. An MLP reads one position at a time, so that A is a matrix for each position; it is computed once for
all vectors, and compared with the product of the whole stage before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.frozen_network import chunk_size, freeze_stacked, rounding
from tl_jets.core.linear_map import GraphMap
from tl_jets.core.protocol import Stage
from tl_jets.core.trace import Trace
from tl_jets.detached_map.composed_jacobian import ComposedJacobian

# Kinds of steps that read one position at a time.
POSITIONWISE = {"mlp", "mlp_bias", "mlp_rest", "neuron"}


@dataclass(frozen=True, eq=False)
class StageProducts:
    """What a frozen stage writes for many vectors; `matrices` are its Jacobians by position, if it reads one at a time."""

    graph: GraphMap
    matrices: Float[Tensor, "pos d_model writes"] | None

    @classmethod
    def of(cls, trace: Trace, stage: Stage, many: int) -> StageProducts:
        """The products of a stage of one prompt, for that many vectors."""
        graph, _ = freeze_stacked(trace.stage_function(stage), trace[stage.stream])
        d_model = graph.point.shape[-1]
        is_local = many > d_model and all(step.kind in POSITIONWISE for step in stage.steps)
        return cls(graph, _by_position(graph) if is_local else None)

    def writes(self, vectors: Float[Tensor, "pos many d_model"]) -> Float[Tensor, "pos many writes"]:
        """The writes of a stage side by side."""
        return _through(self.graph, vectors) if self.matrices is None else vectors @ self.matrices


def read_on_the_way(
    composed: ComposedJacobian, vectors: Float[Tensor, "pos many d_model"]
) -> Iterator[tuple[str, Float[Tensor, "many d_model"]]]:
    """J u of every output of a composed, by label, at its only output position."""
    network, outputs, (place,) = composed.trace.network, composed.outputs, composed.positions
    first = network.streams[composed.start]
    if first in outputs:
        yield first, vectors[place]
    for stage in composed.stages:
        written = StageProducts.of(composed.trace, stage, vectors.shape[1]).writes(vectors)
        parts = written.split(vectors.shape[-1], dim=-1)
        for step, part in zip(stage.steps, parts, strict=True):
            if step.write in outputs:
                yield step.write, part[place]
        following = network.next_stream(stage)
        vectors = sum(parts, vectors)
        if following in outputs:
            yield following, vectors[place]


def _by_position(graph: GraphMap) -> Tensor | None:
    """The Jacobian at every position, if the stage reads one position at a time."""
    _, length, d_model = graph.point.shape
    units = torch.eye(d_model, dtype=graph.point.dtype, device=graph.point.device)
    matrices = _through(graph, units.expand(length, -1, -1))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(length, 1, d_model, generator=generator, device="cpu").to(graph.point)
    wanted = _through(graph, probe)
    error = (probe @ matrices - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny)
    return matrices if float(error) <= rounding(wanted.dtype) else None


def _through(graph: GraphMap, vectors: Tensor) -> Tensor:
    """J u for vectors [pos, many, d_model] of one prompt."""
    each = rearrange(vectors, "pos many d_model -> many 1 pos d_model")
    return rearrange(
        graph.apply_rows(each, chunk_size=chunk_size(graph.point)), "many 1 pos d_model -> pos many d_model"
    )
