"""Attention sinks: positions that averages leave out, because their streams are outliers.

Many models give one position, usually the first, a residual stream of a length that others do not have (SmolLM2-135M:
25,000 where others have 200 to 700), on which attention heads rest. What a lens reads there is no prediction, and one
such position can outweigh all others in a mean.

A position counts as a sink here if it is BOS, or if one of its streams between blocks is longer than ten times the
median of that stream over the real tokens of its prompt. Both can be seen in any residual network.

Source: Xiao et al., arXiv 2309.17453 (attention sinks); Sun et al., arXiv 2402.17762 (massive activations).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from tl_jets.core.results import Result
from tl_jets.core.selection import Rows
from tl_jets.core.trace import Trace

# A stream is outlying if it is longer than so many times the median over its prompt.
OUTLYING = 10.0


@dataclass(frozen=True, eq=False)
class Sinks(Result):
    """Positions that averages leave out [batch, pos]; False at padding.

    Attributes:
        bos: The first real token of a prompt, if it is the tokenizer's BOS.
        outlying: Positions with a stream longer than ten times its median over the prompt.
    """

    bos: Bool[Tensor, "batch pos"]
    outlying: Bool[Tensor, "batch pos"]

    @classmethod
    def of(cls, trace: Trace, rows: Rows) -> Sinks:
        """The sinks among the selected positions; medians are of whole prompts, whatever is selected."""
        if "sinks" not in trace.memo:
            trace.memo["sinks"] = _bos(trace), _outlying(trace)
        return cls(*(rows.at(mask) & rows.keep for mask in trace.memo["sinks"]))

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """All of them."""
        return self.bos | self.outlying

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sink: batch, index (along the pos axis), bos, outlying."""
        b, p = self.mask.nonzero().T
        columns = {"batch": b, "index": p, "bos": self.bos[b, p], "outlying": self.outlying[b, p]}
        return pd.DataFrame({name: values.tolist() for name, values in columns.items()})

    def said(self, valid: Bool[Tensor, "batch pos"]) -> str:
        """How many positions averages leave out, and why; empty if none."""
        bos, both, longer = (int(each.sum()) for each in (self.bos, self.mask, self.mask & ~self.bos))
        why = [*([f"{bos} BOS"] if bos else []), *([f"{longer} with outlying streams"] if longer else [])]
        return f"averages leave out {both} of {int(valid.sum())} positions: {', '.join(why)}" if both else ""


def _bos(trace: Trace) -> Bool[Tensor, "batch length"]:
    """The first real tokens that are BOS."""
    bos = getattr(trace.network.tokenizer, "bos_token_id", None)
    first = trace.valid & (trace.valid.cumsum(1) == 1)
    return first & (trace.tokens == bos) if isinstance(bos, int) else torch.zeros_like(first)


def _outlying(trace: Trace) -> Bool[Tensor, "batch length"]:
    """Real tokens with a stream that is longer than ten times its median over the prompt."""
    found = torch.zeros_like(trace.valid)
    for label in trace.network.streams:
        if not label.endswith("_mid"):
            lengths = trace[label].float().norm(dim=-1).masked_fill(~trace.valid, float("nan"))
            found |= lengths > OUTLYING * lengths.nanmedian(1, keepdim=True).values
    return found
