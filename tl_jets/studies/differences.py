r"""The bi-grams whose probability rose or fell most between two models of one vocabulary, exactly.

.. math::
    \Delta(z_1, z_2) = P_b(z_2 | z_1) - P_a(z_2 | z_1) \qquad \text{or} \qquad \log P_b(z_2 | z_1) - \log P_a(z_2 | z_1)

along one path, over all V x V pairs. A first pass in float32 bounds the change of every pair of a row. Rows that may hold one
of the largest changes are then computed in float64, largest bound first, until no remaining row can. Models in float64 skip
the first pass.

**Bounds.** With p, q the probabilities before and after, d = log q - log p, and e an error bound of each logarithm (twice that
of a logit, plus that of a sum):

.. math::
    \text{rise} \le \max\, q\,e^{e_q} - p\,e^{-e_p}, \qquad
    \mathrm{KL} = \sum\, q - p - p\,d = \sum p\,(e^d - 1 - d) ,

sums of nonnegative terms. Where a row moved little, q - p cancels, and the last form is used (`CLOSE`). The remaining error is
that of d relative to d: float32 logits of size 10 have an error of about 1e-6.

Cost: about two and a half bi-gram sweeps, and a few times top_k rows in float64; for nearly equal models, all rows in
float64: four times as long. Memory: twice `CHUNK_SIZE` rows of logits.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> found = diff(model, model, top_k=5, rows=range(200))
    >>> len(found.rises), len(found.falls), float(found.kl.max())
    (0, 0, 0.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.logit_reader import CHUNK_SIZE, Reader, check_finite, rank, slices
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.results import Result
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.scan import SUM_ERROR
from tl_jets.ngrams.streams import PathInput, TokenIds, read_tokens
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.pairs import ROWS, RowScores
from tl_jets.studies.vocabularies import check_vocabulary, vocabulary_of

Change = Literal["probability", "logprob"]

# Numbers processed at a time: they fit the caches of two cores, or fill an accelerator.
SCRATCH_CPU, SCRATCH_DEVICE = 2**17, 2**25
# Below this KL (nats), q - p is too inexact.
CLOSE = 0.01
# Largest d (nats) for which exp(d) may multiply p, which may have underflowed.
FAR = 1


@dataclass(frozen=True, eq=False, repr=False)
class ModelDiff(Result):
    """The bi-grams that changed most from one model to another.

    Attributes:
        rises: Bi-grams whose probability rose, largest first; parts `before` and `after` are log-probabilities (nats).
        falls: Bi-grams whose probability fell; scores are the size of the fall, largest first.
        first: First tokens that were compared. Shape [row].
        kl: KL(before || after) after each first token, in nats; relative error 1e-4 in float32, a few percent for
            nearly equal models. Shape [row].
    """

    rises: NgramTable
    falls: NgramTable
    first: Int[Tensor, " row"] = field(repr=False)
    kl: Float[Tensor, " row"] = field(repr=False)
    path: str
    fingerprints: tuple[str, str] = field(repr=False)

    def __repr__(self) -> str:
        return (
            f"ModelDiff(path {self.path}; mean KL {float(self.kl.mean()):.4g} nats over {len(self.kl):,} first tokens)\n"
            f"rises: {self.rises!r}\nfalls: {self.falls!r}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Rises, then falls (with negative `change`): bi-gram, change, and both log-probabilities."""
        frames = []
        for table, sign in ((self.rises, 1), (self.falls, -1)):
            frame = table.to_dataframe().rename(columns={"score": "change"})
            frames.append(frame.assign(change=sign * frame["change"]))
        return pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


