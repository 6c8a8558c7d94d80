"""Ranks of targets by layer, and the layer from which on they lead, over the positions of many prompts.

Each prompt counts once, by the median over its positions: a few ranks in the ten thousands do not move a median over prompts.
Its 95% interval is that of order statistics, which assumes nothing of the ranks' distribution.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_jets.core.averages import middle
from tl_jets.core.intervals import bootstrap_intervals, median_intervals

# What one row of the table says of a target.
COLUMNS = ("rank_median", "rank_low", "rank_high", "leads", "leads_low", "leads_high")


def leads_from(best: Bool[Tensor, "layer ..."]) -> Bool[Tensor, "layer ..."]:
    """From which layer on a token is best at every layer."""
    return best.flip(0).long().cumprod(0).flip(0).bool()


def trajectory_table(
    index: list[dict[str, Any]],
    ranks: Int[Tensor, "layer order batch pos target"],
    names: list[Any],
    kept: Bool[Tensor, "batch pos"],
    control: Bool[Tensor, "layer order batch pos"] | None,
) -> pd.DataFrame:
    """The table of `IterativeJetLens.trajectories`: a row per entry of `index` (layer and order) and target.

    Args:
        index: The first entries of the rows of each layer and order.
        ranks: Ranks of the targets, 0 for the best token.
        names: Their names.
        kept: Positions that count.
        control: Whether the best token of the random center is the model's.
    """
    if not bool(kept.any()):
        raise ValueError(
            "A trajectory needs a position that is no attention sink; here all are BOS or have outlying streams. Pass "
            "include_sinks=True."
        )
    prompts = kept.any(1).nonzero()[:, 0].tolist()
    units = kept.nonzero()[:, 0]
    found = []
    for own in ranks.unbind(-1):
        by_prompt = torch.stack([middle(own[:, :, i, kept[i]]).flatten() for i in prompts], -1).cpu()
        leads = leads_from(own == 0)[..., kept].flatten(0, 1).double().cpu()
        means = leads.mean(-1), *bootstrap_intervals(leads, units=units.cpu())
        found.append(torch.stack([middle(by_prompt), *median_intervals(by_prompt), *means], -1).tolist())
    shares = None if control is None else leads_from(control)[..., kept].flatten(0, 1).double().mean(-1).tolist()
    rows = []
    for i, cell in enumerate(index):
        for name, values in zip(names, found, strict=True):
            row = {**cell, "target": name, **dict(zip(COLUMNS, values[i], strict=True))}
            rows.append(row if shares is None else row | {"control_leads": shares[i]})
    return pd.DataFrame(rows)
