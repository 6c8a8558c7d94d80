"""What an iterative lens says in words: whether its readings beat their controls, converge, and have the answer.

A layer says something of its own at an order if its KL to the model is below that of nine in ten random controls, each of
the layer's length and angle to the final stream, and in the median by a fifth. Below the median by a fifth, but not below
nine in ten, it is undecided. Controls are compared at every position (without attention sinks) and for every draw; one draw
scatters by tens of percent: fewer than five are not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_jets.core.averages import middle
from tl_jets.core.protocol import FINAL_STREAM
from tl_jets.core.results import Result

# A layer's KL must be below this share of its controls, and this factor of theirs in the median; of so many at least.
SHARE, FACTOR, ENOUGH = 0.9, 0.8, 5
# Ranges of layers that a sentence names.
MOST_RANGES = 3


@dataclass(frozen=True, eq=False, repr=False)
class Verdict(Result):
    """The judgment of an iterative lens, by layer; without the final stream, which is the model.

    Attributes:
        labels: The layers.
        orders: The orders of the lens.
        is_detached: Whether the lens is detached; its only order then has no series.
        rho: Medians over positions; a series converges below 1; NaN if detached.
        wins: Share of controls whose KL is above the layer's; None without measures or controls.
        ratio: Median KL of the layer over that of its controls; None without.
        leads: Share of positions at which the best token of the lowest order is the model's.
        n_controls: Number of comparisons by layer: positions times draws.
        is_whole: Whether all layers were read; a sentence on some of them says so.
    """

    labels: list[str]
    orders: list[int]
    is_detached: bool
    rho: Float[Tensor, " layer"]
    wins: Float[Tensor, "layer order"] | None
    ratio: Float[Tensor, "layer order"] | None
    leads: Float[Tensor, " layer"]
    n_controls: int
    is_whole: bool = True

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    @property
    def own(self) -> Bool[Tensor, "layer order"] | None:
        """Where a layer says something of its own; None if that cannot be judged."""
        if self.wins is None or self.ratio is None or self.n_controls < ENOUGH:
            return None
        return (self.wins >= SHARE) & (self.ratio <= FACTOR)

    @property
    def undecided(self) -> Bool[Tensor, "layer order"] | None:
        """Where a layer is nearer to the model than the median of its controls, by a fifth, but not than nine in ten."""
        return None if self.own is None or self.ratio is None else (self.ratio <= FACTOR) & ~self.own

    @property
    def lines(self) -> list[str]:
        """The judgment in words, what speaks against the lens first."""
        if not self.labels:
            return ["Only the final stream was read: it is the model itself."]
        found = [self._order(-1)]
        if len(self.orders) > 1:
            found.append(self._order(0))
        found[-1] = f"{found[-1][:-1]}; {self._lead()}."
        return found

    def _order(self, k: int) -> str:
        """A sentence on the k-th order."""
        order = self.orders[k]
        name = "The detached reading" if self.is_detached else f"Order {order}{'' if order else ' (the logit lens)'}"
        text = f"{name} {self._control(k)}"
        diverges = (self.rho >= 1).tolist() if order else []
        if any(diverges):
            text += f"; its series diverges at {_where(self.labels, diverges)}"
        return f"{text}."

    def _control(self, k: int) -> str:
        """How an order compares with its controls."""
        if self.wins is None:
            return "was run without a control: it is no evidence about a layer"
        if self.own is None:
            return (
                f"is not judged: {self.n_controls} draw{'s' if self.n_controls > 1 else ''} of its control, and a draw "
                f"scatters by tens of percent"
            )
        own = self.own[:, k].tolist()
        first = own.index(True) if any(own) else len(own)
        if first < len(own) and not all(own[first:]):
            return f"beats its control at {_where(self.labels, own)}, not elsewhere"
        if first == 0:
            return "beats its control at every layer" + ("" if self.is_whole else " read")
        read = "" if self.is_whole else " read"
        where = f"at any layer{read}" if first == len(own) else f"before {self.labels[first]}"
        certain = "" if self.undecided is None or not self.undecided[:first, k].any() else " certain"
        return f"says nothing{certain} of its own {where}: {self._nearest(k, first)}"

    def _nearest(self, k: int, end: int) -> str:
        """How far the undecided ones of the first layers are from their controls."""
        assert self.undecided is not None
        assert self.ratio is not None
        assert self.wins is not None
        chosen = self.undecided[:end, k]
        if not chosen.any():
            return "the control is as good"
        best = int(torch.where(chosen, self.ratio[:end, k], torch.inf).argmin())
        return (
            f"best at {self.labels[best]}, KL {float(self.ratio[best, k]):.2f} of the median control's, below "
            f"{float(self.wins[best, k]):.0%} of draws"
        )

    def _lead(self) -> str:
        """Where the best token of the lowest order is the model's."""
        leads = (self.leads > 0.5).tolist()
        mixed = bool(((self.leads > 0) & (self.leads < 1)).any())
        most = " at most positions" if mixed else ""
        if not any(leads):
            return f"the answer leads{most} at " + ("the end only" if self.is_whole else "none of the layers read")
        first = leads.index(True)
        if all(leads[first:]):
            return f"the answer first leads{most} at {self.labels[first]}, and from there on"
        return f"the answer first leads{most} at {self.labels[first]}, in all at {_where(self.labels, leads)}"


