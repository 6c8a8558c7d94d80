"""The exact best tokens of every row of states, with exact log-normalizers, in bounded memory.

Logits of a few hundred rows are held (`tl_jets.core.logit_reader`); the best k + `SPARE` tokens are found by block
maxima and scored again in float64. Rows whose last kept token cannot be told from the next one in working precision are
computed in float64 as a whole. Order: (score, id).

Cost: a product with `W_U`, and k + 8 gathered columns a row: 1.1 times the product for k = 5, 1.5 times for k = 100.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder, exact_logits
from tl_jets.core.logit_reader import Reader, check_finite, log_parts, rank, rounded, slices, total_of
from tl_jets.core.processes import ALONE, Processes
from tl_jets.ngrams.scan import EXACT_ROWS, BestPairs
from tl_jets.ngrams.scoring import Scoring

# Candidates beyond the k best, since float32 may misorder them.
SPARE = 8
# Numbers gathered from W_U in float64 at a time.
GATHERED = 2**21


class RowReader:
    """Computes the best `k` tokens of each row. Arguments as in `tl_jets.ngrams.scan.TopScan`."""

    def __init__(
        self,
        decoder: Decoder,
        k: int,
        *,
        scoring: Scoring | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.decoder, self.scoring = decoder, scoring or Scoring()
        self.reader = Reader(decoder, dtype, torch.device(device))
        self.allowed = self.scoring.allowed(decoder.d_vocab, torch.device(device))
        self.n_allowed = int(self.allowed.sum())
        self.k = min(k, self.n_allowed)
        self.buffer = self.reader.buffer(0)
        offsets = self.scoring.offsets
        # Of each token, in float64; zero where it may not be chosen.
        self.offsets = None if offsets is None else offsets.where(self.allowed, 0.0)

    @torch.no_grad()
    def read(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> BestPairs:
        """The best tokens of each row, in row order; ids and errors as in `TopScan.add`."""
        if len(self.buffer) < len(states):
            self.buffer = self.reader.buffer(len(states))
        logits = self.buffer[: len(states)]
        inside = logits[:, : self.decoder.d_vocab]
        self.decoder.project(states, inside)
        inside += self.decoder.constant(None, self.reader.dtype)
        top, total = self._log_normalizer(logits)
        check_finite(top, ids)
        means = self._means(inside)
        if self.offsets is not None:
            inside.copy_(self.decoder.transformed(inside)).add_(self.offsets.to(inside))
        if self.n_allowed < self.decoder.d_vocab:
            inside[:, ~self.allowed] = self.reader.lowest
        if self.scoring.exclude_self:
            own = (ids < self.decoder.d_vocab).nonzero()[:, 0]
            inside[own, ids[own]] = self.reader.lowest
        count = min(self.k + SPARE, self.n_allowed)
        rough, tokens = self.reader.top(self.reader.floor(logits), count)
        tokens, order = tokens.sort(1)  # by ids, so that stable sorts order ties by id
        rough = rough.gather(1, order)
        keys, scores, log_normalizer = self._scores(rough, self._gathered(states, tokens), tokens, top, total, means)
        others = self.scoring.kept(ids.unsqueeze(1).expand_as(tokens), tokens)
        keys, scores = keys.where(others, -math.inf), scores.where(others, -math.inf)
        best = _sorted(keys, self.k)
        unsure = self._unsure(states, rough, keys.gather(1, best), count)
        tokens, scores = tokens.gather(1, best), scores.gather(1, best)
        for part in slices(len(unsure), EXACT_ROWS):
            rows = unsure[part]
            if len(rows):
                tokens[rows], scores[rows], log_normalizer[rows] = self._whole_rows(states[rows], ids[rows])
        pairs = torch.stack([ids.unsqueeze(1).expand_as(tokens), tokens], dim=-1)
        found = (pairs.flatten(0, 1), scores.flatten(), log_normalizer.repeat_interleave(self.k))
        return BestPairs(*(x[found[1] > -math.inf] for x in found))

    def _means(self, inside: Tensor) -> Tensor | None:
        """The mean logit of each row, for centered logits."""
        if self.scoring.score != "centered":
            return None
        return torch.stack([self.decoder.transformed(row).mean(dtype=torch.float64) for row in inside])

    def _log_normalizer(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest transformed logit, and the sum of exp(logit - largest) in float64, of each row."""
        reader = self.reader
        top = self.decoder.transformed(logits[:, : self.decoder.d_vocab].amax(1))
        total = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
        if self.scoring.normalizes:
            for part in slices(len(logits), reader.scratch_rows):
                chunk = reader.rows(part.stop - part.start).copy_(logits[part])
                shift = reader.shift(reader.floor(chunk), top[part])
                total[part] = total_of(chunk.exp2_()) * torch.exp2(shift - top[part].double() * reader.log2_e)
        return top, total

    def _gathered(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Additive logits of some tokens a row in float64, whatever their position."""
        W_U, constant = self.decoder.W_U.T, self.decoder.constant(None, torch.float64)
        exact = torch.empty(tokens.shape, dtype=torch.float64, device=states.device)
        for part in slices(len(tokens), max(1, GATHERED // (tokens.shape[1] * states.shape[1]))):
            columns = W_U[tokens[part]].double()
            exact[part] = columns.mul_(states[part].double().unsqueeze(1)).sum(-1)
        return self.decoder.scaled(exact) + constant[tokens]

    def _scores(
        self, rough: Tensor, exact: Tensor, tokens: Tensor, top: Tensor, total: Tensor, means: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What candidates are ordered by, their scores, and log-normalizers, with the candidates' terms in float64."""
        mine, largest = self.decoder.transformed(exact), top.double()
        offsets = 0.0 if self.offsets is None else self.offsets[tokens]
        keys = exact if self.offsets is None else mine + offsets
        if not self.scoring.normalizes:
            shift = 0.0 if means is None else means.unsqueeze(1)
            return keys, mine - shift + offsets, torch.full_like(largest, torch.nan)
        theirs = (self.decoder.transformed(rough) if self.offsets is None else rough).double() - offsets
        shift = mine.amax(1, keepdim=True).maximum(largest.unsqueeze(1))
        # Candidates that were lowered below all others, for they may not be chosen, are not of the sum.
        theirs = theirs.where(rough > self.reader.lowest / 2, -math.inf)
        weights = (mine - shift).exp().where(rough > self.reader.lowest / 2, 0.0)
        others = total * (largest - shift[:, 0]).exp() - (theirs - shift).exp().sum(1)  # of all but the candidates
        others = others.clamp_min(0)
        log_normalizer = shift[:, 0] + (others + weights.sum(1)).log()
        # If a candidate is the row's largest, leave it out of the sum: log-probabilities near 0 keep their digits.
        best = mine.argmax(1, keepdim=True)
        peak = mine.gather(1, best)
        rest = (others + weights.scatter(1, best, 0.0).sum(1)).unsqueeze(1)
        precise = (mine - peak) - rest.log1p()
        is_largest = (peak >= shift) & (weights.gather(1, best) > 0)
        return keys, torch.where(is_largest, precise, mine - log_normalizer.unsqueeze(1)) + offsets, log_normalizer

    def _unsure(self, states: Tensor, rough: Tensor, best: Tensor, count: int) -> Tensor:
        """Rows in which a token outside the candidates may be among the best k."""
        if count == self.n_allowed:
            return torch.empty(0, dtype=torch.long, device=states.device)
        rounding = 8 * torch.finfo(rough.dtype).eps * self.scoring.largest_offset
        limit = rough.amin(1).double() + self.reader.errors(states).double() + rounding
        return (best[:, -1] <= limit).nonzero()[:, 0]

    def _whole_rows(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, scores and log-normalizers of rows computed in float64 as a whole."""
        logits = exact_logits(self.decoder, states)
        top, rest = log_parts(logits)
        allowed = self.allowed.nonzero()[:, 0]
        scores = self.scoring.scores(logits, top, rest)[:, allowed]
        tokens = allowed.expand(len(ids), -1)
        scores = scores.where(self.scoring.kept(ids.unsqueeze(1).expand_as(tokens), tokens), -math.inf)
        best = _sorted(scores, self.k)
        return tokens.gather(1, best), scores.gather(1, best), top + rest


class RowScan:
    """Collects the best tokens of each added row; scans of one decoder may share a reader."""

    def __init__(self, reader: RowReader):
        self.reader = reader
        self.found: list[BestPairs] = []

    def add(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> None:
        """Read some rows; see `TopScan.add`."""
        self.found.append(self.reader.read(states, ids))

    def finish(self, processes: Processes = ALONE) -> BestPairs:
        """All rows' best tokens, best first; the work is not divided."""
        del processes
        found = _joined(self.found)
        order = rank(found.ids, found.scores)
        return BestPairs(*(x[order] for x in found))

    def state(self) -> dict[str, Tensor]:
        """Results so far, for `restore`."""
        return _joined(self.found)._asdict() if self.found else {}

    def restore(self, *states: dict[str, Tensor]) -> None:
        """Continue from the state of one or several scans."""
        device = self.reader.reader.device
        self.found = [BestPairs(**{name: x.to(device) for name, x in state.items()}) for state in states if state]


def _joined(found: list[BestPairs]) -> BestPairs:
    return BestPairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _sorted(values: Float[Tensor, "row token"], k: int) -> Int[Tensor, "row best"]:
    """Positions of the k largest values of each row; values equal up to rounding keep their order."""
    return rounded(values).sort(dim=1, descending=True, stable=True).indices[:, :k]
