"""The engine of `tl_jets.ngrams.trigrams`: checks options and divides a layer's heads among processes.

Each process searches one head at a time, so a table can be saved while the next heads are searched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.free_memory import check_fits
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.factors import Factors
from tl_jets.ngrams.fingerprints import fingerprint
from tl_jets.ngrams.head_maps import HeadReader, OutputMap
from tl_jets.ngrams.jobs import saved
from tl_jets.ngrams.join import NORMALIZES, HeadMaps, Normalize, Search
from tl_jets.ngrams.score_map import ScoreMap
from tl_jets.ngrams.shards import ALONE, Distributed, Processes
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.token_ids import TokenIds, described, read_tokens

# Elements of queries, keys and values held at once.
HELD = 2**27
# Bytes of a triple during the search, and in a table.
TRIPLE_BYTES, TABLE_BYTES = 600, 48


def planned(
    model: Any,
    layer: int,
    head: int | Sequence[int] | None,
    *,
    saves: bool,
    distributed: Distributed = False,
    **options: Any,
) -> TrigramSweep:
    """A sweep with checked options, equal in all processes; `saves` says whether tables go to files."""
    processes = Processes.of(distributed)
    return processes.agree(
        lambda: TrigramSweep(model, layer, head, processes=processes, **options),
        lambda plan: plan.description() | {"saves": saves},
    )


class TrigramSweep:
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
        rows: TokenIds | None = None,
        progress: bool = True,
        processes: Processes = ALONE,
    ):
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k must be a number of triples, 1 or more; got {top_k!r}.")
        if normalize not in NORMALIZES:
            raise ValueError(f"normalize must be one of {NORMALIZES}; got {normalize!r}.")
        self.reader = reader = HeadReader(model, layer)
        self.score_map = reader.scores(distance)
        self.normalize: Normalize = normalize
        self.chosen = _read_heads(head, reader.n_heads)
        self.keys = read_tokens("rows", rows, reader.n_tokens, reader.device)
        self.top_k, self.progress, self.processes = top_k, progress, processes
        # At most the number of all triples.
        self.held = min(top_k, len(self.keys) * reader.n_tokens * reader.network.decoder.d_vocab)
        check_fits(
            self.held * (TRIPLE_BYTES + TABLE_BYTES * len(self.chosen)),
            f"The {self.held:,} best skip-trigrams of {len(self.chosen)} {'head' if len(self.chosen) == 1 else 'heads'}",
            "Take a smaller top_k, or fewer heads at a time.",
        )
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
        """Options and model, which must be equal in all processes."""
        return {"layer": self.reader.layer, "heads": self.chosen, **self.settings, "model": self.fingerprint}

    def path(self, head: int) -> str:
        """The path of a head's table."""
        return f"L{self.reader.layer}H{head}"

    def header(self, head: int) -> dict[str, Any]:
        """The header of a head's table."""
        return {"path": self.path(head), "settings": self.settings, "fingerprint": self.fingerprint}

    def saved(self, files: Mapping[int, Path]) -> dict[int, NgramTable]:
        """Load the tables of heads that already exist, and create their folder."""
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        tables = {head: saved(file, self.header(head)) for head, file in files.items()}
        return {head: table for head, table in tables.items() if table is not None}

    @torch.no_grad()
    def tables(self, heads: Sequence[int]) -> Iterator[tuple[int, NgramTable]]:
        """Tables of heads as they are finished; as many heads at a time as there are processes."""
        processes, n_tokens = self.processes, self.reader.n_tokens
        # The processes divide the work of each left-over head.
        whole = len(heads) - len(heads) % processes.size
        # The bar counts queries of the first pass and keys of the second.
        total = len(heads) * (n_tokens + len(self.keys)) // processes.size
        shown = None if self.progress and processes.rank == 0 else True
        with tqdm(total=total, unit="token", delay=1, leave=False, disable=shown) as bar:
            own = self.maps(heads[processes.rank : whole : processes.size])

            def search(maps: HeadMaps, among: Processes) -> tuple[Tensor, Tensor, Tensor]:
                return Search(maps, self.held, bar.update, among).run(self.keys)

            def search_next() -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
                head, maps = next(own)
                return head, search(maps, ALONE)

            for _ in range(0, whole, processes.size):
                for head, best in processes.exchange(search_next):
                    yield head, self._table(head, *best)
            for head, maps in processes.agree(lambda: list(self.maps(heads[whole:])), lambda _: {}):
                yield head, self._table(head, *search(maps, processes))

    def _table(self, head: int, ids: Tensor, attention: Tensor, log_prob: Tensor) -> NgramTable:
        """The table of a head's best triples."""
        return NgramTable.ranked(
            ids,
            attention + log_prob,
            names=token_names(self.reader.network.tokenizer, [ids]),
            **self.header(head),
            parts={"attention": attention, "log_prob": log_prob},
            top_k=self.top_k,
        )

    def maps(self, heads: Sequence[int]) -> Iterator[tuple[int, HeadMaps]]:
        """The maps of heads, one after another; `HELD` limits how many are read at once."""
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
    """Distinct head indices."""
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