def verdict_of(
    labels: list[str],
    orders: list[int],
    *,
    rho: Float[Tensor, "layer cell"],
    leads: Bool[Tensor, "layer cell"],
    kl: Float[Tensor, "layer order cell"] | None,
    controls: Sequence[Float[Tensor, "layer order cell"]],
    is_detached: bool,
) -> Verdict:
    """The verdict on some cells of a lens; `controls` are draws of the control's KL."""
    shown = [i for i, label in enumerate(labels) if label != FINAL_STREAM]
    wins = ratio = None
    blocks = {label.split("_")[0] for label in labels} - {FINAL_STREAM.split("_")[0]}
    is_whole = FINAL_STREAM in labels and blocks == {str(i) for i in range(len(blocks))}
    if kl is not None and controls:
        draws = torch.stack(list(controls), -1)[shown]
        wins = (kl[shown][..., None] < draws).double().mean((-2, -1))
        ratio = middle(kl[shown]) / middle(draws.flatten(-2))
    return Verdict(
        labels=[labels[i] for i in shown],
        orders=orders,
        is_detached=is_detached,
        rho=middle(rho[shown]),
        wins=wins,
        ratio=ratio,
        leads=leads[shown].double().mean(-1),
        n_controls=len(controls) * rho.shape[-1],
        is_whole=is_whole,
    )


def changing(values: Float[Tensor, "layer order"], best: Sequence[Sequence[int]], most: int) -> list[int]:
    """Indices of at most `most` layers where something changes: the first, the last two, and the largest steps.

    A step is the change of the logarithm of a measure, plus one for each order whose best token changes.
    """
    n = len(best)
    if n <= most:
        return list(range(n))
    logs = values.double().clamp_min(1e-3).log()
    steps = [float("inf")]
    steps += [
        float((logs[i] - logs[i - 1]).abs().sum()) + sum(a != b for a, b in zip(best[i], best[i - 1], strict=True))
        for i in range(1, n)
    ]
    steps[-1] = steps[-2] = float("inf")
    return sorted(sorted(range(n), key=lambda i: -steps[i])[:most])


def _where(labels: list[str], chosen: list[bool]) -> str:
    """Number of the chosen layers, and their ranges."""
    ranges: list[list[int]] = []
    for i in (i for i, own in enumerate(chosen) if own):
        if ranges and ranges[-1][1] == i - 1:
            ranges[-1][1] = i
        else:
            ranges.append([i, i])
    named = [labels[a] if a == b else f"{labels[a]}..{labels[b]}" for a, b in ranges]
    more = ", ..." if len(named) > MOST_RANGES else ""
    return f"{sum(chosen)} of {len(labels)} layers ({', '.join(named[:MOST_RANGES])}{more})"
