r"""A frozen sublayer as a product of matrices, for many vectors: cheaper than its graph, and at some positions only.

.. math::
    u_i \mapsto u_i\, A\, \text{diag}(g_i)\, B \quad \text{(MLP)}, \qquad
    u_i \mapsto \sum_j \sum_h P^h_{ij}\, u_j\, A^h B^h \quad \text{(attention)}.

Vectors stand side by side, [pos, d_model, many], at a range of positions outside of which they are zero (`Span`): what causal
attention maps to zero is not computed. For n vectors an MLP costs 2 n d_model d_mlp multiply-adds a position, as one matrix
d_model^2 d_mlp + n d_model^2: the cheaper is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

# Number of elements of an MLP's weights, times its slopes, at once.
CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True, eq=False)
class Span:
    """Vectors at the positions from `start` on; zero at all others."""

    start: int
    vectors: Float[Tensor, "pos d_model many"]

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + len(self.vectors)

    def at(self, position: int) -> Float[Tensor, "d_model many"]:
        """The vectors at one position."""
        is_inside = self.start <= position < self.stop
        return self.vectors[position - self.start] if is_inside else torch.zeros_like(self.vectors[0])

    def over(self, start: int, stop: int) -> Span:
        """The same vectors over a longer range of positions."""
        if (start, stop) == (self.start, self.stop):
            return self
        longer = self.vectors.new_zeros(stop - start, *self.vectors.shape[1:])
        longer[self.start - start : self.stop - start] = self.vectors
        return Span(start, longer)

    def plus(self, others: Sequence[Span]) -> Span:
        """The sum, over the range of all; in place, where that is this one's range."""
        found = self.over(min(x.start for x in (self, *others)), max(x.stop for x in (self, *others)))
        for other in others:
            found.vectors[other.start - found.start : other.stop - found.start] += other.vectors
        return found


@dataclass(frozen=True, eq=False)
class Factors:
    """A linear map between positions as first, middle and last factor.

    Attributes:
        first: From a vector to what is mixed or scaled (values of all heads; neurons before their slopes).
        middle: Slopes of neurons [pos, inner], or patterns by group of heads that share values, as a matrix from (position, head of
            the group that is read) to (position, head of the group that is written).
        last: From there to the write.
    """

    first: Float[Tensor, "d_model inner"]
    middle: Float[Tensor, "pos inner"] | Float[Tensor, "group out_pos out_head in_pos in_head"]
    last: Float[Tensor, "inner_out d_model"]

    @property
    def is_local(self) -> bool:
        """Whether it moves nothing between positions."""
        return self.middle.ndim == 2

    @property
    def transposed(self) -> Factors:
        """The transpose: from covectors of the write to covectors of the stream."""
        middle = self.middle if self.is_local else self.middle.permute(0, 3, 4, 1, 2)
        return Factors(self.last.mT, middle, self.first.mT)

    def apply(self, spans: Sequence[Span]) -> list[Span]:
        """The products with several spans of vectors."""
        if not self.is_local:
            return [self._mixed(span) for span in spans]
        start, stop = min(span.start for span in spans), max(span.stop for span in spans)
        (d_model, inner), many = self.first.shape, sum(span.vectors.shape[-1] for span in spans)
        if many * (2 * inner - d_model) <= d_model * inner:
            slopes = self.middle[..., None]
            return [
                Span(x.start, self.last.mT @ (slopes[x.start : x.stop] * (self.first.mT @ x.vectors))) for x in spans
            ]
        matrices = self._matrices(start, stop)
        return [Span(x.start, matrices[x.start - start : x.stop - start] @ x.vectors) for x in spans]

    def _matrices(self, start: int, stop: int) -> Float[Tensor, "pos d_model_out d_model_in"]:
        """Of an MLP, the transposed matrix at each position."""
        step = max(1, CHUNK_ELEMENTS // self.first.numel())
        found = self.first.new_empty(stop - start, self.last.shape[1], len(self.first))
        for slopes, part in zip(self.middle[start:stop].split(step), found.split(step), strict=True):
            scaled = self.last.mT * slopes[:, None]
            torch.bmm(scaled, self.first.mT.expand(len(slopes), -1, -1), out=part)
        return found

    def _mixed(self, span: Span) -> Span:
        """Values at the span's positions, mixed between positions, through the last matrix."""
        groups, length, written, _, read = self.middle.shape
        forward, backward = self._reach
        start, stop = span.start if forward else 0, span.stop if backward else length
        many = span.vectors.shape[-1]
        values = self.first.mT @ span.vectors
        values = values.unflatten(1, (groups, read, -1)).transpose(0, 1).flatten(1, 2).flatten(2)
        pattern = self.middle[:, start:stop, :, span.start : span.stop].flatten(3).flatten(1, 2)
        mixed = (pattern @ values).unflatten(1, (stop - start, written)).transpose(0, 1)
        return Span(start, self.last.mT @ mixed.reshape(stop - start, len(self.last), many))

    @cached_property
    def _reach(self) -> tuple[bool, bool]:
        """Whether nothing reaches positions before its own, and nothing reaches positions after."""
        moves = (self.middle != 0).any(4).any(2).any(0)  # [out_pos, in_pos]
        forward, backward = torch.stack([~moves.triu(1).any(), ~moves.tril(-1).any()]).tolist()
        return forward, backward
