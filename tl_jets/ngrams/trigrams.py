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
first j are all at least as good (ties by ids).

1. *Keys.* One pass over all query-key scores gives each query's log-normalizer and an upper bound of each key's best A.
2. *Outputs.* The best log P of keys by decreasing bound, until the bound is below the K-th best triple (log P <= 0).
3. *Join.* For keys whose bounds together reach the K-th best: pairs i j <= K above it, from float64 logits.

**Compositions.** `compose` puts paths before the head's query, key and value, and after its output: virtual attention
heads, MLPs before and after a head (`tl_jets.ngrams.compositions`). `tl_jets.ngrams.induction` joins a previous-token head.

**Exactness.** The bounds include the rounding of their products. Joined triples have rounded normalizers, so more than
K are kept and scored again in float64; if the K-th score does not exceed the last kept one by four times the largest
rounding error seen, the search is repeated with twice as many. The table is exact for float64 models, and for float32
ones up to the rounding of queries, keys and values (scores to about 1e-6).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), skip-trigrams; Elhage et al. 2021 (QK
and OV circuits). The normalized A, the distance and the exact join are ours. Cost: at most 2 V^2 d_head multiply-adds a
head (with an `"output"`, d_head + d_model for 2 d_head), and the layer's attention on V tokens. Memory: at most 512 MB of
queries, keys and values, and 24 V d_head numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.free_memory import check_fits
from tl_jets.core.logit_reader import check_finite
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.processes import ALONE, Distributed, Processes
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.compositions import OUTPUT, Compose, Compositions
from tl_jets.ngrams.head_maps import HeadReader, decoded_writes
from tl_jets.ngrams.jobs import Job, Sweep, say_how_long
from tl_jets.ngrams.join import NORMALIZES, HeadMaps, Normalize, Search
from tl_jets.ngrams.low_rank_logits import LowRankLogits
from tl_jets.ngrams.streams import TokenIds, described, read_tokens
from tl_jets.ngrams.tables import NgramTable

# Elements of queries, keys and values held at once.
HELD = 2**27
# Bytes of a triple during the search, and in a table.
TRIPLE_BYTES, TABLE_BYTES = 600, 48


if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class TrigramOptions(TypedDict, total=False):
        """Options of `jet_trigrams`."""

        top_k: int
        distance: int
        normalize: Normalize
        compose: Compose | None
        rows: TokenIds | None
        progress: bool
        folder: str | Path | None
        distributed: Distributed


@overload
def jet_trigrams(model: Any, layer: int, head: int, **options: Unpack[TrigramOptions]) -> NgramTable: ...
@overload
def jet_trigrams(
    model: Any, layer: int, head: Sequence[int] | None = None, **options: Unpack[TrigramOptions]
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
    compose: Compose | None = None,
    rows: TokenIds | None = None,
    progress: bool = True,
    folder: str | Path | None = None,
    distributed: Distributed = False,
) -> NgramTable | dict[int, NgramTable]:
    """The best skip-trigrams of heads of one layer, exact over all V^3 triples.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside steps must depend on the token alone; those on streams are refused.
        layer: The layer.
        head: A head, for one table; several heads, or None for all, for tables by head.
        top_k: Number of triples a head.
        distance: Places from key to query, for rotary embeddings; ALiBi counts with `"pair"`, learned positions never.
        normalize: `"vocab"`, `"pair"` or `"none"`, see the module.
        compose: Paths before the head by role (`{"key": "L0H1"}`) and after it (`"output"`), or one for query, key and value.
        rows: Ids or texts of the key tokens; None for all. Attention is always normalized over the whole vocabulary.
        progress: Show a bar in a terminal after a second, and say after the first chunk how long a long search will take.
        folder: Folder for tables `L<layer>H<head>.parquet`. Existing ones are loaded, or refused if they differ.
        distributed: True or a process group, whose processes all make this call and divide the work.

    Returns:
        Triples (key, query, output), best first, ties by ids, in nats; parts `attention` (A) and `log_prob` (log P).

    Raises:
        ValueError: An argument is invalid or differs between processes; a vector is not finite; too many triples tie;
            or a file in `folder` holds another table.
        RuntimeError: Another process failed.
        NotImplementedError: The model's attention is not supported, or the model consists of plain functions.

    Example:
        >>> import tl_jets as tj
        >>> tables = jet_trigrams(tj.load_tinydocs(), 0, [0, 2], top_k=3, distance=2, rows=range(40, 60))
        >>> [(head, len(table), sorted(table.parts)) for head, table in tables.items()]
        [(0, 3, ['attention', 'log_prob']), (2, 3, ['attention', 'log_prob'])]
    """
    options = {"top_k": top_k, "distance": distance, "normalize": normalize, "rows": rows, "progress": progress}
    options["compose"] = compose
    plan = TrigramSweep.planned(model, layer, head, saves=folder is not None, distributed=distributed, **options)
    paths = {index: plan.path(index) for index in plan.chosen}
    found = {} if folder is None else plan.load(folder, paths.values())
    for table in plan.tables([index for index, path in paths.items() if path not in found]):
        found[table.path] = table
        if folder is not None:
            plan.save(folder, [table])
    return found[paths[head]] if isinstance(head, int) else {index: found[path] for index, path in paths.items()}


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
    plan = TrigramSweep.planned(model, layer, [head], saves=True, **options)
    (index,) = plan.chosen

    def run(state: Path | None) -> NgramTable:  # no unfinished state: a head is quick
        (table,) = plan.tables([index])
        return table

    return Job(name or plan.path(index), run, **plan.header(plan.path(index)), processes=plan.processes)


