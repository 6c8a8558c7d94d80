r"""Log-normalizers, maxima and log-probabilities of logits that are a product of two thin factors.

A head's query-key scores and decoded writes are products [V, d_head] x [d_head, V], computed tile by tile in binary
logarithms. Instead of each row's maximum, which would need another pass, sums subtract an estimate of the
log-normalizer that assumes normally distributed logits; in trained heads it is off by a tenth of a nat.

Cost: d_head V multiply-adds a row, and about as much time again for three or four passes over its tiles.

Example:
    >>> import torch
    >>> logits = LowRankLogits(torch.eye(2), torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]))
    >>> best, normalizer = best_log_prob(logits, logits.rows)
    >>> bool(torch.allclose(normalizer, logits.columns.double().logsumexp(1)))
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import LOG2_E, log_parts

# Rows and columns of a tile, and rows in float64 at a time.
TILE_ROWS, TILE_COLUMNS, EXACT_ROWS = 1024, 2048, 32
# Binary logarithms of the smallest term (subnormal float32 powers are slow) and of the smallest sum not recomputed.
SMALLEST, LEAST_SUM = -120.0, -60.0


@dataclass(frozen=True, eq=False)
class LowRankLogits:
    """Logits as a product: `transform(rows @ columns + constant)`."""

    rows: Float[Tensor, "row inner"]
    columns: Float[Tensor, "inner column"]
    constant: Float[Tensor, " column"] | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def tiles(
        self, rows: Float[Tensor, "part inner"], less: Float[Tensor, "part 1"] | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "part tile"]]]:
        """Logits of `rows` minus `less` in binary logarithms, by tiles of columns in a shared buffer."""
        n_columns = self.columns.shape[1]
        buffer = rows.new_empty(len(rows) * min(TILE_COLUMNS, n_columns))
        scale = LOG2_E if self.transform is None else 1.0
        bias = rows.new_zeros(1) if self.constant is None else self.constant * scale
        if self.constant is None and self.transform is None and less is not None:
            bias, less = -less, None  # added by the product, which saves a pass
        bias = bias.expand(*bias.shape[:-1], n_columns)
        for start in range(0, n_columns, TILE_COLUMNS):
            part = slice(start, min(start + TILE_COLUMNS, n_columns))
            tile = buffer[: len(rows) * (part.stop - start)].view(len(rows), -1)
            torch.addmm(bias[..., part], rows, self.columns[:, part], alpha=scale, out=tile)
            if self.transform is not None:
                torch.mul(self.transform(tile), LOG2_E, out=tile)
            yield part, tile if less is None else tile.sub_(less)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the columns with their constants, in float64."""
        constant = self.columns[:0] if self.constant is None else self.constant[None]
        columns = torch.cat([self.columns, constant]).double()
        mean = columns.mean(1)
        columns = columns - mean.unsqueeze(1)
        return mean, columns @ columns.T / columns.shape[1]

    def expected(self, rows: Float[Tensor, "part inner"]) -> Float[Tensor, "part 1"]:
        """Log-normalizers, in binary logarithms, if logits were normally distributed: log V + mean + variance / 2.

        Standard deviations above about the maximum of V normal variables enter linearly. Transforms are guessed.
        """
        mean, covariance = self._moments
        x = torch.cat([rows.double(), rows.new_ones(len(rows), len(mean) - rows.shape[1], dtype=torch.float64)], dim=1)
        deviation = (x @ covariance * x).sum(1, keepdim=True).clamp_min(0).sqrt()
        log_size = math.log(self.columns.shape[1])
        largest = math.sqrt(2 * max(log_size, 1.0))
        largest -= math.log(2 * math.pi * largest**2) / (2 * largest)
        above = torch.where(deviation < largest, deviation**2 / 2, largest * (deviation - largest / 2))
        tilted = (x @ mean).unsqueeze(1) + above
        tilted = tilted if self.transform is None else self.transform(tilted)
        return ((log_size + tilted) * LOG2_E).to(rows.dtype)

    def at(self, rows: Int[Tensor, " pair"], columns: Int[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """Logits of pairs (row, column) in float64, in nats."""
        logits = (self.rows[rows].double() * self.columns[:, columns].double().T).sum(1)
        logits = logits if self.constant is None else logits + self.constant[columns]
        return logits if self.transform is None else self.transform(logits)

    @cached_property
    def _precise(self) -> Float[Tensor, "inner column"]:
        return self.columns.double()

    def exact_buffer(self) -> Float[Tensor, "most column"]:
        """A buffer for float64 logits of `EXACT_ROWS` rows; allocation costs half as much as the product."""
        return self._precise.new_empty(EXACT_ROWS, self._precise.shape[1])

    @cached_property
    def reach(self) -> float:
        """An upper bound of |logit| before the transform."""
        product = self.rows.norm(dim=1).max() * self.columns.norm(dim=0).max()
        return float(product + (0.0 if self.constant is None else self.constant.abs().max()))

    def rounding(self) -> float:
        """Bound of the rounding error of a logit and of a sum of exp in working precision, in nats."""
        # The estimate of a row is one more term of its products, at most six times the logits and log V.
        return torch.finfo(self.rows.dtype).eps * ((self.rows.shape[1] + 32) * 4 * (self.reach + 16) + 64)

    def exact(
        self, rows: Int[Tensor, " part"], buffer: Float[Tensor, "most column"] | None = None
    ) -> Float[Tensor, "part column"]:
        """Logits of some rows in float64, in nats; written to `buffer` if given."""
        out = None if buffer is None else buffer[: len(rows)]
        logits = torch.mm(self.rows[rows].double(), self._precise, out=out)
        logits = logits if self.constant is None else logits.add_(self.constant)
        return logits if self.transform is None else self.transform(logits).double()


def normalizers(product: LowRankLogits, rows: Tensor, each: Callable[[slice, Tensor], None]) -> tuple[Tensor, Tensor]:
    """Estimated log-normalizers of some rows, and what to add to make them exact; binary logarithms [part, 1].

    `each` is called with each tile minus the estimate, and again for all tiles if the estimate is replaced.
    """
    may_underflow = 2 * LOG2_E * product.reach > -SMALLEST

    def total(shift: Tensor) -> Tensor:
        sums = torch.zeros(len(rows), 1, dtype=torch.float64, device=rows.device)
        for part, tile in product.tiles(rows, shift):
            each(part, tile)
            if may_underflow:
                tile.clamp_min_(SMALLEST)
            sums += tile.exp2_().sum(1, keepdim=True)
        return sums.log2()

    shift = product.expected(rows)
    short = total(shift)
    # The logits are far from normal: subtract the maximum instead, at the cost of another pass.
    if not bool(((short > LEAST_SUM) & (short < math.inf)).all()):
        shift = torch.stack([tile.amax(1) for _, tile in product.tiles(rows)]).amax(0).unsqueeze(1)
        short = total(shift)
    return shift, short.to(rows.dtype)


def best_log_prob(product: LowRankLogits, rows: Tensor) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """The largest log-probability and the log-normalizer of each row, in nats."""
    found: dict[int, Tensor] = {}

    def each(columns: slice, tile: Tensor) -> None:
        found[columns.start] = tile.amax(1)

    expected, short = (values[:, 0].double() / LOG2_E for values in normalizers(product, rows, each))
    return torch.stack(list(found.values())).amax(0).double() / LOG2_E - short, expected + short


def log_softmax_at(product: LowRankLogits, rows: Tensor, columns: Tensor) -> Float[Tensor, " pair"]:
    """Log-probabilities of pairs (row, column) in float64; log1p keeps the digits of values near 0."""
    distinct, which, counts = rows.unique(return_inverse=True, return_counts=True)
    pairs = which.argsort(stable=True).split([int(part.sum()) for part in counts.split(EXACT_ROWS)])
    found = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    buffer = product.exact_buffer()
    for start, inside in zip(range(0, len(distinct), EXACT_ROWS), pairs, strict=True):
        logits = product.exact(distinct[start : start + EXACT_ROWS], buffer)
        top, rest = log_parts(logits)
        row = which[inside] - start
        found[inside] = (logits[row, columns[inside]] - top[row]) - rest[row]
    return found
