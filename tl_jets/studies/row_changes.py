r"""Bounds on how far the log-probabilities after each first token moved between two models, in working precision.

With p, q the probabilities before and after, d = log q - log p, and e an error bound of each logarithm (twice that of a
logit, plus that of a sum):

.. math::
    \text{rise} \le \max\, q\,e^{e_q} - p\,e^{-e_p}, \qquad
    \mathrm{KL} = \sum\, q - p - p\,d = \sum p\,(e^d - 1 - d) ,

sums of nonnegative terms. Where a row moved little, q - p cancels, and the last form is used (`CLOSE`). The remaining
error is that of d relative to d: float32 logits of size 10 have an error of about 1e-6. Only rows with the largest
bounds need float64 (`tl_jets.studies.differences`). Cost: one product with `W_U` per model and a quarter of that for
the rest. Memory: two times `CHUNK_SIZE` rows of logits.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import Reader, check_finite, slices
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.scan import SUM_ERROR
from tl_jets.studies.pairs import RowScores

Change = Literal["probability", "logprob"]

# Numbers processed at a time: they fit the caches of two cores, or fill an accelerator.
SCRATCH_CPU, SCRATCH_DEVICE = 2**17, 2**25
# Below this KL (nats), q - p is too inexact.
CLOSE = 0.01
# Largest d (nats) for which exp(d) may multiply p, which may have underflowed.
FAR = 1


class RowsMoved(NamedTuple):
    """Bounds on `rise` and `fall` of every pair of a row, and KL(before || after) in nats: float64, shape [row], CPU."""

    rise: Float[Tensor, " row"]
    fall: Float[Tensor, " row"]
    kl: Float[Tensor, " row"]


class RowChanges:
    """Compares rows of two models of one vocabulary.

    Args:
        before: A path of the first model.
        after: A path of the second model.
        change: Bound changes of the `"probability"` or of the `"logprob"`.
        at_least: Minimum probability of a pair in at least one of the models.
    """

    def __init__(
        self, before: RowScores, after: RowScores, *, change: Change = "probability", at_least: float | int = 0
    ):
        self.sides = [_Side(before), _Side(after)]
        self.change, self.at_least = change, at_least

    @torch.no_grad()
    def read(self, first: Int[Tensor, " row"]) -> RowsMoved:
        """Bounds and KL of the rows of some first tokens; ValueError if a logit is not finite."""
        for side in self.sides:
            side.read(first)
        logits = self.sides[0].logits
        size = max(1, (SCRATCH_CPU if logits.device.type == "cpu" else SCRATCH_DEVICE) // logits.shape[1])
        found = [self._moved(part) for part in slices(len(first), size)]
        moved = RowsMoved(*(torch.cat(parts).double().cpu() for parts in zip(*found, strict=True)))
        check_finite(moved.kl, first)
        return moved

    def exact(self, first: Int[Tensor, " row"]) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities before and after, and changes (0 where both are below `at_least`): float64 [row, d_vocab]."""
        before, after = (side.scores.read(first)[0].cpu() for side in self.sides)
        change = after.exp().sub_(before.exp()) if self.change == "probability" else after - before
        floor = torch.tensor(float(self.at_least), dtype=torch.float64, device="cpu").log()
        change[torch.maximum(before, after) < floor] = 0
        return before, after, change

    def _moved(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds and KL of a slice of the rows, small enough for the CPU caches."""
        (before, p, before_total), (after, q, after_total) = (side.probabilities(part) for side in self.sides)
        before_error, after_error = (side.errors[part, None] for side in self.sides)
        error = before_error + after_error
        hopeless = None
        if self.at_least > 0:
            hopeless = torch.maximum(p * before_error.exp(), q * after_error.exp()) < self.at_least
        moved = after.sub_(before).sub_((after_total / before_total).log())
        rise = torch.sub(q, p, out=before)
        terms = torch.addcmul(rise, p, moved, value=-1, out=q)
        kl = terms.sum(1)
        close = kl < CLOSE
        if bool(close.any()):
            d = moved[close]
            kl[close] = torch.where(d > FAR, terms[close], (torch.expm1(d) - d) * p[close]).sum(1)
        if self.change == "logprob":
            highest, lowest = moved, moved
        else:
            highest = torch.addcmul(rise, p, torch.expm1(-error), value=-1, out=q)
            lowest = torch.addcmul(rise, p, torch.expm1(error), value=-1, out=before)
        if hopeless is not None:
            highest, lowest = highest.masked_fill(hopeless, -math.inf), lowest.masked_fill(hopeless, math.inf)
        most, least = highest.amax(1), lowest.amin(1)
        if self.change == "logprob":
            return most + error[:, 0], error[:, 0] - least, kl
        return most * after_error[:, 0].exp(), -least * (-after_error[:, 0]).exp(), kl


class _Side:
    """Probabilities of one model, and error bounds of their logarithms."""

    def __init__(self, scores: RowScores):
        decoder = scores.network.decoder
        self.scores, self.decoder = scores, decoder
        self.reader = Reader(decoder, scores.streams.dtype, scores.streams.device)
        self.bias = decoder.constant(None, self.reader.dtype) if bool(decoder.b_U.any()) else None
        self.logits = self.errors = torch.empty(0, device="cpu")

    @full_float32()
    def read(self, first: Tensor) -> None:
        """Set `logits` [row, d_vocab], without bias and transform, and `errors` of the log-probabilities [row]."""
        states = self.scores.streams.states(self.scores.streams.embed(first), self.scores.path)
        if len(self.logits) < len(states):
            self.logits = states.new_empty(len(states), self.decoder.d_vocab)
        self.decoder.project(states, self.logits[: len(states)])
        self.errors = 2 * self.reader.errors(states) + SUM_ERROR * torch.finfo(states.dtype).eps

    def probabilities(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        """For some rows: logits minus their maximum, probabilities, and sums of exp of the former [row, 1]."""
        logits = self.logits[part]
        if self.bias is not None:
            logits += self.bias
        if self.decoder.transform is not None:
            logits.copy_(self.decoder.transform(logits))
        logits -= logits.amax(1, keepdim=True)
        p = torch.exp(logits)
        total = p.sum(1, keepdim=True)
        return logits, p.mul_(1 / total), total
