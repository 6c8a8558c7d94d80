r"""Screening in bfloat16: rows that cannot hold one of the best pairs are skipped, the others scanned in float32.

With x^ and u^ the rounded state and (centered) column, a logit is off by at most

.. math::
    |x - \hat x| \max_v |\hat u_v| + |x| \max_v |u_v - \hat u_v| + (2^{-8} + 2 d\, 2^{-24}) |\hat x| \max_v |\hat u_v| :

the residuals, then the rounding of the result (2^-8 of the row's largest logit, which is known). Columns are centered
over the vocabulary, which changes no log-probability. A row is skipped if the upper bound of its best log-probability
is below the threshold of the scan (`tl_jets.ngrams.scan`), so the result is the same. Other rows wait; those with the
highest bounds are scanned first. A scan that has to scan most of its rows stops screening.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.benchmark import Timer

from tl_jets.core.decoder import Decoder
from tl_jets.core.processes import ALONE, Processes
from tl_jets.ngrams.scan import BestPairs, Tiles, TopScan

Screen = Literal["auto", "bf16"]

# Screening pays if a bfloat16 product takes at most this fraction of the time of a float32 one.
FAST = 0.4
# Stop screening after TRIAL chunks if more than this fraction of rows needs float32; the threshold is low at first.
MOSTLY, TRIAL = 0.5, 8
_BF16_ROUNDOFF = 2.0**-8


class RoundedTiles(Tiles):
    """Tiles with bfloat16 products, for a model without a softcap; `errors` bounds their error."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device):
        super().__init__(decoder, dtype, device)
        self.largest_bias = 0.0 if self.bias is None else float(self.bias.abs().max())
        total = torch.stack([columns.sum(1, dtype=torch.float64) for _, columns in decoder.columns(dtype)]).sum(0)
        mean = (total / decoder.d_vocab).to(dtype).unsqueeze(1)
        shape, tied = decoder.W_U.shape, decoder.W_U.stride(0) < decoder.W_U.stride(1)
        table = torch.empty(shape[::-1] if tied else shape, dtype=torch.bfloat16, device=device)
        self.table = table.T if tied else table
        self.rounded = torch.empty(0, dtype=torch.bfloat16, device=device)
        largest, residual = [], []
        for start, columns in decoder.columns(dtype):
            exact = (columns - mean).mul_(self.scale)
            part = self.table[:, start : start + columns.shape[1]]
            part.copy_(exact)
            largest.append(float(torch.linalg.vector_norm(part.to(dtype), dim=0).max()))
            residual.append(float(torch.linalg.vector_norm(exact.sub_(part), dim=0).max()))
        self.largest_column, self.residual = max(largest), max(residual)

    def scaled(self, states: Tensor) -> Tensor:
        """States in bfloat16; the scale is in the table."""
        return states.to(torch.bfloat16)

    def product(self, x: Tensor, tokens: slice, bias: Tensor | float | None, out: Tensor) -> None:
        """Write the logits of rounded states for some tokens to `out`, in working precision."""
        if len(self.rounded) < out.numel():
            self.rounded = torch.empty(out.numel(), dtype=torch.bfloat16, device=self.device)
        rounded = self.rounded[: out.numel()].view(out.shape)
        out.copy_(torch.mm(x, self.table[:, tokens], out=rounded))
        if bias is not None:
            out += bias

    def errors(
        self, states: Float[Tensor, "row d_model"], offset: float = 0.0, best: Float[Tensor, " row"] | None = None
    ) -> Float[Tensor, " row"]:
        """Bound of the error of each row's binary logarithms, up to a constant that all logits of a row share.

        `offset` was added to all logits. With `best`, a computed logit a row: the mean of its bound and that of any.
        """
        x = states.to(self.dtype)
        rounded = x.to(torch.bfloat16).to(self.dtype)
        length, shorter = (torch.linalg.vector_norm(y, dim=1) for y in (x, rounded))
        lost = torch.linalg.vector_norm(x - rounded, dim=1)
        product = shorter * self.largest_column
        if best is not None:
            own = ((best - offset).abs() + self.largest_bias) * (1 + 2 * _BF16_ROUNDOFF)
            product = (product + own.minimum(product)) / 2
        inside = _BF16_ROUNDOFF * product + 2 * x.shape[1] * 2.0**-24 * shorter * self.largest_column
        rest = (length * self.largest_column + self.largest_bias + abs(offset)) * 8 * 2.0**-24
        return lost * self.largest_column + length * self.residual + inside + rest


