"""The table that circuitsvis' views are drawn from: values by token of a prompt."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from tl_jets.core.options import check_choice
from tl_jets.core.selection import ANSWER, positions_at
from tl_jets.flows import Flow

# What the rows of one token are told apart by, in tables of results: the first column that is there.
SERIES = ("layer", "center", "component", "path", "length", "source", "out_pos", "step")
# What is drawn if no measure is named: the first column that is there.
DEFAULT_MEASURES = ("effect", "share", "kl", "logit", "norm")


def values_by_token(result: Any) -> pd.DataFrame:
    """A result's own table; of a flow, that by the position of the write; an empty one if there is none."""
    if isinstance(result, Flow):
        return _of_flow(result)
    return result.to_dataframe() if hasattr(result, "to_dataframe") else pd.DataFrame()


def _of_flow(flow: Flow) -> pd.DataFrame:
    if flow.effect.shape[1] > 1 or not bool(flow.closed.all()):
        raise ValueError(
            f"A flow is drawn by the position of its writes, where it is closed, and read at one position; here "
            f"{int((~flow.closed).sum())} effects are open, and {flow.effect.shape[1]} positions are read. Read one at a time, "
            f"with nodes='auto'."
        )
    return flow.by_position_dataframe().drop(columns=["pos", "closed"]).rename(columns={"write_pos": "pos"})


def sink_places(result: Any, prompt: int) -> set[int]:
    """Positions of a prompt's attention sinks, as such a table counts them; none where the result does not know."""
    if isinstance(result, Flow):
        if result.prompt_sinks is None or result.prompt_tokens is None:
            return set()
        real = result.prompt_tokens[prompt, 0] >= 0
        return set(result.prompt_sinks[prompt, 0][real].nonzero().flatten().tolist())
    sinks, positions = getattr(result, "sinks", None), getattr(result, "positions", None)
    if sinks is None or positions is None:
        return set()
    mask = sinks if isinstance(sinks, torch.Tensor) else sinks.mask
    if mask.ndim != 2:  # a cut cache
        return set()
    cells = mask[prompt].nonzero().flatten()
    return set(positions_at(positions, torch.full_like(cells, prompt), cells))


def is_number(column: pd.Series) -> bool:
    """Whether a column of such a table can be drawn."""
    return pd.api.types.is_numeric_dtype(column) and column.name not in ("rank", "token_index")


def series_table(
    result: Any, measure: str | None, labels: Any, order: int | None, target: str | int | None, prompt: int
) -> tuple[pd.DataFrame, str, str, str]:
    """The values [series, (pos, token)] of one measure and prompt; the names of series and measure; the rest in words."""
    found: Any = values_by_token(result)
    series = next((name for name in SERIES if name in found), None)
    if series is None or "token" not in found or "pos" not in found:
        raise TypeError(
            f"A circuitsvis view needs a result with values by token: a lens, path statistics, a JetCache, or a detached "
            f"Jacobian; got {type(result).__name__}."
        )
    after_token = list(found.columns)[list(found.columns).index("token") + 1 :]
    numbers = [name for name in after_token if is_number(found[name])]
    drawn = next((name for name in DEFAULT_MEASURES if name in numbers), numbers[0]) if measure is None else measure
    check_choice("measure", drawn, numbers)
    if "rank" in found:
        found = found[found["rank"] == 0]
    about = ""
    for name, wanted in (("order", order), ("target", target)):
        if name not in found:
            if wanted is not None:
                raise ValueError(f"This result has no {name}s; got {name}={wanted!r}. Leave it out.")
            continue
        # The answer as a target is another token at each position: targets are told apart by their place.
        there = sorted(set(found["order"])) if name == "order" else list(result.target_names)
        wanted = there[-1 if name == "order" else 0] if wanted is None else wanted
        check_choice(name, wanted, there)
        place = found["order"] if name == "order" else found.groupby([series, "batch", "pos"], sort=False).cumcount()
        found = found[place == (wanted if name == "order" else there.index(wanted))]
        if name == "order" or drawn == "effect":
            about += f", {name} " + ("the model's own best token" if wanted == ANSWER else str(wanted))
    check_choice("prompt", prompt, sorted(set(found["batch"])))
    found = found[(found["batch"] == prompt) & found["pos"].notna()]
    found = found.assign(place=list(zip(found["pos"].astype(int), found["token"], strict=True)))
    table = found.pivot(index=series, columns="place", values=drawn)
    table = table.reindex(list(dict.fromkeys(found[series])))[sorted(table.columns)]
    if labels is not None:
        wanted_labels = [labels] if isinstance(labels, str | int) else list(labels)
        for label in wanted_labels:
            check_choice("labels", label, list(table.index))
        table = table.loc[wanted_labels]
    return table, series, drawn, about
