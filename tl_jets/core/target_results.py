"""`TargetResult`: base of results about target tokens at positions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_jets.core.model_marks import model_mark
from tl_jets.core.results import Result
from tl_jets.core.selection import Rows, positions_at
from tl_jets.core.tokens import token_names
from tl_jets.core.trace import Trace


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TargetResult(Result):
    """Base of results that say something of target tokens at positions of prompts.

    Attributes:
        positions: Positions among each prompt's real tokens (-1 is its last), aligned to the pos axis.
        tokens: Tokens at these positions.
        target_ids: Tokens of the targets.
        target_names: The targets as requested; `<answer>` is the (clean) model's own best token.
        unit: Unit of values: `"logits"`, or `"logits before the softcap"`.
        token_names: Texts of the ids.
        model: Name of the model and a digest of its weights, which `concat` compares; None: not known.
    """

    positions: list[int] | Int[Tensor, "batch pos"]
    tokens: Int[Tensor, "batch pos"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    unit: str
    token_names: dict[int, str]
    model: str | None = None

    def _names(self, tokenizer: Any) -> dict[int, str]:
        """Texts of the result's ids, those of a given tokenizer if there is one."""
        return token_names(tokenizer, [self.tokens, self.target_ids]) if tokenizer else self.token_names

    def _target_text(self, names: Mapping[int, str], batch: int, pos: int, target: int) -> str:
        return names[int(self.target_ids[batch, pos, target])]

    def _table(
        self, axis: str, labels: Sequence[str], values: Mapping[str, Tensor], tokenizer: Any = None
    ) -> pd.DataFrame:
        """One row per label, prompt, position and target: `axis` (the label), batch, pos, token, target, and the values.

        Values are [label, batch, pos, target], or less that broadcasts to the first.
        """
        first = next(iter(values.values()))
        columns = self._index(axis, labels, torch.ones_like(first).nonzero(), tokenizer)
        return pd.DataFrame(columns | {name: own.expand_as(first).flatten().tolist() for name, own in values.items()})

    def _index(
        self, axis: str, labels: Sequence[str], cells: Int[Tensor, "cell 4"], tokenizer: Any = None
    ) -> dict[str, Any]:
        """The first columns of a table: `axis`, batch, pos, token and target of cells (label, batch, pos, target)."""
        names, (i, b, p, t) = self._names(tokenizer), cells.T
        where = zip(b.tolist(), p.tolist(), t.tolist(), strict=True)
        columns = {
            axis: [labels[at] for at in i.tolist()],
            "batch": b.tolist(),
            "pos": positions_at(self.positions, b, p),
        }
        columns |= {"token": [names[token] for token in self.tokens[b, p].tolist()]}
        return columns | {"target": [self._target_text(names, *cell) for cell in where]}


def target_fields(
    trace: Trace,
    rows: Rows,
    ids: Int[Tensor, "batch pos target"],
    names: Sequence[str | int],
    *,
    unit: str | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    named: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """The fields of a `TargetResult` read at `rows` of a trace, with its unit and tokens unless given; `named` are more ids."""
    tokens = rows.at(trace.tokens) if tokens is None else tokens
    return {
        "positions": rows.positions,
        "tokens": tokens,
        "target_ids": ids,
        "target_names": list(names),
        "unit": trace.decoder.unit if unit is None else unit,
        "token_names": token_names(trace.network.tokenizer, [tokens, ids, *named]),
        "model": model_mark(trace.network, trace.recording.hook_state),
    }
