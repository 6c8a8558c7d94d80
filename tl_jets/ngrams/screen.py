r"""Screening rows in bfloat16: rows that cannot hold one of the best pairs are passed over, the others scanned in float32.

With x^ and u^ the rounded state and (centered) column, a logit is off by at most

.. math::
    |x - \hat x| \max_v |\hat u_v| + |x| \max_v |u_v - \hat u_v| + (2^{-8} + 2 d\, 2^{-24}) |\hat x| \max_v |\hat u_v| :

the residuals as they are, not their worst case, then the rounding of the result. A row is passed over if the upper bound of its
best log-probability does not reach the threshold of the scan (`tl_jets.ngrams.scan`); so the result is the same as without
screening. Columns are centered over the vocabulary first, which no log-probability sees, and which takes off what all logits
share.

It pays where products in bfloat16 are much faster (`bf16_is_fast` measures it) and few rows come near the threshold; a scan
whose rows mostly pass the screen stops screening.

Memory: `W_U` in bfloat16.
"""

from __future__ import annotations

import math
import time
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.decoder import Decoder
from tl_jets.ngrams.scan import BestPairs, Tiles, TopScan
from tl_jets.ngrams.shards import ALONE, Processes

Screen = Literal["auto", "bf16"]

# A product in bfloat16 must take at most this much of the time of one in float32 for screening to pay.
FAST = 0.4
# A scan of which more than this share of rows must be read in float32 after all is not worth screening; found out after
# so many chunks, since the threshold is low at first.
MOSTLY, TRIAL = 0.5, 8
_BF16_ROUNDOFF = 2.0**-8


class RoundedTiles(Tiles):
    """Tiles whose products are in bfloat16, of a model without a softcap: log-probabilities within `errors`."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, device: torch.device):
        super().__init__(decoder, dtype, device)
        total = torch.stack([columns.sum(1, dtype=torch.float64) for _, columns in decoder.columns(dtype)]).sum(0)
        mean = (total / decoder.d_vocab).to(dtype).unsqueeze(1)
        shape, tied = decoder.W_U.shape, decoder.W_U.stride(0) < decoder.W_U.stride(1)
        table = torch.empty(shape[::-1] if tied else shape, dtype=torch.bfloat16, device=device)
        self.table = table.T if tied else table
        largest, residual = [], []
        for start, columns in decoder.columns(dtype):
            exact = (columns - mean).mul_(self.scale)
            part = self.table[:, start : start + columns.shape[1]]
            part.copy_(exact)
            largest.append(float(torch.linalg.vector_norm(part.to(dtype), dim=0).max()))
            residual.append(float(torch.linalg.vector_norm(exact.sub_(part), dim=0).max()))
        self.largest_column, self.residual = max(largest), max(residual)

    def scaled(self, states: Tensor) -> Tensor:
        """States in bfloat16; the table is scaled already."""
        return states.to(torch.bfloat16)

    def product(self, x: Tensor, tokens: slice, bias: Tensor | float | None, out: Tensor) -> None:
        """Write the logits of rounded states for some tokens to `out`, in working precision."""
        out.copy_(x @ self.table[:, tokens])
        if bias is not None:
            out += bias

    def errors(self, states: Float[Tensor, "row d_model"], offset: float = 0.0) -> Float[Tensor, " row"]:
        """How far a binary logarithm may be from its exact value, what its row shares apart. Shape [row]."""
        x = states.to(self.dtype)
        rounded = x.to(torch.bfloat16).to(self.dtype)
        length, shorter = (torch.linalg.vector_norm(y, dim=1) for y in (x, rounded))
        lost = torch.linalg.vector_norm(x - rounded, dim=1)
        inside = (_BF16_ROUNDOFF + 2 * x.shape[1] * 2.0**-24) * shorter * self.largest_column
        rest = (length * self.largest_column + self.largest_bias + abs(offset)) * 8 * 2.0**-24
        return lost * self.largest_column + length * self.residual + inside + rest


class ScreenedScan:
    """A `TopScan` of which most rows are read in bfloat16 only.

    Args:
        scan: The scan: by log-probability over all tokens, of a model without a softcap.
        tiles: To screen with; shared by scans of the same decoder.
        chunk_size: Rows that are scanned in float32 together.

    Attributes:
        screened: How many rows were screened.
        scanned: How many of these had to be scanned in float32.
    """

    def __init__(self, scan: TopScan, tiles: RoundedTiles, chunk_size: int):
        self.scan, self.tiles, self.chunk_size = scan, tiles, chunk_size
        self.screened = self.scanned = 0
        self.offset = 0.0
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, states: Float[Tensor, "row d_model"], ids: Int[Tensor, " row"]) -> None:
        """Read some rows, as `TopScan.add` does; those that must be scanned may wait for others until `flush`."""
        idle = self.screened >= TRIAL * self.chunk_size and self.scanned > MOSTLY * self.screened
        if idle or self.scan.threshold == -math.inf:
            self.scan.add(states, ids)
            return
        maxima = self.scan.rows_of_maxima(len(states))
        shift, offset, self.offset = self.tiles.read(states, maxima, self.offset)
        assert shift is not None
        upper = self.scan.bounds(maxima.amax(1) - shift, self.tiles.errors(states, offset))[1]
        hits = ~(upper < self.scan.threshold)  # NaN, too: the scan refuses it
        self.screened += len(ids)
        self.scanned += int(hits.sum())
        self._waiting.append((states[hits], ids[hits]))
        if sum(len(ids) for _, ids in self._waiting) >= self.chunk_size:
            self.flush()

    def flush(self) -> None:
        """Scan the rows that wait for others."""
        if self._waiting:
            states, ids = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = []
            if len(ids):
                self.scan.add(states, ids)

    def close(self) -> None:
        """No more rows come: scan those that wait, and free the table."""
        self.flush()
        self.tiles.table = self.tiles.table.new_empty(0, 0)

    def finish(self, processes: Processes = ALONE) -> BestPairs:
        """The best pairs of all rows; see `TopScan.finish`."""
        self.flush()
        return self.scan.finish(processes)

    def state(self) -> dict[str, Tensor]:
        """See `TopScan.state`."""
        self.flush()
        return self.scan.state()

    def restore(self, *states: dict[str, Tensor]) -> None:
        """See `TopScan.restore`."""
        self.scan.restore(*states)


@torch.no_grad()
def bf16_is_fast(device: torch.device, d_model: int) -> bool:
    """Whether products in bfloat16 are much faster than in float32 on a device: measured, about 0.2 s on a CPU."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return False
    rows, columns = (512, 2048) if device.type == "cpu" else (4096, 16384)
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(rows, d_model, dtype=dtype, device=device)
        y = torch.ones(columns, d_model, dtype=dtype, device=device).T
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(x, y)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            runs.append(time.perf_counter() - start)
        seconds.append(min(runs))
    return seconds[1] < FAST * seconds[0]