@torch.no_grad()
def diff(
    a: Any,
    b: Any,
    *,
    path: PathInput = "direct",
    top_k: int = 100,
    change: Change = "probability",
    at_least: float | int = 0,
    rows: TokenIds | None = None,
    progress: bool = True,
) -> ModelDiff:
    """The bi-grams that changed most from model a to model b; unchanged pairs are left out.

    Args:
        a: The model before, or its `ResidualNetwork`.
        b: The model after, with the same vocabulary.
        path: A path of both models, as in `jet_bigrams`.
        top_k: Maximum number of rises, and of falls.
        change: Change of the `"probability"` or of the `"logprob"` (nats; largest where both probabilities are tiny).
        at_least: Minimum probability of a pair in at least one of the models.
        rows: Ids of the first tokens to compare; None for all.
        progress: Show a progress bar in a terminal.

    Raises:
        ValueError: The vocabularies differ, or an option is invalid; see `jet_bigrams`.

    Source: Chen et al., arXiv 2410.06024, section 5.3 (effects of fine-tuning).
    """
    check_integers(1, top_k=top_k)
    check_choice("change", change, get_args(Change))
    if not 0 <= at_least <= 1:
        raise ValueError(f"at_least must be a probability, 0..1; got {at_least}.")
    before, after = RowScores(a, path), RowScores(b, path)
    check_vocabulary(vocabulary_of(before.network), vocabulary_of(after.network))
    first = read_tokens("rows", rows, min(before.n_tokens, after.n_tokens))
    changes = RowChanges(before, after, change=change, at_least=at_least)
    moved = _screened(changes, first, progress)
    movers = _read_exactly(changes, first, moved, top_k, progress)
    settings = {"ngram": "bi-grams that changed", "change": change, "top_k": top_k, "at_least": at_least}
    settings |= {"before": before.fingerprint, "after": after.fingerprint}
    settings |= {"rows": "all" if rows is None else len(first)}
    rises, falls = (
        x.table(after, settings | {"score": name}) for x, name in zip(movers, ("rise", "fall"), strict=True)
    )
    return ModelDiff(rises, falls, first, moved.kl.clamp_min(0), after.path, (before.fingerprint, after.fingerprint))


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, unit="token", delay=1, leave=False, disable=None if progress else True)


def _screened(changes: RowChanges, first: Tensor, progress: bool) -> RowsMoved:
    """Bounds and KL of all rows in float32; infinite for models in float64, whose rows are all read exactly."""
    if any(side.scores.streams.dtype is not torch.float32 for side in changes.sides):
        unknown = torch.full((3, len(first)), math.inf, dtype=torch.float64, device="cpu")
        return RowsMoved(*unknown)
    found = []
    with _bar(len(first), progress) as bar:
        for part in slices(len(first), CHUNK_SIZE):
            found.append(changes.read(first[part]))
            bar.update(len(first[part]))
    return RowsMoved(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _read_exactly(changes: RowChanges, first: Tensor, moved: RowsMoved, top_k: int, progress: bool) -> list[_Movers]:
    """The largest rises and falls; reads rows that may hold one, largest bound first, and fills in infinite KL."""
    movers = [_Movers(top_k), _Movers(top_k)]
    unread = torch.ones(len(first), dtype=torch.bool, device="cpu")
    unknown = moved.kl.isinf()
    with _bar(len(first), progress and bool(unknown.all())) as bar:
        for found, bound in zip(movers, (moved.rise, moved.fall), strict=True):
            for part in bound.argsort(descending=True, stable=True).split(ROWS):
                if not float(bound[part[0]]) > found.least:
                    break
                part = part[unread[part]]
                if not len(part):
                    continue
                unread[part] = False
                before, after, change = changes.exact(first[part])
                movers[0].add(first[part], change, before, after)
                movers[1].add(first[part], change.neg_(), before, after)
                if bool(unknown[part].any()):
                    moved.kl[part] = (before.exp() * (before - after)).sum(1)
                    bar.update(len(part))
    return movers


class _Movers:
    """The top_k pairs with the largest positive changes so far; ties by ids."""

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.ids = torch.empty(0, 2, dtype=torch.long, device="cpu")
        # Change, and log-probabilities before and after.
        self.values = torch.empty(0, 3, dtype=torch.float64, device="cpu")

    @property
    def least(self) -> float:
        """Threshold for a new pair, lowered slightly to keep ties after rounding."""
        return float(self.values[-1, 0]) * (1 - 1e-9) if len(self.values) == self.top_k else 0.0

    def add(self, first: Tensor, *values: Tensor) -> None:
        """Add the changes and log-probabilities [row, d_vocab] of some first tokens."""
        least = self.least
        flat = values[0].flatten()
        if int((flat > least).sum()) > self.top_k:
            least = float(flat.topk(self.top_k).values[-1]) * (1 - 1e-9)
        row, column = ((values[0] > 0) & (values[0] >= least)).nonzero().unbind(1)
        ids = torch.cat([self.ids, torch.stack([first[row], column], dim=1)])
        joined = torch.cat([self.values, torch.stack([x[row, column] for x in values], dim=1)])
        order = rank(ids, joined[:, 0])[: self.top_k]
        self.ids, self.values = ids[order], joined[order]

    def table(self, reader: RowScores, settings: dict[str, Any]) -> NgramTable:
        """The pairs, with the log-probabilities of both models."""
        change, before, after = self.values.T
        return reader.table(self.ids, change, {"before": before, "after": after}, **settings)


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
