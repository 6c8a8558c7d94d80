"""Averages over the positions of all prompts, without attention sinks (`tl_jets.core.sinks`), as a table.

Example:
    >>> values = torch.tensor([[[1.0, 2.0, 90.0]], [[3.0, 5.0, 70.0]]])  # [cell, batch, pos]
    >>> averages([{"layer": "0_pre"}, {"layer": "1_pre"}], {"kl": values}, torch.tensor([[True, True, False]])).values.tolist()
    [['0_pre', 1.5], ['1_pre', 4.0]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_jets.core.intervals import bootstrap_intervals
from tl_jets.core.sinks import Sinks

# What `spread=True` puts beside the mean of a column.
SPREAD = ("median", "low", "high")


class Averaged:
    """Base of results with values by position, whose `average` leaves out attention sinks."""

    tokens: Tensor
    sinks: Sinks | None

    def average(
        self, *, group_by: Sequence[Any] | None = None, include_sinks: bool = False, spread: bool = False
    ) -> pd.DataFrame:
        """One row per layer and order, component, part or ablation: means over the positions of all prompts.

        Args:
            group_by: A label per prompt; means are then over each group's prompts, named in the first column, `group`.
            include_sinks: Whether BOS and positions of outlying streams (`sinks`) count, too.
            spread: Whether each mean is followed by `<name>_median`, and by `<name>_low` and `<name>_high`, the 95%
                bootstrap interval of the mean over prompts (NaN for a single one).

        Raises:
            ValueError: `group_by` is not one label per prompt, or a group has no positions but sinks.
        """
        index, columns = self._columns()
        kept = self._valid if include_sinks or self.sinks is None else self._valid & ~self.sinks.mask
        return averages(index, columns, kept, group_by=group_by, spread=spread)

    @property
    def counted(self) -> Bool[Tensor, "batch pos"]:
        """Real positions that are no attention sinks; all real ones if nothing else is there."""
        kept = self._valid if self.sinks is None else self._valid & ~self.sinks.mask
        return kept if bool(kept.any()) else self._valid

    @property
    def only_sinks(self) -> bool:
        """Whether all real positions are attention sinks, so that `average` needs `include_sinks=True`."""
        return self.sinks is not None and bool((self.counted & self.sinks.mask).any())

    @property
    def _valid(self) -> Bool[Tensor, "batch pos"]:
        return getattr(self, "valid", torch.ones_like(self.tokens, dtype=torch.bool))

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The first entries of every row, and the values [*rows, batch, pos] by name."""
        raise NotImplementedError

    def _left_out(self) -> str:
        """What a repr says of sinks: empty if nothing is left out."""
        said = "" if self.sinks is None else self.sinks.said(self._valid)
        return said and f"; {said}"


def averages(
    index: Sequence[Mapping[str, Any]],
    columns: Mapping[str, Tensor],
    kept: Bool[Tensor, "batch pos"],
    *,
    group_by: Sequence[Any] | None = None,
    spread: bool = False,
) -> pd.DataFrame:
    """The table of `Averaged.average`: one row per group and cell, averaged over the `kept` positions.

    Args:
        index: The first entries of each cell's row.
        columns: Values [*cells, batch, pos] by name; the cells in the order of `index`.
        kept: Positions that count.
        group_by: As in `average`.
        spread: As in `average`.
    """
    groups = [None] * len(kept) if group_by is None else list(group_by)
    if len(groups) != len(kept):
        raise ValueError(f"group_by must be one label per prompt, {len(kept)} here; got {len(groups)}.")
    rows = []
    for group in dict.fromkeys(groups):
        chosen = kept & torch.tensor([own == group for own in groups], device=kept.device)[:, None]
        if not bool(chosen.any()):
            raise ValueError(
                "An average needs a position that is no attention sink; here all are BOS or have outlying streams. Pass "
                "include_sinks=True."
            )
        named = {} if group_by is None else {"group": group}
        found = {name: _averaged(values, chosen, spread) for name, values in columns.items()}
        flat = {f"{name}{key}": value for name, every in found.items() for key, value in every.items()}
        rows += [{**named, **cell, **{name: v[i] for name, v in flat.items()}} for i, cell in enumerate(index)]
    return pd.DataFrame(rows)


def _averaged(values: Tensor, chosen: Bool[Tensor, "batch pos"], spread: bool) -> dict[str, list[float]]:
    """Mean of every cell under the name "", with median and interval under their suffixes."""
    taken = values[..., chosen].reshape(-1, int(chosen.sum()))
    found = {"": taken.nanmean(-1)}
    if spread:
        low, high = bootstrap_intervals(taken.cpu(), units=chosen.nonzero()[:, 0].cpu())
        found |= {f"_{name}": value for name, value in zip(SPREAD, (middle(taken), low, high), strict=True)}
    return {name: value.tolist() for name, value in found.items()}


def middle(values: Tensor) -> Tensor:
    """The median over the last axis without NaN; of an even number of values the mean of the middle two."""
    if not values.numel():
        return values.new_zeros(values.shape[:-1])
    values = values.double()  # nanmedian takes the lower one of the middle two, and quantile no more than 2^24 values
    return (values.nanmedian(-1).values - (-values).nanmedian(-1).values) / 2
