"""The exact join of a head's skip-trigrams; `tl_jets.ngrams.trigrams` describes the algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import LOG2_E, rank
from tl_jets.core.processes import ALONE, Processes
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.low_rank_logits import (
    EXACT_ROWS,
    TILE_ROWS,
    LowRankLogits,
    best_log_prob,
    log_softmax_at,
    normalizers,
)

Normalize = Literal["vocab", "pair", "none"]
NORMALIZES: tuple[Normalize, ...] = ("vocab", "pair", "none")

# Keys per round at first and at most; keys whose bounds are tightened at a time.
FIRST_ROUND, LAST_ROUND, REFINED_ROWS = 512, 1024, 256
# Maximum number of triples kept when many scores nearly tie.
LARGEST = 2**20


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """Query-key scores and decoded writes of a head on the whole vocabulary, and how A follows from scores."""

    scores: LowRankLogits  # rows are queries, columns keys
    outputs: LowRankLogits  # rows are keys, columns output tokens
    own: Float[Tensor, " token"]  # score of each token with itself, minus the ALiBi bias
    normalize: Normalize

    def attention(self, difference: Tensor) -> Tensor:
        """A from scores minus their normalizers, in nats."""
        return -torch.nn.functional.softplus(-difference) if self.normalize == "pair" else difference

    def exact(self, ids: Int[Tensor, "triple 3"]) -> tuple[Float[Tensor, " triple"], Float[Tensor, " triple"]]:
        """A and log P of triples in float64, with exact normalizers."""
        key, query, output = ids.unbind(1)
        log_prob = log_softmax_at(self.outputs, key, output)
        if self.normalize == "vocab":
            return log_softmax_at(self.scores, query, key), log_prob
        raw = self.scores.at(query, key)
        return self.attention(raw if self.normalize == "none" else raw - self.own[query].double()), log_prob


class Search:
    """Search for the exact best triples of a head."""

    def __init__(self, maps: HeadMaps, top_k: int, advance: Callable[[int], Any], processes: Processes = ALONE):
        self.maps, self.top_k, self.advance, self.processes = maps, top_k, advance, processes
        self.by_key = LowRankLogits(maps.scores.columns.T, maps.scores.rows.T, transform=maps.scores.transform)
        transform = maps.outputs.transform
        slope = 1.0 if transform is None else max(1.0, abs(float(transform(torch.ones(1, device="cpu")))))
        self.slack = maps.scores.rounding() + slope * maps.outputs.rounding()

    @full_float32()
    def run(self, keys: Int[Tensor, " key"]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [triple, 3], A and log P of the best triples (and a few more) of `keys`; ValueError if too many tie."""
        self.normalizer, best_attention = self._bounds()
        bound = best_attention[keys]
        order = bound.argsort(descending=True, stable=True)
        # Keep a few more triples, since their normalizers are rounded until scored exactly.
        size = self.top_k + max(16, self.top_k // 8)
        while True:
            self._collect(keys[order], bound[order], size)
            self.advance = lambda count: None  # a bar counts keys once
            ids = self.found.ids
            parts = self.processes.map(self.maps.exact, ids.chunk(self.processes.size))
            attention, log_prob = (torch.cat(x).to(ids.device) for x in zip(*parts, strict=True))
            if self._is_certain(attention + log_prob):
                return ids, attention, log_prob
            size *= 2
            if size > max(LARGEST, 2 * self.top_k):
                raise ValueError(
                    f"The best {self.top_k} triples must be told from the others; more than {size // 2} have the same score "
                    f"up to rounding ({self.maps.scores.rows.dtype}). Ask for a smaller top_k, or use a float64 model."
                )

    def _is_certain(self, exact: Float[Tensor, " triple"]) -> bool:
        """Whether no discarded triple is among the best, if its error is at most four times the largest seen."""
        kept = self.found.scores
        if len(kept) < self.found.size:
            return True
        last = exact.topk(self.top_k).values[-1]
        return bool(last >= kept[-1] + 4 * (exact - kept).abs().max())

    def _collect(self, keys: Int[Tensor, " key"], bound: Float[Tensor, " key"], size: int) -> None:
        """Find the best triples of keys sorted by decreasing bound of A, divided among the processes."""
        own = slice(self.processes.rank, None, self.processes.size)
        parts = self.processes.exchange(partial(self._collect_own, keys[own], bound[own], size))
        self.found = _Best(size)
        for ids, scores in parts:
            self.found.add(ids.to(keys.device), scores.to(keys.device))

    def _collect_own(self, keys: Tensor, bound: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Ids and scores of the best triples of some keys."""
        self.found = _Best(size)
        self.buffers = self.by_key.exact_buffer(), self.maps.outputs.exact_buffer()
        self.output_normalizer = torch.full_like(self.normalizer, math.nan)  # of keys that may be joined
        start, size = 0, FIRST_ROUND
        while start < len(keys) and bool(bound[start] + self.slack >= self.found.threshold):
            part = slice(start, min(start + size, len(keys)))
            total = bound[part] + self._best_outputs(keys[part], bound[part])
            for batch in total.argsort(descending=True).split(REFINED_ROWS):
                self._consider(keys[part][batch], total[batch], bound[part][batch])
            self.advance(part.stop - start)
            start, size = part.stop, min(2 * size, LAST_ROUND)
        self.advance(len(keys) - start)
        return self.found.ids, self.found.scores

    def _bounds(self) -> tuple[Float[Tensor, " query"], Float[Tensor, " key"]]:
        """Normalizer of each query's scores, and an upper bound of each key's best A; nats, float64."""
        parts = zip(*self.processes.exchange(self._own_bounds), strict=True)
        normalizer, best = (torch.stack(x).amax(0).to(self.maps.own.device) for x in parts)
        return normalizer, self.maps.attention(best)

    def _own_bounds(self) -> tuple[Float[Tensor, " query"], Float[Tensor, " key"]]:
        """This process's normalizers (bounds for other queries), and each key's best score minus them."""
        maps, scores = self.maps, self.maps.scores
        vocab, n_keys = maps.normalize == "vocab", scores.columns.shape[1]
        normalizer = torch.zeros_like(maps.own) if maps.normalize == "none" else maps.own.clone()
        if vocab:
            normalizer.fill_(-math.inf)
        best = scores.rows.new_full((n_keys,), -math.inf)
        first, step = TILE_ROWS * self.processes.rank, TILE_ROWS * self.processes.size
        for start in range(first, len(scores.rows), step):
            part = slice(start, start + TILE_ROWS)
            rows, block = scores.rows[part], torch.empty_like(best)

            def maxima(columns: slice, tile: Tensor, block: Tensor = block) -> None:
                block[columns] = tile.amax(0)

            if vocab:
                expected, short = normalizers(scores, rows, maxima)
                normalizer[part] = (expected + short)[:, 0].double() / LOG2_E
                block -= short.min()
            else:
                for tile in scores.tiles(rows, (normalizer[part, None] * LOG2_E).to(rows.dtype)):
                    maxima(*tile)
            torch.maximum(best, block, out=best)
            self.advance(len(rows))
        return normalizer, best.double() / LOG2_E

    def _best_outputs(self, keys: Int[Tensor, " key"], bound: Float[Tensor, " key"]) -> Float[Tensor, " key"]:
        """The best log P of each key, in nats; 0, an upper bound, for keys that cannot reach the threshold."""
        outputs, found = self.maps.outputs, []
        for start in range(0, len(keys), TILE_ROWS):
            part = keys[start : start + TILE_ROWS]
            rows, reach = outputs.rows[part], bound[start : start + TILE_ROWS] + self.slack
            best = torch.zeros_like(reach)
            live = (reach >= self.found.threshold).nonzero()[:, 0]
            if len(live):
                best[live], self.output_normalizer[part[live]] = best_log_prob(outputs, rows[live])
            found.append(best)
        return torch.cat(found)

    def _consider(self, keys: Tensor, total: Float[Tensor, " key"], bound: Float[Tensor, " key"]) -> None:
        """Tighten the bounds of A, then join the keys whose best A plus best log P reaches the threshold."""
        live = total + self.slack >= self.found.threshold
        if not bool(live.any()):
            return
        keys = keys[live]
        total = total[live] - bound[live] + self._best_attention(keys)
        for batch in total.argsort(descending=True).split(EXACT_ROWS):
            live = batch[total[batch] + self.slack >= self.found.threshold]
            if not len(live):
                return
            self._join(keys[live])

    def _best_attention(self, keys: Int[Tensor, " key"]) -> Float[Tensor, " key"]:
        """The best A of each key over all queries, in nats."""
        rows, best = self.by_key.rows[keys], []
        shift = (self.normalizer * LOG2_E).to(rows.dtype)
        for part, tile in self.by_key.tiles(rows):
            best.append(tile.sub_(shift[part]).amax(1))
        return self.maps.attention(torch.stack(best).amax(0).double() / LOG2_E)

    def _join(self, keys: Int[Tensor, " key"]) -> None:
        """Add the triples of some keys that may be among the best."""
        attention = self.maps.attention(self.by_key.exact(keys, self.buffers[0]).sub_(self.normalizer))
        log_prob = self.maps.outputs.exact(keys, self.buffers[1]).sub_(self.output_normalizer[keys, None])
        if self.found.threshold == -math.inf:
            self._raise_threshold(attention, log_prob)
        row, query, output, score = _pairs(attention, log_prob, self.found.threshold, self.found.size)
        self.found.add(torch.stack([keys[row], query, output], dim=1), score)

    def _raise_threshold(self, attention: Tensor, log_prob: Tensor) -> None:
        """Raise the threshold from each row's few best queries and outputs, so that few pairs remain."""
        side = math.isqrt(self.found.size - 1) + 1
        a = attention.topk(min(side, attention.shape[1])).values
        p = log_prob.topk(min(side, log_prob.shape[1])).values
        sums = (a.unsqueeze(2) + p.unsqueeze(1)).flatten()
        if len(sums) >= self.found.size:
            self.found.raise_to(float(sums.topk(self.found.size).values[-1]))


class _Best:
    """The best triples so far, and the score that others must reach."""

    def __init__(self, size: int):
        self.size, self.threshold = size, -math.inf
        self.ids: Tensor = torch.empty(0, 3, dtype=torch.long, device="cpu")
        self.scores: Tensor = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, ids: Tensor, scores: Tensor) -> None:
        """Add triples, and keep the best by (score, ids)."""
        ids, scores = torch.cat([self.ids.to(ids.device), ids]), torch.cat([self.scores.to(ids.device), scores])
        order = rank(ids, scores)[: self.size]
        self.ids, self.scores = ids[order], scores[order]
        if len(order) == self.size:
            self.raise_to(float(self.scores[-1]))

    def raise_to(self, score: float) -> None:
        """Raise the threshold to a score that enough triples reach, minus the tolerance for ties."""
        self.threshold = max(self.threshold, score - 1e-9 * (1 + abs(score)))


def _pairs(attention: Tensor, log_prob: Tensor, threshold: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, query, output and score of pairs that reach the threshold, with ranks i j <= k in their row."""
    lowest = threshold - 1e-9
    queries, query, a = _leading(attention, lowest - log_prob.amax(1, keepdim=True), k)
    outputs, output, p = _leading(log_prob, lowest - attention.amax(1, keepdim=True), k)
    rank = torch.arange(1, a.shape[1] + 1, device=a.device)
    reach = torch.searchsorted(-p, a - lowest, right=True)  # how many outputs suffice for a query
    count = reach.minimum(outputs).minimum(k // rank).masked_fill(rank > queries, 0)
    row, i = count.nonzero().repeat_interleave(count[count > 0], dim=0).unbind(1)
    j = torch.arange(len(i), device=a.device) - (count.flatten().cumsum(0).view_as(count) - count)[row, i]
    return row, query[row, i], output[row, j], a[row, i] + p[row, j]


def best_sums(first: Float[Tensor, " one"], second: Float[Tensor, " two"], k: int) -> tuple[Tensor, Tensor]:
    """Positions of the k best pairs by the sum of their two values, and of others, in no order; ties by positions.

    Example:
        >>> i, j = best_sums(torch.tensor([0.0, 3.0]), torch.tensor([2.0, 0.0, 1.0]), 2)
        >>> sorted(zip(i.tolist(), j.tolist()))
        [(0, 0), (1, 0), (1, 2)]
    """
    _, i, j, _ = _pairs(first[None].double(), second[None].double(), -math.inf, k)
    return i, j


def _leading(values: Tensor, lowest: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number [row, 1], positions and values [row, most] of at most k values a row from `lowest` up, best first.

    Ties (within 2^-36) are ordered by position; rows are padded with zeros and -inf.
    """
    row, position = (values >= lowest).nonzero().unbind(1)
    order = (values[row, position] * 2**36).round().sort(descending=True, stable=True).indices
    order = order[row[order].sort(stable=True).indices]
    row, position = row[order], position[order]
    count = row.bincount(minlength=len(values))
    rank = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    count = count.clamp(max=k)
    shape = len(values), int(count.max())
    positions, found = row.new_zeros(shape), values.new_full(shape, -math.inf)
    row, position, rank = (x[rank < k] for x in (row, position, rank))
    positions[row, rank], found[row, rank] = position, values[row, position]
    return count.unsqueeze(1), positions, found
