r"""How far the log-probabilities after each first token moved from one model to another, in working precision, with bounds.

Of whole rows, not of pairs: KL(before || after), and the largest rise and fall that *any* pair of the row can have in exact
arithmetic. So only the rows whose bound is among the best need be read in float64 (`tl_jets.studies.differences`).

With p, q the probabilities before and after, d = log q - log p, and e an error bound of each logarithm
(`tl_jets.ngrams.scan.Tiles.errors`, twice, and that of a sum):

.. math::
    \text{rise} \le \max\, q\,(1 + e_q) - p\,(1 - e_p), \qquad
    \mathrm{KL} = \sum p \,(e^d - 1 - d) ,

each term of which is nonnegative: nothing cancels where the models are close. What is left is the error of d relative to d: float32
logits of size 10 have an error of 1e-6 or so.

Cost: one product with `W_U` a model and a third of that for everything else. Memory: two times `CHUNK` rows of logits.

Example:
    >>> import torch, tl_jets as tj
    >>> from tl_jets.studies.pairs import RowScores
    >>> docs, code = (RowScores(load(), "mlps") for load in (tj.load_tinydocs, tj.load_tinycode))
    >>> found = RowChanges(docs, code).read(torch.tensor([40, 41, 42]))
    >>> found.rise.shape, bool((found.kl > 0).all())
    (torch.Size([3]), True)
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.ngrams.scan import SUM_ERROR, Tiles
from tl_jets.reader import LOG2_E, slices
from tl_jets.studies.pairs import RowScores

Change = Literal["probability", "logprob"]

# First tokens whose logits are held at a time, of either model: products of fewer rows are slower.
CHUNK = 320
# Numbers worked on at a time: what the caches of two cores hold, or enough to fill an accelerator.
SCRATCH_CPU, SCRATCH_DEVICE = 2**17, 2**25
# Where a probability underflows in float32, those that are not negligible have risen by more than this (nats).
UNDERFLOW = 40


class RowsMoved(NamedTuple):
    """What `RowChanges.read` found out about some rows; on the CPU, in float64.

    Attributes:
        rise: No pair of the row rose by more. Shape [row].
        fall: No pair of the row fell by more. Shape [row].
        kl: KL(before || after), in nats. Shape [row].
    """

    rise: Float[Tensor, " row"]
    fall: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]


class RowChanges:
    """Reads rows of two models of one vocabulary.

    Args:
        before: A path of one.
        after: A path of the other.
        change: Whether bounds are of changes of the `"probability"` or of the `"logprob"`.
        at_least: Bounds are over the pairs whose probability is at least this in one of the models.
    """

    def __init__(
        self, before: RowScores, after: RowScores, *, change: Change = "probability", at_least: float | int = 0
    ):
        self.sides = [_Side(before), _Side(after)]
        self.change = change
        self.floor = math.log(at_least) if at_least > 0 else -math.inf
        self.scratch: list[Tensor] = []

    @torch.no_grad()
    def read(self, first: Int[Tensor, " row"]) -> RowsMoved:
        """Read the rows of a few first tokens.

        Raises:
            ValueError: A logit is not finite.
        """
        before, after = (side.read(first) for side in self.sides)
        errors = [side.errors.unsqueeze(1) for side in self.sides]
        found = [
            self._moved(before[part], after[part], *(x[part] for x in errors))
            for part in slices(len(first), rows_of_scratch(before))
        ]
        return RowsMoved(*(torch.cat(parts).double().cpu() for parts in zip(*found, strict=True)))

    def _moved(self, before: Tensor, after: Tensor, before_error: Tensor, after_error: Tensor) -> tuple[Tensor, ...]:
        """Bounds and KL of rows of log-probabilities, which are overwritten."""
        if len(self.scratch) < 3 or self.scratch[0].shape[0] < len(before):
            self.scratch = [torch.empty_like(before) for _ in range(3)]
        p, q, terms = (x[: len(before)] for x in self.scratch)
        torch.exp(before, out=p)
        torch.exp(after, out=q)
        hopeless = None
        if self.floor > -math.inf:
            hopeless = torch.maximum(before + before_error, after + after_error) < self.floor
        moved = after.sub_(before)
        torch.expm1(moved, out=terms).sub_(moved).mul_(p)
        if float(moved.amax()) > UNDERFLOW:
            terms = torch.where(moved > 1, (q - p).addcmul_(p, moved, value=-1), terms)
        kl = terms.sum(1)
        if self.change == "logprob":
            rise, fall, error = moved, torch.neg(moved, out=before), (before_error + after_error)[:, 0]
        else:
            rise = torch.mul(q, 1 + after_error, out=moved).addcmul_(p, before_error - 1)
            fall = torch.mul(p, 1 + before_error, out=before).addcmul_(q, after_error - 1)
            error = 0
        if hopeless is not None:
            rise, fall = (x.masked_fill_(hopeless, -math.inf) for x in (rise, fall))
        return rise.amax(1) + error, fall.amax(1) + error, kl


def rows_of_scratch(logits: Tensor) -> int:
    """How many rows are worked on at a time."""
    return max(1, (SCRATCH_CPU if logits.device.type == "cpu" else SCRATCH_DEVICE) // logits.shape[1])


class _Side:
    """Log-probabilities of one model, and how far off they may be."""

    def __init__(self, scores: RowScores):
        self.scores, self.decoder = scores, scores.network.decoder
        self.tiles: Tiles | None = None
        self.logits = self.errors = torch.empty(0)

    def read(self, first: Tensor) -> Tensor:
        """Log-probabilities [row, d_vocab] in nats; `errors` then has the bounds of their errors [row]."""
        streams = self.scores.streams
        states = streams.states(streams.embed(first), self.scores.path)
        if self.tiles is None:
            self.tiles = Tiles(self.decoder, states.dtype, states.device)
        if len(self.logits) < len(states):
            self.logits = torch.empty(len(states), self.decoder.d_vocab, dtype=states.dtype, device=states.device)
        logits = self.logits[: len(states)]
        self.decoder.project(states, logits)
        logits += self.decoder.b_U.to(states.dtype)
        exponentials = torch.empty_like(logits[: rows_of_scratch(logits)])
        for part in slices(len(logits), rows_of_scratch(logits)):
            rows = logits[part]
            if self.decoder.transform is not None:
                rows.copy_(self.decoder.transform(rows))
            top = rows.amax(1, keepdim=True)
            if not bool(top.isfinite().all()):
                bad = first[part][~top.isfinite()[:, 0].to(first.device)][:5].tolist()
                raise ValueError(
                    f"Every logit must be finite; those of tokens {bad} are not. Look at the model's weights, its precision "
                    "(float16 overflows), and the hooks on it."
                )
            rows -= top
            rows -= torch.exp(rows, out=exponentials[: len(rows)]).sum(1, keepdim=True).log_()
        self.errors = 2 * self.tiles.errors(states) / LOG2_E + SUM_ERROR * torch.finfo(states.dtype).eps
        return logits
