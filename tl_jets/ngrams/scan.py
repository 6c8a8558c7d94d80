r"""The exact best pairs (row, token) of many logit vectors, streamed: no [row, d_vocab] tensor is stored.

Rows are inputs of the unembedding; pairs are scored by log-probability or logit. For each tile of the product with
`W_U`, a scan keeps the maxima of blocks of 128 tokens and sums exp2 for the log-normalizer over the whole vocabulary.
An offset that suits earlier rows prevents overflow; rows that it does not suit are read again, minus their maximum.

**Lemma.** `block maximum - log-normalizer` is the best score of a block. Let t be the K-th largest of these over all
blocks of all rows. The K best pairs lie in blocks whose best score is at least t: K blocks hold a pair that good, so
the K-th best score is at least t. A scan keeps only blocks that reach this threshold, which only rises.

**Exactness.** A logit in working precision (unit roundoff u) is off by at most

.. math:: \varepsilon_r = u \, (d + 32) \, |x_r| \max_v |u_v|

(the bound of a dot product), a log-probability with p = exp(s) by 2 (1 - p) eps_r plus the error of a sum. A block is
kept if its upper bound reaches the K-th largest lower bound. Kept blocks are scored again in float64 with
log p = (l - max) - log1p(sum of the others), which keeps the digits of scores near 0. Order: (score, ids).

Cost: rows * d_vocab * d_model multiply-adds plus 5%; float64 scoring adds (2 * rows of the result / rows) of a scan.
Memory: a tile, d_vocab / 128 block maxima a row, 128 rows of float64 logits, the states of kept rows.

Example:
    >>> import torch
    >>> from tl_jets.calculus import Norm
    >>> from tl_jets.core.decoder import Decoder
    >>> _ = torch.manual_seed(0)
    >>> decoder = Decoder(Norm("none"), torch.randn(4, 300), torch.randn(300))
    >>> states = torch.randn(50, 4)
    >>> scan = TopScan(decoder, 5)
    >>> for start in (0, 20, 40):
    ...     scan.add(states[start : start + 20], torch.arange(start, min(start + 20, 50)))
    >>> best = scan.finish()
    >>> table = decoder.logits(states.double()).log_softmax(-1)
    >>> values, pairs = table.flatten().topk(5)
    >>> best.ids.tolist() == [[int(i) // 300, int(i) % 300] for i in pairs], bool(torch.allclose(best.scores, values))
    (True, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.logit_reader import BLOCK, LOG2_E, slices
from tl_jets.ngrams.shards import ALONE, Processes
from tl_jets.ngrams.tables import rank

Score = Literal["logprob", "logit"]
SCORES: tuple[Score, ...] = ("logprob", "logit")

# Tokens of a tile; with 1024 rows, a tile fits the caches of two cores.
TILE_CPU, TILE_DEVICE = 2048, 16384
# Rows of float64 logits held in `finish`, and of temporaries.
EXACT_ROWS, ROWS_OF_TEMPORARIES = 128, 16
# Range of log2(sum of 2^logit) within which sums neither overflow nor lose terms that matter.
LEAST_SUM, LARGEST_SUM = -60.0, 100.0
# Bound of the relative error of a sum of 2^exponent, in units of roundoff.
SUM_ERROR = 64


@dataclass(frozen=True, eq=False)
class BestPairs:
    """Best pairs, ties by ids: log-probabilities (nats) or logits, and log sum exp of their rows; float64."""

    ids: Int[Tensor, "pair 2"]
    scores: Float[Tensor, " pair"]
    log_normalizers: Float[Tensor, " pair"]


class RowsRead(NamedTuple):
    """Binary log-normalizers (None if not computed), which include the `offset` added to all logits.

    `next_offset` is for the next rows; NaN if no offset suits all rows.
    """

    log_normalizers: Float[Tensor, " row"] | None
    offset: float
    next_offset: float


class Tiles:
    """Logits by tiles, in binary logarithms, with block maxima; `tokens` are the sorted ids to choose from."""

    def __init__(
        self,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        *,
        normalize: bool = True,
        tokens: Int[Tensor, " token"] | None = None,
    ):
        self.decoder, self.dtype, self.device, self.normalize = decoder, dtype, device, normalize
        # Without normalizers, compute only the logits of `tokens`.
        self.gathered = None if normalize else tokens
        self.size = decoder.d_vocab if self.gathered is None else len(self.gathered)
        self.n_blocks = -(-self.size // BLOCK)
        self.width = TILE_CPU if device.type == "cpu" else TILE_DEVICE
        self.scratch = torch.empty(0, dtype=dtype, device=device)
        self.penalty: Tensor | None = None
        if tokens is not None and normalize:
            self.penalty = torch.full((decoder.d_vocab,), -math.inf, dtype=dtype, device=device)
            self.penalty[tokens] = 0
        # A logit scale is applied to states and bias; a softcap to every tile.
        self.transform = decoder.transform
        self.scale = decoder.logit_scale * (LOG2_E if self.transform is None else 1.0)
        bias = decoder.b_U.to(dtype) if self.gathered is None else decoder.b_U[self.gathered].to(dtype)
        self.bias = bias * self.scale if bool(bias.any()) else None
        self.largest_bias = float(bias.abs().max()) * self.scale
        self.largest_column = self._largest_column() * abs(self.scale)

    def _largest_column(self) -> float:
        return max(
            float(torch.linalg.vector_norm(columns, dim=0).max()) for _, columns in self.decoder.columns(self.dtype)
        )

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
        roundoff = torch.finfo(self.dtype).eps / 2
        length = torch.linalg.vector_norm(states.to(self.dtype), dim=1)
        error = (states.shape[1] + 32) * roundoff * length * self.largest_column
        error = error + 8 * roundoff * (self.largest_bias + abs(offset))
        return error if self.transform is None else error * LOG2_E

    def read(
        self, states: Float[Tensor, "row d_model"], maxima: Float[Tensor, "row block"], offset: float = 0.0
    ) -> RowsRead:
        """Read some rows and fill `maxima`, in binary logarithms; `offset` is the `next_offset` of the rows before."""
        x = self.scaled(states)
        if not self.normalize:
            self._sums(x, maxima, 0.0)
            return RowsRead(None, 0.0, 0.0)
        if math.isfinite(offset):
            found = self._sums(x, maxima, offset).log2()
            if bool(((found > LEAST_SUM) & (found < LARGEST_SUM)).all()):
                return RowsRead(found.to(self.dtype), offset, offset)
        # Usually at most once a sweep: read the rows again minus their maxima, and choose an offset.
        found = self._careful(x, maxima)
        least, largest = (float(y) for y in found.aminmax())
        suitable = self.transform is None and largest - least < LARGEST_SUM - LEAST_SUM - 20
        return RowsRead(found.to(self.dtype), 0.0, -(least + largest) / 2 if suitable else math.nan)

    def _sums(self, x: Tensor, maxima: Tensor, offset: float) -> Tensor:
        """Sums of 2^logit; fills `maxima`."""
        bias = self.bias if offset == 0 else offset + (0 if self.bias is None else self.bias)
        total = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        for tokens, blocks in self._parts():
            logits = self._tile(x, tokens, bias)
            found = logits.view(len(x), -1, BLOCK).amax(-1)
            maxima[:, blocks] = found if self.penalty is None else self._allowed(logits, found, tokens)
            if self.normalize:
                total += logits.exp2_().sum(1)
        return total

    def _careful(self, x: Tensor, maxima: Tensor) -> Tensor:
        """Log-normalizers computed with each row's running maximum, which takes another pass."""
        top = torch.full((len(x),), -math.inf, dtype=self.dtype, device=self.device)
        total = torch.zeros(len(x), dtype=torch.float64, device=self.device)
        for tokens, blocks in self._parts():
            logits = self._tile(x, tokens, self.bias)
            found = logits.view(len(x), -1, BLOCK).amax(-1)
            maxima[:, blocks] = found if self.penalty is None else self._allowed(logits, found, tokens)
            higher = torch.maximum(top, found.amax(1))
            total *= torch.exp2((top - higher).double())
            top = higher
            total += logits.sub_(top.unsqueeze(1)).exp2_().sum(1)
        return total.log2() + top.double()

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        """Tokens and blocks of each tile."""
        for start in range(0, self.size, self.width):
            stop = min(start + self.width, self.size)
            yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))

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

    def _allowed(self, logits: Tensor, found: Tensor, tokens: slice) -> Tensor:
        """Block maxima over the tokens to choose from."""
        if self.penalty is None:
            return found
        penalty = self.penalty[tokens]
        if bool((penalty == 0).all()):
            return found
        if not bool((penalty == 0).any()):
            return torch.full_like(found, -math.inf)
        penalty = torch.nn.functional.pad(penalty, (0, logits.shape[1] - len(penalty)))
        return (logits + penalty).view(len(logits), -1, BLOCK).amax(-1)


