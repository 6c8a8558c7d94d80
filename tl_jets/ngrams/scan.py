r"""The exact best pairs (row, token) of many logit vectors, streamed: no [row, d_vocab] tensor is stored.

Pairs are scored as `tl_jets.ngrams.scoring` says. For each tile of the product with `W_U`, a scan keeps the maxima of blocks
of 128 tokens and sums exp2 for the log-normalizer over the whole vocabulary. An offset that suits earlier rows prevents
overflow; rows that it does not suit are read again, minus their maximum.

**Lemma.** `block maximum - log-normalizer` is the best score of a block. Let t be the K-th largest of these over all
blocks of all rows. The K best pairs lie in blocks whose best score is at least t, since K blocks hold a pair that good.

**Exactness.** A logit in working precision is off by at most eps_r (`Reader.errors`), a log-probability
with p = exp(s) by 2 (1 - p) eps_r plus the error of a sum. Probabilities near 1 (a token after itself, where embeddings
are tied) are read from their complement: R, the sum of exp(l - max) over all tokens but the largest, is added up
without it, so that nothing cancels, and is off by a factor exp(2 eps_r) at most; log p = -log1p(R). A block is kept if
its upper bound reaches the K-th largest lower bound. Kept blocks are scored again in float64 with log p = (l - max) -
log1p(R). Order: (score, ids).

Cost: rows * d_vocab * d_model multiply-adds plus 5%; float64 scoring adds (2 * rows of the result / rows) of a scan.
Memory: a tile, d_vocab / 128 block maxima a row, 128 rows of float64 logits, the states of kept rows.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.core.decoder import Decoder
    >>> decoder = Decoder(Norm("none"), torch.eye(3), torch.zeros(3))
    >>> scan = TopScan(decoder, 1, scoring=Scoring("logit"))
    >>> scan.add(torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 5.0]]), torch.tensor([7, 8]))
    >>> scan.finish().ids.tolist()
    [[8, 1]]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder, exact_logits
from tl_jets.core.logit_reader import BLOCK, LOG2_E, Reader, check_finite, log_parts, rank, slices
from tl_jets.core.processes import ALONE, Processes
from tl_jets.ngrams.scoring import Scoring

# Tokens of a tile; with 1024 rows, a tile fits the caches of two cores.
TILE_CPU, TILE_DEVICE = 2048, 16384
# Rows of float64 logits held in `finish`.
EXACT_ROWS = 128
# Range of log2(sum of 2^logit) within which sums neither overflow nor lose terms that matter.
LEAST_SUM, LARGEST_SUM = -60.0, 100.0
# Bound of the relative error of a sum of 2^exponent, in units of roundoff.
SUM_ERROR = 64
# Log-probabilities above log(SURE) are read from the sum of the others, which is added up without the largest term where
# it is this part of the terms so far; less, for the rounding of both.
SURE, DOMINANT = 0.9, 0.8


class BestPairs(NamedTuple):
    """Best pairs, ties by ids: log-probabilities (nats) or logits, and log sum exp of their rows; float64."""

    ids: Int[Tensor, "pair 2"]
    scores: Float[Tensor, " pair"]
    log_normalizers: Float[Tensor, " pair"]


class Sums(NamedTuple):
    """What scores of some rows are minus, log-normalizers or mean logits, in binary logarithms.

    `rest` (zeros for mean logits) is the sum of 2^(logit - largest) over all tokens but the largest, `lost` a bound of
    what underflowed of it.
    """

    shift: Float[Tensor, " row"]
    rest: Float[Tensor, " row"]
    lost: Float[Tensor, " row"]
    offset: float = 0.0  # was added to all logits

    def at(self, rows: Int[Tensor, " row"]) -> Sums:
        """The sums of some rows."""
        return Sums(self.shift[rows], self.rest[rows], self.lost[rows], self.offset)


class Tiles:
    """Logits by tiles, in binary logarithms, with block maxima, for one way to score."""

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        scoring: Scoring | None = None,
    ):
        self.decoder, self.dtype, self.device, self.scoring = decoder, dtype, device, scoring or Scoring()
        self.reader = Reader(decoder, dtype, device)
        # Where nothing is asked of the others, compute only the logits of the tokens to choose from.
        is_alone = self.scoring.score == "logit" and not self.scoring.exclude_self
        self.gathered = self.scoring.tokens if is_alone else None
        self.size = decoder.d_vocab if self.gathered is None else len(self.gathered)
        self.n_blocks = -(-self.size // BLOCK)
        self.width = TILE_CPU if device.type == "cpu" else TILE_DEVICE
        self.scratch = torch.empty(0, dtype=dtype, device=device)
        self.penalized = torch.empty(0, dtype=dtype, device=device)
        # A logit scale is applied to states and bias; a softcap to every tile.
        self.transform = decoder.transform
        self.scale = decoder.logit_scale * (LOG2_E if self.transform is None else 1.0)
        bias = decoder.b_U.to(dtype) if self.gathered is None else decoder.b_U[self.gathered].to(dtype)
        self.bias = bias * self.scale if bool(bias.any()) else None

    def scaled(self, states: Tensor) -> Tensor:
        """Scaled states, whose products with `W_U` are binary logarithms (natural ones before a softcap)."""
        return states.to(self.dtype) * self.scale

    def product(self, x: Tensor, tokens: slice, bias: Tensor | float | None, out: Tensor) -> None:
        """Write the logits of scaled states for some tokens to `out`, in working precision."""
        W_U = self.decoder.W_U[:, tokens if self.gathered is None else self.gathered[tokens]].to(self.dtype)
        if bias is None:
            torch.mm(x, W_U, out=out)
        else:
            torch.addmm(torch.as_tensor(bias, dtype=self.dtype, device=self.device), x, W_U, out=out)

    def errors(self, states: Float[Tensor, "row d_model"], offset: float = 0.0) -> Float[Tensor, " row"]:
        """Bound of the error of each row's binary logarithms, given the offset in them."""
        return self.reader.errors(states) * LOG2_E + 4 * torch.finfo(self.dtype).eps * abs(offset)

    def penalties(self, scoring: Scoring) -> Float[Tensor, " column"] | None:
        """What is added to logits before block maxima, in binary logarithms; None for nothing."""
        if not scoring.restricts or self.gathered is not None:
            return None
        return scoring.penalties(self.decoder.d_vocab, self.n_blocks * BLOCK, self.dtype, self.device) * LOG2_E

    def read(
        self,
        states: Float[Tensor, "row d_model"],
        maxima: Float[Tensor, "row block"],
        offset: float = math.nan,
        penalties: Float[Tensor, " column"] | None = None,
        own: Int[Tensor, " row"] | None = None,
    ) -> tuple[Sums | None, float]:
        """Read some rows and fill `maxima`, in binary logarithms, with the `offset` for the next rows from before, if any.

        Maxima are of logits plus `penalties`, without each row's `own` token. Returns what scores are minus (None for
        nothing), and the offset for the next rows (NaN if none suits all rows).
        """
        x = self.scaled(states)
        if not self.scoring.normalizes:
            found = self._sums(x, maxima, 0.0, penalties, own)
            return (found if self.scoring.score == "centered" else None), 0.0
        if math.isfinite(offset):
            found = self._sums(x, maxima, offset, penalties, own)
            if bool(((found.shift > LEAST_SUM) & (found.shift < LARGEST_SUM)).all()):
                return found, offset
        # The first rows of a sweep, or rows that the offset does not suit: subtract their maxima, and choose an offset.
        found = self._sums(x, maxima, None, penalties, own)
        least, largest = (float(y) for y in found.shift.aminmax())
        suitable = self.transform is None and largest - least < LARGEST_SUM - LEAST_SUM - 20
        return found, -(least + largest) / 2 if suitable else math.nan

    def _sums(
        self, x: Tensor, maxima: Tensor, offset: float | None, penalties: Tensor | None, own: Tensor | None
    ) -> Sums:
        """Sums of 2^(logit + offset), minus running maxima if it is None, or mean logits; fills `maxima`."""
        bias = self.bias if not offset else offset + (0 if self.bias is None else self.bias)
        top = torch.full((len(x),), 0.0 if offset is not None else -math.inf, dtype=self.dtype, device=self.device)
        # The largest term, and the sum of the others; `total` of the logits themselves.
        largest, rest, total = torch.zeros(3, len(x), dtype=torch.float64, device=self.device)
        for start in range(0, self.size, self.width):
            stop = min(start + self.width, self.size)
            logits = self._tile(x, slice(start, stop), bias)
            best = allowed = logits.view(len(x), -1, BLOCK).amax(-1)
            if penalties is not None:
                allowed = self._allowed(logits, penalties[start : start + logits.shape[1]], own, start)
            maxima[:, start // BLOCK : -(-stop // BLOCK)] = allowed
            if not self.scoring.normalizes:
                if self.scoring.score == "centered":
                    total += logits[:, : stop - start].sum(1, dtype=torch.float64)
                continue
            best = best.amax(1)
            if offset is None:
                higher = torch.maximum(top, best)
                factor = torch.exp2((top - higher).double())
                largest, rest, top = largest * factor, rest * factor, higher
                logits.sub_(top.unsqueeze(1))
            largest, rest = _added(logits.exp2_(), torch.exp2(best - top).double(), largest, rest)
        if not self.scoring.normalizes:
            mean = (total / self.size).to(self.dtype)
            return Sums(mean, torch.zeros_like(mean), torch.zeros_like(mean))
        lost = self.size * torch.finfo(self.dtype).tiny / largest
        log_normalizers = (largest + rest).log2() + top.double()
        shift, rest, lost = (values.to(self.dtype) for values in (log_normalizers, rest / largest, lost))
        return Sums(shift, rest, lost, offset or 0.0)

    def _allowed(self, logits: Tensor, penalties: Tensor, own: Tensor | None, start: int) -> Tensor:
        """Block maxima of logits plus penalties, without each row's own token."""
        if len(self.penalized) < logits.numel():
            self.penalized = torch.empty(logits.numel(), dtype=self.dtype, device=self.device)
        shown = torch.add(logits, penalties, out=self.penalized[: logits.numel()].view(logits.shape))
        if own is not None:
            rows = ((own >= start) & (own < start + logits.shape[1])).nonzero()[:, 0]
            shown[rows, own[rows] - start] = -math.inf
        return shown.view(len(logits), -1, BLOCK).amax(-1)

    def _tile(self, x: Tensor, tokens: slice, bias: Tensor | float | None) -> Tensor:
        """Binary logarithms [row, whole blocks] of some tokens, padded with -inf."""
        size = tokens.stop - tokens.start
        width = -(-size // BLOCK) * BLOCK
        if len(self.scratch) < len(x) * self.width:
            self.scratch = torch.empty(len(x) * self.width, dtype=self.dtype, device=self.device)
        padded = self.scratch[: len(x) * width].view(len(x), width)
        logits = padded[:, :size]
        self.product(x, tokens, bias[tokens] if isinstance(bias, Tensor) else bias, logits)
        if self.transform is not None:
            torch.mul(self.transform(logits), LOG2_E, out=logits)
        padded[:, size:] = -math.inf
        return padded


def _added(terms: Tensor, highest: Tensor, largest: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The largest term and the sum of the others, of those before and of `terms` [row, term], whose largest are `highest`."""
    total = terms.sum(1).double()
    others = (total - highest).clamp_min(0)
    # The difference cancels where one term is nearly all of the sum.
    dominated = (highest > DOMINANT * (total + largest + rest)).nonzero()[:, 0]
    if len(dominated):
        own = terms[dominated]
        others[dominated] = own.scatter_(1, own.argmax(1, keepdim=True), 0).sum(1).double()
    return largest.maximum(highest), rest + torch.where(highest > largest, largest + others, total)


class TopScan:
    """The best `k` pairs (row, token) over all added rows, in float32 or float64; log-probabilities by default."""

    def __init__(
        self,
        decoder: Decoder,
        k: int,
        *,
        scoring: Scoring | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tiles: Tiles | None = None,
    ):
        self.decoder, self.k, self.scoring = decoder, k, scoring or Scoring()
        self.tiles = tiles or Tiles(decoder, dtype, torch.device(device), self.scoring)
        self.dtype, self.device = self.tiles.dtype, self.tiles.device
        # The K-th best lower bound so far, in binary logarithms.
        self.threshold = -math.inf
        self.offset = math.nan
        self.penalties = self.tiles.penalties(self.scoring)
        self.rounding = 8 * torch.finfo(self.dtype).eps * LOG2_E * self.scoring.largest_offset
        self.sum_error = SUM_ERROR * torch.finfo(self.dtype).eps
        self.kept = _Kept.none(decoder.d_model, self.dtype, self.device)
        self.maxima = torch.empty(0, self.tiles.n_blocks, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def add(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> None:
        """Read some rows, named by distinct `ids` in the result; ValueError if a logit is not finite."""
        maxima = self.rows_of_maxima(len(states))
        own = ids if self.scoring.exclude_self else None
        sums, self.offset = self.tiles.read(states, maxima, self.offset, self.penalties, own)
        best = maxima.amax(1)
        check_finite(best if sums is None else best - sums.shift, ids)
        errors = self.tiles.errors(states, 0.0 if sums is None else sums.offset)
        hits = (self.bounds(best.unsqueeze(1), errors, sums)[1][:, 0] >= self.threshold).nonzero()[:, 0]
        if len(hits):
            lower, upper = self.bounds(maxima[hits], errors[hits], None if sums is None else sums.at(hits))
            row, block = ((upper >= self.threshold) & (upper > -math.inf)).nonzero().unbind(1)
            found = _Kept(ids[hits], states[hits].to(self.dtype), row, block, lower[row, block], upper[row, block])
            self.kept = self.kept.joined(found)
            self._prune()

    def rows_of_maxima(self, rows: int) -> Float[Tensor, "row block"]:
        """A buffer for block maxima."""
        if len(self.maxima) < rows:
            self.maxima = torch.empty(rows, self.tiles.n_blocks, dtype=self.dtype, device=self.device)
        return self.maxima[:rows]

    def bounds(
        self, maxima: Float[Tensor, "row block"], errors: Float[Tensor, " row"], sums: Sums | None
    ) -> tuple[Float[Tensor, "row block"], Float[Tensor, "row block"]]:
        """Lower and upper bounds of exact scores, in binary logarithms, from maxima of logits and their errors."""
        errors = errors.unsqueeze(1)
        if sums is None:
            return maxima - errors - self.rounding, maxima + errors + self.rounding
        scores = maxima - sums.shift.unsqueeze(1)
        if self.scoring.score != "logprob":  # of any probability, or of two logits
            spread = 2 * errors + self.sum_error + self.rounding
            return scores - spread, scores + spread
        others = (1 - torch.exp2(scores)).clamp_min(0)
        spread = 2 * errors * (others + 2 * errors).clamp_max(1) + self.sum_error
        is_sure, factor = scores > math.log2(SURE), torch.exp2(2 * errors) * (1 + self.sum_error)
        rest, lost = sums.rest.unsqueeze(1), sums.lost.unsqueeze(1)
        least, most = -((rest + lost) * factor).log1p() * LOG2_E, -(rest / factor - lost).clamp_min(0).log1p() * LOG2_E
        return torch.where(is_sure, least, scores - spread), torch.where(is_sure, most, scores + spread)

    def _prune(self) -> None:
        if len(self.kept.lower) > self.k:
            self.threshold = max(self.threshold, float(self.kept.lower.topk(self.k).values[-1]))
        self.kept = self.kept.where(self.kept.upper >= self.threshold)

    def state(self) -> dict[str, Tensor]:
        """Blocks kept so far, for `restore`."""
        threshold = torch.tensor([self.threshold], dtype=torch.float64, device="cpu")
        return {name: x.contiguous() for name, x in self.kept._asdict().items()} | {"threshold": threshold}

    def restore(self, *states: dict[str, Tensor]) -> None:
        """Continue from the states of scans that read different rows; without a state, start empty."""
        self.kept = _Kept.none(self.decoder.d_model, self.dtype, self.device)
        for state in states:
            state = dict(state)
            self.threshold = max(self.threshold, float(state.pop("threshold")))
            self.kept = self.kept.joined(_Kept(**{name: x.to(self.device) for name, x in state.items()}))
        self._prune()

    @torch.no_grad()
    def finish(self, processes: Processes = ALONE) -> BestPairs:
        """The best pairs, scored in float64; `processes`, all with the same blocks, divide the work."""
        kept = self.kept.sorted()
        gathered = self.tiles.gathered
        allowed = torch.zeros(self.tiles.n_blocks * BLOCK, dtype=torch.bool, device=self.device)
        allowed[: self.tiles.size] = (
            self.scoring.allowed(self.decoder.d_vocab, self.device) if gathered is None else True
        )

        def exact_pairs(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            """Ids, scores and log-normalizers of the pairs of some rows that may be among the best."""
            logits = exact_logits(self.decoder, kept.states[part])
            top, rest = log_parts(logits)
            inside = (kept.row >= part.start) & (kept.row < part.stop)
            position = (kept.block[inside].unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=self.device)).flatten()
            row = (kept.row[inside] - part.start).repeat_interleave(BLOCK)
            row, position = row[allowed[position]], position[allowed[position]]
            token = position if gathered is None else gathered[position]
            other = self.scoring.kept(kept.ids[part][row], token)
            row, token = row[other], token[other]
            scores = self.scoring.scores(logits, top, rest)[row, token]
            # Sort only pairs that may be among the best; the float32 bound is lower than needed.
            likely = scores * LOG2_E >= self.threshold - 1e-6 * (1 + abs(self.threshold))
            row, token, scores = row[likely], token[likely], scores[likely]
            return torch.stack([kept.ids[part][row], token], dim=1), scores, (top + rest)[row]

        found = processes.map(exact_pairs, list(slices(len(kept.ids), EXACT_ROWS)))
        ids, scores, log_normalizers = (torch.cat(parts).to(self.device) for parts in zip(*found, strict=True))
        order = rank(ids, scores)[: self.k]
        return BestPairs(ids[order], scores[order], log_normalizers[order])


class _Kept(NamedTuple):
    """Blocks that may hold one of the best pairs, and the states of their rows."""

    ids: Tensor  # of each kept row
    states: Tensor  # [kept row, d_model]
    row: Tensor  # of each block: its index in `ids`
    block: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def none(cls, d_model: int, dtype: torch.dtype, device: torch.device) -> _Kept:
        long, bounds = (torch.empty(0, dtype=of, device=device) for of in (torch.long, dtype))
        return cls(long, bounds.new_empty(0, d_model), long, long, bounds, bounds)

    def joined(self, other: _Kept) -> _Kept:
        other = other._replace(row=other.row + len(self.ids))
        return _Kept(*(torch.cat(pair) for pair in zip(self, other, strict=True)))

    def where(self, keep: Tensor) -> _Kept:
        rows, row = self.row[keep].unique(return_inverse=True)
        return _Kept(self.ids[rows], self.states[rows], row, self.block[keep], self.lower[keep], self.upper[keep])

    def sorted(self) -> _Kept:
        """Rows sorted by id, so that sums round alike whatever the order of reading."""
        order = self.ids.argsort()
        return self._replace(ids=self.ids[order], states=self.states[order], row=order.argsort()[self.row])
