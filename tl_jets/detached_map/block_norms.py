r"""Norms of the rows and columns of one block J_t, by coordinate and by token.

J_t is the part of J from the input at position t to one output position.

============================================  =====================================================================
norm                                          what it says
============================================  =====================================================================
`row_norms`: \|J_t[i, :]\|                    how strongly output coordinate i is written
`column_norms`: \|J_t[:, j]\|                 how strongly input coordinate j is read
`written`: \|w_v' J_t\|                       how strongly the input at t can move the logit of token v
`read`: \|J_t e_v\|                           how much an occurrence of token v at t puts into the output
============================================  =====================================================================

The first two are the paper's: the largest rows are decoded as input directions, the largest columns as output directions. They
depend on the basis of the stream; the last two do not. w_v is the unembedding of v, less the mean over the vocabulary unless
`centered=False`, through the final norm at its own scale. e_v is the embedding of v in the stream.

Source: Golden (arXiv 2505.24293, v3), section 3.2 and figure 2A; the norms by token are ours. Cost: a backward pass for
each of d_model rows, and two products of the vocabulary with J_t, in chunks: d_vocab x d_model^2 multiply-adds each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.linear_map import LinearMap
from tl_jets.core.logit_reader import TopTokens, check_k
from tl_jets.core.results import Result, handle
from tl_jets.core.tokens import token_names
from tl_jets.detached_map.composed_jacobian import LOGITS
from tl_jets.detached_map.decoding import Directions, of_model

# Chunk size over the vocabulary.
TOKENS = 4096


@dataclass(frozen=True, eq=False, repr=False)
class BlockNorms(Result):
    """Norms of the rows and columns of one block J_t, by coordinate and by token.

    A loaded one has no `directions`: rows and columns are not decoded, and tokens are named with a tokenizer.

    Attributes:
        centered: Whether the mean over the vocabulary is subtracted from logits.
        matrix: J_t, before the unembedding.
        written: |w_v' J_t| by token, in logits per unit of the input.
        read: |J_t e_v| by token, in units of the output (logits: their length); None without an embedding.
        own: The input itself at this position.
        directions: Decodes directions at this input.
    """

    wrt: str
    output: str
    pos: int
    out_pos: int
    centered: bool
    matrix: Float[Tensor, "rows d_model"]
    row_norms: Float[Tensor, " rows"]
    column_norms: Float[Tensor, " d_model"]
    written: Float[Tensor, " d_vocab"]
    read: Float[Tensor, " d_vocab"] | None
    own: Float[Tensor, " d_model"]
    directions: Any = handle()

    def __repr__(self) -> str:
        size = list(self.matrix.shape)
        return f"BlockNorms({self.wrt} at {self.pos} -> {self.output} at {self.out_pos}, {size} before the readout)"

    def top_tokens(self, k: int = 10) -> dict[str, TopTokens]:
        """The k tokens with the largest norms: `written`, and `read` if the model has an embedding."""
        check_k(k, len(self.written))
        sides = {"written": self.written} | ({} if self.read is None else {"read": self.read})
        found = {side: norms.topk(k) for side, norms in sides.items()}
        return {side: TopTokens(best.values, best.indices) for side, best in found.items()}

    def top_rows(self, n: int = 8, k: int = 5) -> tuple[Tensor, TopTokens]:
        """The n largest rows [n], in the sign of the prompt's own input, and the k nearest embeddings [n, k] (cosines)."""
        units = self.row_norms.topk(n).indices
        rows = self.matrix[units]
        return units, of_model(self.directions, "Rows as tokens").nearest(_signed(rows, rows @ self.own), k)

    def top_columns(self, n: int = 8, k: int = 5) -> tuple[Tensor, TopTokens]:
        """The n largest columns [n], in the sign of the prompt's input, and the k tokens that each raises most [n, k]."""
        units = self.column_norms.topk(n).indices
        return units, of_model(self.directions, "Columns as tokens").raised(
            _signed(self.matrix[:, units].T, self.own[units]), k
        )

    def to_dataframe(self, tokenizer: Any = None, k: int = 10) -> pd.DataFrame:
        """One row per side and token: side, rank, token_index, token_string, norm, relative (to the median token)."""
        if tokenizer is None and self.directions is not None:
            tokenizer = self.directions.trace.network.tokenizer
        rows = []
        for side, best in self.top_tokens(k).items():
            median = float((self.written if side == "written" or self.read is None else self.read).median())
            names = token_names(tokenizer, [best.indices])
            for rank, (norm, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                row = {"side": side, "rank": rank, "token_index": token, "token_string": names[token], "norm": norm}
                rows.append(row | {"relative": norm / median if median else float("inf")})
        return pd.DataFrame(rows)

    def coordinates(self, tokenizer: Any = None, n: int = 8, k: int = 5) -> pd.DataFrame:
        """The largest rows and columns, decoded: side (row, column), rank, coordinate, norm, top_tokens."""
        rows = []
        for side, norms, (units, best) in (
            ("row", self.row_norms, self.top_rows(n, k)),
            ("column", self.column_norms, self.top_columns(n, k)),
        ):
            texts = self.directions.texts(best.indices, tokenizer)
            for rank, unit in enumerate(units.tolist()):
                here = {"side": side, "rank": rank, "coordinate": unit, "norm": float(norms[unit])}
                rows.append(here | {"top_tokens": texts[rank]})
        return pd.DataFrame(rows)


@torch.no_grad()
def block_norms(
    linear: LinearMap,
    directions: Directions,
    wrt: str,
    *,
    prompt: int,
    pos: int,
    out_pos: int,
    index: int,
    centered: bool,
) -> BlockNorms:
    """The norms of the block from `pos` to `out_pos`, which has the given index among the map's output positions."""
    matrix = linear.block(out_pos=index, pos=pos, prompt=prompt)[:, 0]
    scale = directions.scale([out_pos])[prompt, 0]
    return BlockNorms(
        wrt=wrt,
        output=directions.output,
        pos=pos,
        out_pos=out_pos,
        centered=centered,
        matrix=matrix,
        row_norms=matrix.norm(dim=1),
        column_norms=matrix.norm(dim=0),
        written=_written(directions, matrix, scale, centered),
        read=_read(directions, matrix, centered),
        own=linear.point.detach()[prompt, pos],
        directions=directions,
    )


def _written(directions: Directions, matrix: Tensor, scale: Tensor, centered: bool) -> Tensor:
    """|w_v' J_t| for every token."""
    decoder = directions.decoder
    seen = directions.normalized(matrix.T).T * scale
    mean = torch.stack([columns.sum(1) for _, columns in decoder.columns(matrix.dtype)]).sum(0) / decoder.d_vocab
    shift = mean @ seen if centered else torch.zeros_like(seen[0])
    return torch.cat([(columns.T @ seen - shift).norm(dim=1) for _, columns in decoder.columns(matrix.dtype)])


def _read(directions: Directions, matrix: Tensor, centered: bool) -> Tensor | None:
    """|J_t e_v| for every token; the length of the logits where the output is logits."""
    if not directions.has_embedding:
        return None
    found = []
    for rows in directions.embedding().split(TOKENS):
        image = rows.to(matrix) @ matrix.T
        if directions.output == LOGITS:
            found.append(directions.decoder.metric(centered).norm(image, 0.0).to(matrix.dtype))
        else:
            found.append(image.norm(dim=1))
    return torch.cat(found)


def _signed(rows: Tensor, products: Tensor) -> Tensor:
    return torch.where(products < 0, -1.0, 1.0).to(rows)[:, None] * rows
