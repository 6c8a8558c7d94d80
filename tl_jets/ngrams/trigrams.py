r"""Jet skip-trigrams: which token a head attends to, from which token, and what it then writes, over the whole vocabulary.

Head (l, h), key token z1, query token z2 that stands `distance` places later, output token z3:

.. math::
    \text{score}(z_1, z_2, z_3) = A(z_1 | z_2) + \log P(z_3 | z_1), \qquad
    \log P(z_3 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(OV_h(z_1))\bigr)_{z_3}

with the head's scores s(z2, z1) and writes OV_h(z1) of single tokens, without positional embedding (`tl_jets.ngrams.head_maps`),
and the model's own decoder upsilon. How much z2 looks at z1 is, by `normalize`,

- `"vocab"`: A = log softmax of s(z2, .) over *all* tokens of the vocabulary as keys. What adds the same to all scores of a query
  (a key bias b_K, an ALiBi slope) drops out, as it does in the model;
- `"pair"`: A = log of z2's attention to z1 in a context of these two, itself being the other: s(z2, z1) against s_0(z2, z2);
- `"none"`: A = s(z2, z1), without ALiBi. *Not* a function of the model: a shift of b_K that changes no output changes it.

**The join.** Given z1 the score is a sum of a function of z2 and one of z3. Sort both, best first. **Lemma**: of the K best triples
none pairs the i-th best z2 with the j-th best z3 of its z1 where i j > K. For the i j pairs of the first i with the first j are
all as good or better (ties by ids), and it is one of them, so that at least K others come before it. So a z1 has K (1 + ln K)
candidates, not V^2, and most z1 have none, because their best triple is below the K-th best found so far:

1. *Keys.* One pass over all query-key scores, tile by tile, gives each query's log-normalizer and each key's best A. The pass
   knows a query's normalizer only at its end; it subtracts what it would be for normally distributed scores, and takes off from a
   block of queries what is missing at least: an upper bound of A, in trained heads by a tenth of a nat too large.
2. *Outputs.* Keys by decreasing bound: their best log P, one product of inner dimension d_head. Stop at the first key whose bound
   is below the K-th best triple: log P <= 0.
3. *Join.* Keys whose bounds together reach the K-th best: all their A and log P, from float64 logits and the normalizers of both
   passes, pairs i j <= K above the threshold.

**Exactness.** Passes 1 and 2 run in working precision and only bound, with the rounding of their products added. What is joined
still has their rounded normalizers: more than K triples are kept, and all of them scored again in float64. If the K-th does not
stand above the last one that was kept by four times the largest rounding seen among them, the keys are searched once more for
twice as many; so triples that tie up to rounding are told apart. Ids, order and scores are then those of all V^3 triples for
float64 models; for float32 ones up to the rounding of queries, keys and values themselves (scores to about 1e-6).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), skip-trigrams; Elhage et al. 2021 (QK and OV
circuits). The normalized A, the distance and the exact join are ours.

Cost: 2 V^2 d_head multiply-adds a head at most (a bi-gram sweep has V^2 d_model), and the layer's attention on V tokens. Memory:
queries, keys and values of the heads read at once (512 MB at most), and 24 V d_head numbers of the head at work.

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
    """The best skip-trigrams of heads of one layer: exactly those of all V^3 triples.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside attention and norms are respected if what they do is a function of the
            token; hooks on streams are refused.
        layer: The layer.
        head: A head, several, or None for all of the layer, which share the evaluation of the layer on the vocabulary.
        top_k: How many triples a head.
        distance: How many places the key token is before the query token: what rotary embeddings see. Learned positions are
            left out, and an ALiBi slope counts with `"pair"` only.
        normalize: `"vocab"`, `"pair"` or `"none"`, see the module.
        rows: Ids of the key tokens to look at; None for all. Attention is normalized over the whole vocabulary nevertheless.
        progress: Show a bar in a terminal, if it takes longer than a second.
        folder: Where each head's table is saved as `L<layer>H<head>.parquet` as soon as it is finished. Tables that are there are
            loaded instead (and refused if they are of other settings or another model).
        distributed: True, or a process group: all its processes call this with the same model and options, divide the work
            (heads; queries and keys of heads that are left over), and return the same tables. Files are those of process 0. See
            `tl_jets.ngrams.shards`.

    Returns:
        A table of (key, query, output), best first, ties by ids, in nats; its parts are `attention`, A, and `log_prob`, log P.
        For several heads, tables by head.

    Raises:
        ValueError: There is no such layer, head or token; the distance is outside of the context or of the layer's attention
            window; an option is not one of its values; a vector is not finite; more triples tie up to rounding than are
            held at once; a file in `folder` belongs to something else; or processes were given different things.
        RuntimeError: Another process failed.
        NotImplementedError: The model's attention is not understood (the message says what), or the model is of plain
            functions.

    Source:
        Chen et al., arXiv 2410.06024, skip-trigrams; see the module for what is ours.

    Cost:
        At most 2 V^2 d_head multiply-adds a head. See the module.

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
    """`jet_trigrams` of one head as a job of `tl_jets.ngrams.jobs.sweep`: for heads of many models.

    Heads of one model are cheaper with `jet_trigrams(..., folder=...)`, which evaluates their layer once.

    Args:
        model: A model or a `ResidualNetwork`.
        layer: See `jet_trigrams`.
        head: One head.
        name: Of the file; the path by default, such as `L1H3`.
        **options: Those of `jet_trigrams`, without `folder`.
    """
    plan = planned(model, layer, [head], saves=True, **options)
    (index,) = plan.chosen

    def run(state: Path | None) -> NgramTable:  # a head is quick: it has no unfinished state
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
    """Scores of given skip-trigrams, as `jet_trigrams` has them.

    Args:
        model: A model or a `ResidualNetwork`.
        layer: The layer.
        head: The head.
        triples: Ids of key, query and output. Shape [triple, 3].
        distance: See `jet_trigrams`.
        normalize: See `jet_trigrams`.

    Returns:
        Nats, float64, in the order of `triples`. Shape [triple].

    Raises:
        ValueError: See `jet_trigrams`; or `triples` are not ids [triple, 3].

    Cost:
        The layer's attention on V tokens, and V d_head multiply-adds in float64 for each query and each key among the triples.

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
    """The two summands of `trigram_scores`.

    Args:
        model: See `trigram_scores`, also for the other arguments, errors and cost.
        layer: The layer.
        head: The head.
        triples: Ids of key, query and output. Shape [triple, 3].
        distance: See `jet_trigrams`.
        normalize: See `jet_trigrams`.

    Returns:
        A(key | query) and log P(output | key) in nats, float64, in the order of `triples`. Shape [triple] each.
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
