"""The table that circuitsvis' views are drawn from: values by token of a prompt."""

from __future__ import annotations

from typing import Any

import pandas as pd

from tl_jets.flows import Flow


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


def is_number(column: pd.Series) -> bool:
    """Whether a column of such a table can be drawn."""
    return pd.api.types.is_numeric_dtype(column) and column.name not in ("rank", "token_index")