class ScreenedScan:
    """A `TopScan` by log-probability that reads most rows in bfloat16 only; no softcap, all tokens.

    Up to 2 `chunk_size` rows wait. Of the `screened` rows, `scanned` needed float32.
    """

    def __init__(self, scan: TopScan, tiles: RoundedTiles, chunk_size: int):
        self.scan, self.tiles, self.chunk_size = scan, tiles, chunk_size
        self.screened = self.scanned = 0
        self.offset = math.nan
        kept = scan.kept
        self._waiting = _Waiting(kept.states[:0], kept.ids[:0], kept.upper[:0])
        # The best lower bounds of the best pairs of rows, k at most.
        self._lower = torch.empty(0, dtype=scan.dtype, device=scan.device)

    @torch.no_grad()
    def add(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> None:
        """Read some rows, as `TopScan.add` does; rows that may matter can wait until `flush`."""
        if self.screened >= TRIAL * self.chunk_size and self.scanned > MOSTLY * self.screened:
            self.scan.add(states, ids)
            return
        maxima = self.scan.rows_of_maxima(len(states))
        sums, self.offset = self.tiles.read(states, maxima, self.offset)
        assert sums is not None
        best = maxima.amax(1)
        errors = self.tiles.errors(states, sums.offset, best)
        lower, upper = (bound[:, 0] for bound in self.scan.bounds(best.unsqueeze(1), errors, sums))
        self._raise_threshold(lower)
        self.screened += len(ids)
        new = (states.to(self.scan.dtype), ids, upper)
        self._waiting = _Waiting(*(torch.cat(pair) for pair in zip(self._waiting, new, strict=True)))
        self._drop()
        if len(self._waiting.ids) > 2 * self.chunk_size:
            self._scan_waiting(self.chunk_size)

    def _drop(self) -> None:
        """Drop waiting rows below the threshold, but not NaN, which the scan refuses."""
        self._waiting = self._waiting.at(~(self._waiting.upper < self.scan.threshold))

    def _raise_threshold(self, lower: Tensor) -> None:
        """Raise the threshold with lower bounds of rows' best pairs."""
        self._lower = torch.cat([self._lower, lower[lower.isfinite()]])
        if len(self._lower) >= self.scan.k:
            self._lower = self._lower.topk(self.scan.k).values
            self.scan.threshold = max(self.scan.threshold, float(self._lower[-1]))

    def _scan_waiting(self, leave: int = 0) -> None:
        """Scan waiting rows, highest bounds (and NaN) first, until at most `leave` possibly needed ones remain."""
        while len(self._waiting.ids) > leave:
            order, count = self._waiting.upper.argsort(descending=True), max(1, self.chunk_size // 4)
            first, self._waiting = self._waiting.at(order[:count]), self._waiting.at(order[count:])
            self.scan.add(first.states, first.ids)
            self.scanned += len(first.ids)
            self._drop()

    def finish(self, processes: Processes = ALONE) -> BestPairs:
        """The best pairs of all rows, after which none may be added; see `TopScan.finish`."""
        self._scan_waiting()
        self.tiles.table = self.tiles.table.new_empty(0, 0)
        return self.scan.finish(processes)

    def state(self) -> dict[str, Tensor]:
        """See `TopScan.state`."""
        self._scan_waiting()
        return self.scan.state()

    def restore(self, *states: dict[str, Tensor]) -> None:
        """See `TopScan.restore`."""
        self.scan.restore(*states)


class _Waiting(NamedTuple):
    """Rows that may have to be scanned."""

    states: Float[Tensor, "row d_model"]
    ids: Int[Tensor, " row"]
    upper: Float[Tensor, " row"]  # bounds of their best scores

    def at(self, index: Tensor) -> _Waiting:
        return _Waiting(*(part[index] for part in self))


@torch.no_grad()
def bf16_is_fast(device: torch.device, d_model: int) -> bool:
    """Whether bfloat16 products are much faster than float32 on a device; measured, about 0.2 s on a CPU."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return False
    rows, columns = (512, 2048) if device.type == "cpu" else (4096, 16384)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, y = (torch.ones(size, d_model, dtype=dtype, device=device) for size in (rows, columns))
        timer = Timer("torch.mm(x, y.T)", globals={"x": x, "y": y, "torch": torch}, num_threads=torch.get_num_threads())
        seconds.append(min(timer.timeit(1).median for _ in range(3)))
    return seconds[1] < FAST * seconds[0]