class TopScan:
    """The best `k` pairs (row, token) over all added rows, in float32 or float64.

    `tokens` are the sorted ids to choose from, None for all; normalizers are over the whole vocabulary.
    """

    def __init__(
        self,
        decoder: Decoder,
        k: int,
        *,
        score: Score = "logprob",
        tokens: Int[Tensor, " token"] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tiles: Tiles | None = None,
    ):
        self.decoder, self.k, self.tokens = decoder, k, tokens
        self.normalize = score == "logprob"
        self.tiles = tiles or Tiles(decoder, dtype, torch.device(device), normalize=self.normalize, tokens=tokens)
        self.dtype, self.device = self.tiles.dtype, self.tiles.device
        # The K-th best lower bound so far, in binary logarithms.
        self.threshold = -math.inf
        self.offset = 0.0
        self.sum_error = SUM_ERROR * torch.finfo(self.dtype).eps
        self.kept = _Kept.none(decoder.d_model, self.dtype, self.device)
        self.maxima = torch.empty(0, self.tiles.n_blocks, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def add(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> None:
        """Read some rows, named by distinct `ids` in the result; ValueError if a logit is not finite."""
        maxima = self.rows_of_maxima(len(states))
        shift, offset, self.offset = self.tiles.read(states, maxima, self.offset)
        best = maxima.amax(1) if shift is None else maxima.amax(1) - shift
        check_finite(best, ids)
        errors = self.tiles.errors(states, offset)
        hits = (self.bounds(best, errors)[1] >= self.threshold).nonzero()[:, 0]
        if len(hits):
            scores = maxima[hits] if shift is None else maxima[hits] - shift[hits, None]
            lower, upper = self.bounds(scores, errors[hits, None])
            row, block = ((upper >= self.threshold) & (scores > -math.inf)).nonzero().unbind(1)
            found = _Kept(ids[hits], states[hits].to(self.dtype), row, block, lower[row, block], upper[row, block])
            self.kept = self.kept.joined(found)
            self._prune()

    def rows_of_maxima(self, rows: int) -> Float[Tensor, "row block"]:
        """A buffer for block maxima."""
        if len(self.maxima) < rows:
            self.maxima = torch.empty(rows, self.tiles.n_blocks, dtype=self.dtype, device=self.device)
        return self.maxima[:rows]

    def bounds(self, scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of exact scores, in binary logarithms."""
        if self.normalize:
            others = (1 - torch.exp2(scores)).clamp_min(0)
            errors = 2 * errors * (others + 2 * errors).clamp_max(1) + self.sum_error
        return scores - errors, scores + errors

    def _prune(self) -> None:
        if len(self.kept.lower) > self.k:
            self.threshold = max(self.threshold, float(self.kept.lower.topk(self.k).values[-1]))
        self.kept = self.kept.where(self.kept.upper >= self.threshold)

    def close(self) -> None:
        """End of rows; nothing is pending."""

    def state(self) -> dict[str, Tensor]:
        """Blocks kept so far, for `restore`."""
        threshold = torch.tensor([self.threshold], dtype=torch.float64, device="cpu")
        return {name: x.contiguous() for name, x in vars(self.kept).items()} | {"threshold": threshold}

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
        allowed = torch.ones(self.tiles.n_blocks * BLOCK, dtype=torch.bool, device=self.device)
        allowed[self.tiles.size :] = False
        if self.tokens is not None and self.normalize:
            allowed.zero_()[self.tokens] = True

        def exact_pairs(part: slice) -> tuple[Tensor, ...]:
            inside = (kept.row >= part.start) & (kept.row < part.stop)
            logits = exact_logits(self.decoder, kept.states[part])
            return self._exact_pairs(logits, kept.ids[part], kept.row[inside] - part.start, kept.block[inside], allowed)

        found = processes.map(exact_pairs, list(slices(len(kept.ids), EXACT_ROWS)))
        ids, scores, log_normalizers = (torch.cat(parts).to(self.device) for parts in zip(*found, strict=True))
        order = rank(ids, scores)[: self.k]
        return BestPairs(ids[order], scores[order], log_normalizers[order])

    def _exact_pairs(
        self, logits: Tensor, ids: Tensor, row: Tensor, block: Tensor, allowed: Bool[Tensor, " token"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, scores and log-normalizers of the pairs in some blocks that may be among the best."""
        top, rest = log_parts(logits)
        position = (block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=self.device)).flatten()
        row = row.repeat_interleave(BLOCK)
        row, position = row[allowed[position]], position[allowed[position]]
        token = position if self.tiles.gathered is None else self.tiles.gathered[position]
        scores = logits[row, token]
        if self.normalize:
            scores = (scores - top[row]) - rest[row]
        # Sort only pairs that may be among the best; the float32 bound is lower than needed.
        likely = scores * LOG2_E >= self.threshold - 1e-6 * (1 + abs(self.threshold))
        row, token, scores = row[likely], token[likely], scores[likely]
        return torch.stack([ids[row], token], dim=1), scores, (top + rest)[row]


@dataclass
class _Kept:
    """Blocks that may hold one of the best pairs, and the states of their rows."""

    ids: Tensor  # of each kept row
    states: Tensor  # [kept row, d_model]
    row: Tensor  # of each block: its index in `ids`
    block: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def none(cls, d_model: int, dtype: torch.dtype, device: torch.device) -> _Kept:
        def empty(of: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(*shape, dtype=of, device=device)

        long, bounds = [empty(torch.long, 0) for _ in range(3)], [empty(dtype, 0) for _ in range(2)]
        return cls(long[0], empty(dtype, 0, d_model), *long[1:], *bounds)

    def joined(self, other: _Kept) -> _Kept:
        row = torch.cat([self.row, other.row + len(self.ids)])
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("ids", "states", "block", "lower", "upper"))
        ids, states, block, lower, upper = (torch.cat(pair) for pair in pairs)
        return _Kept(ids, states, row, block, lower, upper)

    def where(self, keep: Tensor) -> _Kept:
        rows, row = self.row[keep].unique(return_inverse=True)
        return _Kept(self.ids[rows], self.states[rows], row, self.block[keep], self.lower[keep], self.upper[keep])

    def sorted(self) -> _Kept:
        """Rows sorted by id, so that sums round alike whatever the order of reading."""
        order = self.ids.argsort()
        return _Kept(self.ids[order], self.states[order], order.argsort()[self.row], self.block, self.lower, self.upper)


def exact_logits(decoder: Decoder, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
    """The model's transformed logits of some rows, in float64."""
    logits = torch.empty(len(states), decoder.d_vocab, dtype=torch.float64, device=states.device)
    decoder.project(states.double(), logits)
    logits += decoder.constant(None, torch.float64)
    return logits if decoder.transform is None else decoder.transform(logits).double()


def log_parts(logits: Float[Tensor, "row d_vocab"]) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """The largest logit of each row, and log1p(sum of exp(others - largest)); log-normalizers are their sum."""
    top, position = logits.max(1)
    rest = torch.empty_like(top)
    for part in slices(len(logits), ROWS_OF_TEMPORARIES):
        others = (logits[part] - top[part].unsqueeze(1)).exp_().scatter_(1, position[part].unsqueeze(1), 0.0)
        rest[part] = others.sum(1).log1p()
    return top, rest


def check_finite(scores: Float[Tensor, " row"], ids: Int[Tensor, " row"]) -> None:
    """Raise ValueError if a row's score is not finite."""
    finite = scores.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"Every logit must be finite; those of tokens {ids[~finite][:5].tolist()} are not. Look at the model's weights, "
            "its precision (float16 overflows), and the hooks on it."
        )
