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

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.ngrams.factors import Factors
from tl_jets.ngrams.fingerprints import fingerprint
from tl_jets.ngrams.head_maps import HeadReader, OutputMap
from tl_jets.ngrams.join import NORMALIZES, HeadMaps, Normalize, Search
from tl_jets.ngrams.score_map import ScoreMap
from tl_jets.ngrams.shards import ALONE, Distributed, Processes
from tl_jets.ngrams.token_ids import TokenIds, described, read_tokens
from tl_jets.tables import NgramTable
from tl_jets.tokens import token_names

# Numbers of queries, keys and values that are held at once.
HELD = 2**27


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
        distributed: True, or a process group: all its processes call this with the same model and options, divide the work
            (heads; queries and keys of heads that are left over), and return the same tables. See `tl_jets.ngrams.shards`.

    Returns:
        A table of (key, query, output), best first, ties by ids, in nats; its parts are `attention`, A, and `log_prob`, log P.
        For several heads, tables by head.

    Raises:
        ValueError: There is no such layer, head or token; the distance is outside of the context or of the layer's attention
            window; an option is not one of its values; a vector is not finite; more triples tie up to rounding than are
            held at once; or processes were given different things.
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
    processes = Processes.of(distributed)

    def read() -> _Layer:
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a number of triples, 1 or more; got {top_k!r}.")
        return _Layer(model, layer, distance, normalize, head, rows, top_k)

    layer_maps = processes.agree(read, _Layer.description)
    reader, heads, keys = layer_maps.reader, layer_maps.chosen, layer_maps.keys
    # Heads are divided as long as there is one for each process; the work of each that is left over is divided.
    whole = len(heads) - len(heads) % processes.size
    # A bar counts queries of the first pass and keys of the second.
    total = len(heads) * (reader.n_tokens + len(keys)) // processes.size
    shown = None if progress and processes.rank == 0 else True
    with tqdm(total=total, unit="token", delay=1, leave=False, disable=shown) as bar:

        def search(maps: HeadMaps, among: Processes) -> tuple[Tensor, Tensor, Tensor]:
            return Search(maps, top_k, bar.update, among).run(keys)

        def search_own() -> dict[int, tuple[Tensor, Tensor, Tensor]]:
            own = heads[processes.rank : whole : processes.size]
            return {index: search(maps, ALONE) for index, maps in layer_maps.heads(own)}

        found = {index: best for part in processes.exchange(search_own) for index, best in part.items()}
        rest = processes.agree(lambda: list(layer_maps.heads(heads[whole:])), lambda _: {})
        found |= {index: search(maps, processes) for index, maps in rest}
    tables = {index: layer_maps.table(index, *found[index]) for index in heads}
    return tables[heads[0]] if isinstance(head, int) else tables


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
    layer_maps = _Layer(model, layer, distance, normalize, head)
    reader = layer_maps.reader
    (index,) = layer_maps.chosen
    ids = torch.as_tensor(triples, device=reader.device)
    sizes = torch.tensor([reader.n_tokens, reader.n_tokens, reader.network.decoder.d_vocab], device=reader.device)
    if ids.ndim != 2 or ids.shape[1] != 3 or ids.is_floating_point() or bool(((ids < 0) | (ids >= sizes)).any()):
        raise ValueError(
            f"triples must be token ids [triple, 3], key, query and output, below {sizes.tolist()}; got shape "
            f"{tuple(ids.shape)}, {ids.dtype}."
        )
    ((_, maps),) = layer_maps.heads([index])
    return maps.exact(ids.long())


class _Layer:
    """One layer's heads on the vocabulary, and the options that all of them share."""

    def __init__(
        self,
        model: Any,
        layer: int,
        distance: int,
        normalize: Normalize,
        head: int | Sequence[int] | None,
        rows: TokenIds | None = None,
        top_k: int = 1,
    ):
        if normalize not in NORMALIZES:
            raise ValueError(f"normalize must be one of {NORMALIZES}; got {normalize!r}.")
        self.reader = reader = HeadReader(model, layer)
        self.score_map = reader.scores(distance)
        self.normalize: Normalize = normalize
        self.chosen = _read_heads(head, reader.n_heads)
        self.keys = read_tokens("rows", rows, reader.n_tokens, reader.device)
        self.top_k = top_k
        self.settings = {
            "ngram": "skip-trigram",
            "score": "score" if normalize == "none" else "logprob",
            "top_k": top_k,
            "distance": distance,
            "normalize": normalize,
            "rows": described(self.keys, rows),
            "dtype": str(reader.view.dtype).removeprefix("torch."),
        }

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return fingerprint(self.reader.network)

    def description(self) -> dict[str, Any]:
        """What must be the same in all processes."""
        return {"layer": self.reader.layer, "heads": self.chosen, **self.settings, "model": self.fingerprint}

    def table(self, head: int, ids: Tensor, attention: Tensor, log_prob: Tensor) -> NgramTable:
        """The table of a head's best triples."""
        return NgramTable.ranked(
            ids,
            attention + log_prob,
            names=token_names(self.reader.network.tokenizer, [ids]),
            path=f"L{self.reader.layer}H{head}",
            settings=self.settings,
            fingerprint=self.fingerprint,
            parts={"attention": attention, "log_prob": log_prob},
            top_k=self.top_k,
        )

    def heads(self, heads: Sequence[int]) -> Iterator[tuple[int, HeadMaps]]:
        """The maps of heads, one after another; as many are read at once as `HELD` allows."""
        reader = self.reader
        size = max(1, HELD // (3 * reader.n_tokens * int(reader.view.cfg.d_head)))
        tokens = torch.arange(reader.n_tokens, device=reader.device)
        for group in (list(heads[start : start + size]) for start in range(0, len(heads), size)):
            vectors = reader.vectors(tokens, group)
            for place, head in enumerate(group):
                query, key, value = (x[place] for x in (vectors.query, vectors.key, vectors.value))
                _check_finite(query, key, value)
                yield head, self._maps(head, query, key, value)

    def _maps(self, head: int, query: Tensor, key: Tensor, value: Tensor) -> HeadMaps:
        found: ScoreMap = self.score_map
        cap = None if found.cap is None else found.capped
        own = found.capped((query.double() * found.own_keys(key.double())).sum(1)) - found.bias[head]
        scores = Factors(query, found.keys(key).T.contiguous(), transform=cap)
        output, decoder = OutputMap(self.reader, head), self.reader.network.decoder
        constant = output.constant if bool(output.constant.any()) else None
        outputs = Factors(output.coordinates(value), output.columns, constant, decoder.transform)
        return HeadMaps(scores, outputs, own, self.normalize)


def _read_heads(head: int | Sequence[int] | None, n_heads: int) -> list[int]:
    """Head indices, each once."""
    given = list(range(n_heads)) if head is None else [head] if isinstance(head, int) else list(head)
    if not given or any(isinstance(h, bool) or not isinstance(h, int) or not 0 <= h < n_heads for h in given):
        raise ValueError(f"head must be one of 0..{n_heads - 1}, several of them, or None for all; got {head!r}.")
    return list(dict.fromkeys(given))


def _check_finite(*vectors: Tensor) -> None:
    for tensor in vectors:
        finite = tensor.isfinite().all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"Queries, keys and values must be finite; those of tokens {(~finite).nonzero()[:5, 0].tolist()} are not. Look at "
                "the model's weights, its precision (float16 overflows), and the hooks on it."
            )
