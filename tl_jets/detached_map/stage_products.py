r"""What a frozen stage does to many vectors: by the factors of its sublayers where these are known, else by its graph.

Factors (`tl_jets.core.factors`) are compared with the graph before their first use with a stage, its weights and hooks, and each
time if hooks are on its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange

from tl_jets.core.factors import Factors, Span
from tl_jets.core.frozen_network import chunk_size, freeze_stacked, rounding
from tl_jets.core.linear_map import GraphMap
from tl_jets.core.protocol import Stage
from tl_jets.core.trace import Trace


@dataclass(frozen=True, eq=False)
class StageProducts:
    """A frozen stage of one prompt; `factors` by step, or None."""

    trace: Trace
    stage: Stage
    factors: list[Factors] | None

    @classmethod
    def of(cls, trace: Trace, stage: Stage) -> StageProducts:
        """The products of a stage, by factors if they are those of its graph."""
        trace.stage_function(stage)  # checks the replay
        found = cls(trace, stage, trace.network.view.factors(trace.recording, stage, trace[stage.stream]))
        state = trace.recording.hook_state
        key, checks = ("factors", stage, state), trace.network.checks
        if found.factors is None or (key in checks and not state[stage.steps[0].layer + 1][0]):
            return found
        if not found._error() <= rounding(trace[stage.stream].dtype):
            return cls(trace, stage, None)
        checks.add(key)
        return found

    @cached_property
    def _graph(self) -> GraphMap:
        """The writes side by side."""
        return freeze_stacked(self.trace.stage_function(self.stage), self.trace[self.stage.stream])[0]

    def _error(self) -> float:
        """The largest relative error of the factors at a position, for a random vector at each."""
        point, generator = self._graph.point, torch.Generator().manual_seed(0)
        probe = Span(0, torch.randn(*point.shape[1:], 1, generator=generator, device="cpu").to(point))
        (wanted,), (found,) = self._by_graph([probe]), self.writes([probe])
        errors = [(x.vectors - y.vectors).norm(dim=1) for x, y in zip(found, wanted, strict=True)]
        sizes = [(y.vectors.norm(dim=1) + y.vectors.norm()) for y in wanted]
        return float((torch.stack(errors) / torch.stack(sizes).clamp_min(torch.finfo(point.dtype).tiny)).max())

    def writes(self, spans: Sequence[Span]) -> list[list[Span]]:
        """The writes of every step, by span."""
        if self.factors is None:
            return self._by_graph(spans)
        by_step = [factors.apply(spans) for factors in self.factors]
        return [list(writes) for writes in zip(*by_step, strict=True)]

    def _by_graph(self, spans: Sequence[Span]) -> list[list[Span]]:
        length, width = self._graph.point.shape[1:]
        found = []
        for span in spans:
            each = rearrange(span.over(0, length).vectors, "pos d_model many -> many 1 pos d_model")
            written = self._graph.apply_rows(each, chunk_size=chunk_size(self._graph.point))
            written = rearrange(written, "many 1 pos (write d_model) -> write pos d_model many", d_model=width)
            found.append([Span(0, vectors) for vectors in written])
        return found

    def pulled_back(self, spans: Sequence[Span]) -> list[Span]:
        """Covectors of the next stream as covectors of this one, by factors."""
        by_step = [factors.transposed.apply(spans) for factors in self.factors or ()]
        return [span.plus(parts) for span, *parts in zip(spans, *by_step, strict=True)]