@torch.no_grad()
def trigram_scores(
    model: Any,
    layer: int,
    head: int,
    triples: Sequence[Sequence[int]] | Int[Tensor, "triple 3"],
    *,
    distance: int = 1,
    normalize: Normalize = "vocab",
    compose: Compose | None = None,
) -> Float[Tensor, " triple"]:
    """Scores of given skip-trigrams, as in `jet_trigrams`: nats, float64. Shape [triple].

    Args:
        model: A model or a `ResidualNetwork`.
        layer: The layer.
        head: The head.
        triples: Ids of key, query and output. Shape [triple, 3].
        distance: See `jet_trigrams`, also for the errors.
        normalize: See `jet_trigrams`.
        compose: See `jet_trigrams`.

    Raises:
        ValueError: `triples` are not ids [triple, 3].

    Cost: the layer's attention on V tokens, and V d_head float64 multiply-adds for each distinct query and key.

    Example:
        >>> import tl_jets as tj
        >>> table = jet_trigrams(tj.load_tinydocs(), 1, 0, top_k=3)
        >>> bool(torch.allclose(trigram_scores(tj.load_tinydocs(), 1, 0, table.ids), table.scores))
        True
    """
    options = {"distance": distance, "normalize": normalize, "compose": compose}
    attention, log_prob = trigram_parts(model, layer, head, triples, **options)
    return attention + log_prob


@torch.no_grad()
def trigram_parts(
    model: Any, layer: int, head: int, triples: Sequence[Sequence[int]] | Int[Tensor, "triple 3"], **options: Any
) -> tuple[Float[Tensor, " triple"], Float[Tensor, " triple"]]:
    """A(key | query) and log P(output | key) of given skip-trigrams, the summands of `trigram_scores`; float64."""
    plan = TrigramSweep(model, layer, head, **options)
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


