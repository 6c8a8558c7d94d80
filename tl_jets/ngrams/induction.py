r"""Induction tables: A B ... A -> B by a previous-token head and an induction head (K-composition), from the weights.

The current token is A; earlier, A stood before B. A previous-token head (p) has written A into the place of B, an induction
head (i) looks for that write and raises B:

.. math::
    \text{score}(A, B) = \log \mathrm{softmax}_z\bigl(q_i(x_A)^\top M_{\text{distance}}\, k_i(OV_p(x_z))\bigr)_{z = A}
    + \log \mathrm{softmax}\bigl(\upsilon(OV_i(x_B))\bigr)_B

(`attention` and `log_prob`) with x the embedding and the first MLP's write (`stream`), and the maps of
`tl_jets.ngrams.head_maps`: the model's own norms, biases, query and key norms, grouped keys, rotary embedding. Attention is
that among one place after each token of the vocabulary: log 1 = 0 where the head finds no other token's follower, -log V where
it does not tell them apart. `log_prob` is copying.

**What is left out**, and why the table is a sum of two vectors: the previous-token head's attention is taken as 1; of the
place of B the key reads that head's write alone, not B itself nor what other components write there; of other places (the
first one, that of A) there are none; every norm is at its own scale for the stream that it is given here; positions are
left out but for the rotary embedding at one `distance`; the induction head's write is decoded alone. `q_i` and `k_i` with what
else heads may compose with: `jet_trigrams(..., compose={"query": ..., "key": ...})`.

**Exactness.** Normalizers of all tokens in working precision bound both vectors; those of tokens that may be among the K
best (no other is in a K-th best pair) are computed in float64, then joined as in `tl_jets.ngrams.trigrams`. Exact for float64
models, and for float32 ones up to the rounding of queries, keys and values.

Source: Elhage et al. 2021 and Olsson et al. 2022 (induction heads, K-composition); the normalized attention and the exact
join are ours. Cost: 2 V^2 d_head multiply-adds, and two attention layers and the path's MLPs on V tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.logit_reader import LOG2_E
from tl_jets.core.path import ARROW
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.join import best_sums
from tl_jets.ngrams.low_rank_logits import TILE_ROWS, LowRankLogits, log_softmax_at, normalizers
from tl_jets.ngrams.streams import EFFECTIVE, PathInput, TokenIds, described, path_label, read_tokens
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import TrigramSweep

Heads = tuple[int, int]


@torch.no_grad()
def induction_table(
    model: Any,
    previous: Heads,
    induction: Heads,
    *,
    stream: PathInput = EFFECTIVE,
    top_k: int = 1000,
    distance: int = 1,
    rows: TokenIds | None = None,
    columns: TokenIds | None = None,
) -> NgramTable:
    """The best pairs (A, B) for which A B ... A is continued by B through a previous-token head and an induction head.

    Args:
        model: A model or a `ResidualNetwork`.
        previous: Layer and head that attends to the token before; in an earlier layer than `induction`.
        induction: Layer and head that attends to what followed the current token.
        stream: What both heads read of a token, a path of `tl_jets.ngrams.streams`; `"direct"` for bare embeddings.
        top_k: Number of pairs.
        distance: Places from the earlier B to the current token, for rotary embeddings.
        rows: Ids or texts of A; None for all. Attention is normalized over the whole vocabulary in any case.
        columns: Ids or texts of B; None for all.

    Returns:
        Pairs (A, B), best first, ties by ids, in nats; parts `attention` (of A) and `log_prob` (of B).

    Raises:
        ValueError: An argument is invalid, `previous` is not in an earlier layer, or a vector is not finite.
        NotImplementedError: The model's attention is not supported, or the model consists of plain functions.

    Example:
        >>> import tl_jets as tj
        >>> table = induction_table(tj.load_tinydocs(), (0, 1), (2, 3), top_k=5)
        >>> len(table), table.path, sorted(table.parts)
        (5, 'effective > L2H3, query effective, key effective > L0H1', ['attention', 'log_prob'])
    """
    (layer, head), compose = _read_head("induction", induction), induction_paths(previous, stream)
    plan = TrigramSweep(model, layer, head, top_k=top_k, distance=distance, compose=compose)
    ((_, maps),) = plan.maps([head])
    device, tokenizer, d_vocab = plan.reader.device, plan.network.tokenizer, plan.network.decoder.d_vocab
    first = read_tokens("rows", rows, plan.reader.n_tokens, device, tokenizer)
    second = read_tokens("columns", columns, min(plan.reader.n_tokens, d_vocab), device, tokenizer)
    one, attention = _best_own(maps.scores, first, top_k)
    two, log_prob = _best_own(maps.outputs, second, top_k)
    i, j = best_sums(attention, log_prob, top_k)
    ids, parts = torch.stack([one[i], two[j]], 1), {"attention": attention[i], "log_prob": log_prob[j]}
    settings = plan.settings | {"ngram": "induction", "rows": described(first, rows)}
    settings["columns"] = described(second, columns)
    about = plan.header(plan.path(head)) | {"settings": settings, "names": token_names(tokenizer, [ids])}
    return NgramTable.ranked(ids, attention[i] + log_prob[j], parts=parts, top_k=top_k, **about)


def induction_paths(previous: Heads, stream: PathInput = EFFECTIVE) -> dict[str, str]:
    """What an induction head's query, key and value read, for `Compositions`."""
    path = path_label(stream)
    return {"query": path, "key": ARROW.join([path, "L{}H{}".format(*_read_head("previous", previous))]), "value": path}


@full_float32()
def _best_own(
    product: LowRankLogits, tokens: Int[Tensor, " token"], k: int
) -> tuple[Int[Tensor, " best"], Float[Tensor, " best"]]:
    """Tokens whose log-probability of themselves may be among the k largest, and it, in float64."""
    if len(tokens) > k:
        # With normalizers in working precision.
        norms = [
            torch.stack(normalizers(product, product.rows[part], lambda *_: None)).sum(0)
            for part in tokens.split(TILE_ROWS)
        ]
        rough = product.at(tokens, tokens) - torch.cat(norms)[:, 0].double() / LOG2_E
        tokens = tokens[rough >= rough.topk(k).values[-1] - 2 * product.rounding()]
    return tokens, log_softmax_at(product, tokens, tokens)


def _read_head(name: str, head: Heads) -> Heads:
    """A layer and a head."""
    if not isinstance(head, tuple) or [type(x) for x in head] != [int, int]:
        raise ValueError(f"{name} must be a layer and a head, such as (2, 3) for L2H3; got {head!r}.")
    return head
