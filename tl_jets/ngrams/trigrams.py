r"""Jet skip-trigrams: the tokens a head attends to, from which tokens, and what it writes, over the vocabulary.

Head (l, h), key token z1, query token z2 that stands `distance` places later, output token z3:

.. math::
    \text{score}(z_1, z_2, z_3) = A(z_1 | z_2) + \log P(z_3 | z_1), \qquad
    \log P(z_3 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(OV_h(z_1))\bigr)_{z_3}

with scores s(z2, z1) and writes OV_h(z1) of single tokens, without positional embedding (`tl_jets.ngrams.head_maps`),
and the model's own decoder upsilon. `normalize` chooses A:

- `"vocab"`: log softmax of s(z2, .) over *all* tokens as keys. Terms common to all scores of a query (a key bias b_K,
  an ALiBi slope) cancel, as in the model.
- `"pair"`: log of z2's attention to z1 in a context of these two tokens: s(z2, z1) against s_0(z2, z2).
- `"none"`: s(z2, z1), without ALiBi. *Not* a function of the model: a shift of b_K that changes no output changes it.

**The join.** Given z1, the score is a function of z2 plus one of z3. Sort both, best first. **Lemma**: none of the K
best triples pairs the i-th best z2 with the j-th best z3 of its z1 where i j > K: the pairs of the first i with the
first j are all at least as good (ties by ids). So a z1 has at most K (1 + ln K) candidates, and most have none:

1. *Keys.* One pass over all query-key scores gives each query's log-normalizer and an upper bound of each key's best A,
   in trained heads a tenth of a nat too large (`tl_jets.ngrams.factors`).
2. *Outputs.* The best log P of keys by decreasing bound, until the bound is below the K-th best triple (log P <= 0).
3. *Join.* For keys whose bounds together reach the K-th best: pairs i j <= K above it, from float64 logits.

**Exactness.** Passes 1 and 2 only give bounds, which include the rounding of their products. Joined triples have
rounded normalizers, so more than K are kept and scored again in float64. If the K-th score does not exceed the last
kept one by four times the largest rounding error seen, the search is repeated with twice as many. The table is then
exact for float64 models, and for float32 ones up to the rounding of queries, keys and values (scores to about 1e-6).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), skip-trigrams; Elhage et al. 2021 (QK
and OV circuits). The normalized A, the distance and the exact join are ours.

Cost: at most 2 V^2 d_head multiply-adds a head (a bi-gram sweep has V^2 d_model), and the layer's attention on V
tokens. Memory: queries, keys and values of the heads read at once (at most 512 MB), and 24 V d_head numbers a head.

Example:
    >>> import tl_jets as tj
    >>> table = jet_trigrams(tj.load_tinydocs(), 1, 0, top_k=5)
    >>> table.path, table.n, sorted(table.parts)
    ('L1H0', 3, ['attention', 'log_prob'])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.ngrams.jobs import SUFFIX, Job
from tl_jets.ngrams.join import Normalize
from tl_jets.ngrams.shards import Distributed
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.token_ids import TokenIds
from tl_jets.ngrams.trigram_sweep import TrigramSweep, planned


@overload
def jet_trigrams(
    model: Any,
    layer: int,
    head: int,
    *,
    top_k: int = ...,
    distance: int = ...,
    normalize: Normalize = ...,
    rows: TokenIds | None = ...,
    progress: bool = ...,
    folder: str | Path | None = ...,
    distributed: Distributed = ...,
) -> NgramTable: ...
@overload
def jet_trigrams(
    model: Any,
    layer: int,
    head: Sequence[int] | None = None,
    *,
    top_k: int = ...,
    distance: int = ...,
    normalize: Normalize = ...,
    rows: TokenIds | None = ...,
    progress: bool = ...,
    folder: str | Path | None = ...,
    distributed: Distributed = ...,
) -> dict[int, NgramTable]: ...
@torch.no_grad()
def jet_trigrams(
    model: Any,
    layer: int,
    head: int | Sequence[int] | None = None,
    *,
    top_k: int = 1000,
    distance: int = 1,
    normalize: Normalize = "vocab",
    rows: TokenIds | None = None,
    progress: bool = True,
    folder: str | Path | None = None,
    distributed: Distributed = False,
) -> NgramTable | dict[int, NgramTable]:
    """The best skip-trigrams of heads of one layer, exact over all V^3 triples.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside steps must depend on the token alone; those on
            streams are refused.
        layer: The layer.
        head: A head, for one table; several heads, or None for all, for tables by head.
        top_k: Number of triples a head.
        distance: Places from key to query, for rotary embeddings; ALiBi counts with `"pair"`, learned positions never.
        normalize: `"vocab"`, `"pair"` or `"none"`, see the module.
        rows: Ids of the key tokens; None for all. Attention is always normalized over the whole vocabulary.
        progress: Show a bar in a terminal if the search takes longer than a second.
        folder: Folder for tables `L<layer>H<head>.parquet`. Existing ones are loaded, or refused if they differ.
        distributed: True or a process group, whose processes all make this call and divide the work.

    Returns:
        Triples (key, query, output), best first, ties by ids, in nats; parts `attention` (A) and `log_prob` (log P).

    Raises:
        ValueError: An argument is invalid or differs between processes; a vector is not finite; too many triples tie;
            or a file in `folder` holds another table.
        RuntimeError: Another process failed.
        NotImplementedError: The model's attention is not supported, or the model consists of plain functions.

    Source:
        Chen et al., arXiv 2410.06024, skip-trigrams.

    Cost:
        At most 2 V^2 d_head multiply-adds a head.

    Example:
        >>> import tl_jets as tj
        >>> tables = jet_trigrams(tj.load_tinydocs(), 0, [0, 2], top_k=3, distance=2, rows=range(40, 60))
        >>> [(head, len(table)) for head, table in tables.items()]
        [(0, 3), (2, 3)]
    """
    options = {"top_k": top_k, "distance": distance, "normalize": normalize, "rows": rows, "progress": progress}
    plan = planned(model, layer, head, saves=folder is not None, distributed=distributed, **options)
    found: dict[int, NgramTable] = {}
    if folder is not None:
        files = {index: Path(folder) / f"{plan.path(index)}{SUFFIX}" for index in plan.chosen}
        found |= plan.processes.first(lambda: plan.saved(files))
    for index, table in plan.tables([index for index in plan.chosen if index not in found]):
        found[index] = table
        if folder is not None:
            plan.processes.first(partial(table.save, files[index]))
    return found[head] if isinstance(head, int) else {index: found[index] for index in plan.chosen}


@torch.no_grad()
def trigram_job(model: Any, layer: int, head: int, *, name: str | None = None, **options: Any) -> Job:
    """A job for `tl_jets.ngrams.jobs.sweep` that runs `jet_trigrams` on one head; for heads of many models.

    Heads of one model are cheaper with `jet_trigrams(..., folder=...)`, which evaluates their layer once.

    Args:
        model: A model or a `ResidualNetwork`.
        layer: The layer.
        head: One head.
        name: File name without suffix; by default the path, such as `L1H3`.
        **options: Options of `jet_trigrams`, without `folder`.
    """
    plan = planned(model, layer, [head], saves=True, **options)
    (index,) = plan.chosen

    def run(state: Path | None) -> NgramTable:  # no unfinished state: a head is quick
        ((_, table),) = plan.tables([index])
        return table

    return Job(name or plan.path(index), run, **plan.header(index), processes=plan.processes)


@torch.no_grad()
def trigram_scores(
    model: Any,
    layer: int,
    head: int,
    triples: Sequence[Sequence[int]] | Int[Tensor, "triple 3"],
    *,
    distance: int = 1,
    normalize: Normalize = "vocab",
) -> Float[Tensor, " triple"]:
    """Scores of given skip-trigrams, as in `jet_trigrams`.

    Args:
        model: A model or a `ResidualNetwork`.
        layer: The layer.
        head: The head.
        triples: Ids of key, query and output. Shape [triple, 3].
        distance: See `jet_trigrams`.
        normalize: See `jet_trigrams`.

    Returns:
        Nats, float64. Shape [triple].

    Raises:
        ValueError: See `jet_trigrams`; or `triples` are not ids [triple, 3].

    Cost:
        The layer's attention on V tokens, and V d_head float64 multiply-adds for each distinct query and key.

    Example:
        >>> import tl_jets as tj
        >>> model = tj.load_tinydocs()
        >>> table = jet_trigrams(model, 1, 0, top_k=3)
        >>> bool(torch.allclose(trigram_scores(model, 1, 0, table.ids), table.scores))
        True
    """
    attention, log_prob = trigram_parts(model, layer, head, triples, distance=distance, normalize=normalize)
    return attention + log_prob


@torch.no_grad()
def trigram_parts(
    model: Any,
    layer: int,
    head: int,
    triples: Sequence[Sequence[int]] | Int[Tensor, "triple 3"],
    *,
    distance: int = 1,
    normalize: Normalize = "vocab",
) -> tuple[Float[Tensor, " triple"], Float[Tensor, " triple"]]:
    """A(key | query) and log P(output | key) of given skip-trigrams, the summands of `trigram_scores`, which see.

    Returns:
        Nats, float64. Shape [triple] each.
    """
    plan = TrigramSweep(model, layer, head, distance=distance, normalize=normalize)
    reader = plan.reader
    (index,) = plan.chosen
    ids = torch.as_tensor(triples, device=reader.device)
    sizes = torch.tensor([reader.n_tokens, reader.n_tokens, reader.network.decoder.d_vocab], device=reader.device)
    if ids.ndim != 2 or ids.shape[1] != 3 or ids.is_floating_point() or bool(((ids < 0) | (ids >= sizes)).any()):
        raise ValueError(
            f"triples must be token ids [triple, 3], key, query and output, below {sizes.tolist()}; got shape "
            f"{tuple(ids.shape)}, {ids.dtype}."
        )
    ((_, maps),) = plan.maps([index])
    return maps.exact(ids.long())