class TrigramSweep(Sweep):
    """A sweep over heads of one layer, with checked options."""

    def __init__(
        self,
        model: Any,
        layer: int,
        head: int | Sequence[int] | None,
        *,
        top_k: int = 1000,
        distance: int = 1,
        normalize: Normalize = "vocab",
        compose: Compose | None = None,
        rows: TokenIds | None = None,
        progress: bool = True,
        processes: Processes = ALONE,
    ):
        check_integers(1, top_k=top_k)
        check_choice("normalize", normalize, NORMALIZES)
        self.compose, reader = Compositions.of(compose), HeadReader(model, layer)
        self.network, self.chosen = reader.network, _read_heads(head, reader.n_heads)
        if self.compose.paths:
            reader = self.compose.reader(self.network, layer, self.chosen)
        self.reader = reader
        self.qk_scores = reader.scores(distance)
        self.normalize: Normalize = normalize
        self.keys = read_tokens("rows", rows, reader.n_tokens, reader.device, reader.network.tokenizer)
        self.top_k, self.progress, self.processes = top_k, progress, processes
        # At most the number of all triples.
        self.held = min(top_k, len(self.keys) * reader.n_tokens * reader.network.decoder.d_vocab)
        n_heads = len(self.chosen)
        what = f"The {self.held:,} best skip-trigrams of {n_heads} {'head' if n_heads == 1 else 'heads'}"
        bytes_held = self.held * (TRIPLE_BYTES + TABLE_BYTES * n_heads)
        check_fits(bytes_held, what, "Take a smaller top_k, or fewer heads at a time.")
        self.settings: dict[str, Any] = {
            "ngram": "skip-trigram",
            "score": "score" if normalize == "none" else "logprob",
            "top_k": top_k,
            "distance": distance,
            "normalize": normalize,
            "rows": described(self.keys, rows),
            "dtype": str(reader.view.dtype).removeprefix("torch."),
        }
        # Only where it is used, so that older tables are still of the same settings.
        self.settings |= {"compose": self.compose.paths} if self.compose.paths else {}

    def description(self) -> dict[str, Any]:
        """Options and model, which must be equal in all processes."""
        return super().description() | {"layer": self.reader.layer, "heads": self.chosen}

    def path(self, head: int) -> str:
        """The path of a head's table."""
        return self.compose.label(self.reader.layer, head)

    @torch.no_grad()
    def tables(self, heads: Sequence[int]) -> Iterator[NgramTable]:
        """Tables of heads as they are finished; as many heads at a time as there are processes."""
        processes, n_tokens = self.processes, self.reader.n_tokens
        # The processes divide the work of each left-over head.
        whole = len(heads) - len(heads) % processes.size
        # The bar counts queries of the first pass and keys of the second.
        total = len(heads) * (n_tokens + len(self.keys)) // processes.size
        shown = None if self.progress and processes.rank == 0 else True
        with tqdm(total=total, unit="token", delay=1, leave=False, disable=shown) as bar:
            own = self.maps(heads[processes.rank : whole : processes.size])
            is_said = shown is not None

            def search(maps: HeadMaps, among: Processes) -> tuple[Tensor, Tensor, Tensor]:
                began = time.monotonic()

                def advance(count: int) -> None:
                    nonlocal is_said
                    bar.update(count)
                    if not is_said:
                        is_said = True
                        what = (
                            self.path(heads[0])
                            if len(heads) == 1
                            else f"{len(heads)} heads of layer {self.reader.layer}"
                        )
                        say_how_long(what, (time.monotonic() - began) / count * (total - count))

                return Search(maps, self.held, advance, among).run(self.keys)

            def search_next() -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
                head, maps = next(own)
                return head, search(maps, ALONE)

            for _ in range(0, whole, processes.size):
                for head, best in processes.exchange(search_next):
                    yield self._table(head, *best)
            for head, maps in processes.agree(lambda: list(self.maps(heads[whole:])), lambda _: {}):
                yield self._table(head, *search(maps, processes))

    def _table(self, head: int, ids: Tensor, attention: Tensor, log_prob: Tensor) -> NgramTable:
        """The table of a head's best triples."""
        about = {"names": token_names(self.network.tokenizer, [ids]), **self.header(self.path(head))}
        parts = {"attention": attention, "log_prob": log_prob}
        return NgramTable.ranked(ids, attention + log_prob, parts=parts, top_k=self.top_k, **about)

    def maps(self, heads: Sequence[int]) -> Iterator[tuple[int, HeadMaps]]:
        """The maps of heads, one after another; `HELD` limits how many are read at once."""
        reader = self.reader
        size = max(1, HELD // (3 * reader.n_tokens * int(reader.view.cfg.d_head)))
        tokens = torch.arange(reader.n_tokens, device=reader.device)
        for group in (list(heads[start : start + size]) for start in range(0, len(heads), size)):
            vectors = reader.vectors(tokens, group, self.compose.reads(reader.layer, self.chosen[0]))
            for place, head in enumerate(group):
                own = [x[place] for x in vectors]
                check_finite(torch.cat(own, 1).abs().amax(1), tokens, "Queries, keys and values")
                yield head, self._maps(head, *own)

    def _maps(self, head: int, query: Tensor, key: Tensor, value: Tensor) -> HeadMaps:
        found = self.qk_scores
        cap = None if found.cap is None else found.capped
        own = found.capped((query.double() * found.own_keys(key.double())).sum(1)) - found.bias[head]
        scores = LowRankLogits(query, found.keys(key).T.contiguous(), transform=cap)
        reader, composes = self.reader, OUTPUT in self.compose.paths
        outputs = self.compose.outputs(reader, head) if composes else decoded_writes(reader, head, value)
        return HeadMaps(scores, outputs, own, self.normalize)


def _read_heads(head: int | Sequence[int] | None, n_heads: int) -> list[int]:
    """Distinct head indices."""
    given = list(range(n_heads)) if head is None else [head] if isinstance(head, int) else list(head)
    if not given or any(isinstance(h, bool) or not isinstance(h, int) or not 0 <= h < n_heads for h in given):
        raise ValueError(f"head must be one of 0..{n_heads - 1}, several of them, or None for all; got {head!r}.")
    return list(dict.fromkeys(given))
