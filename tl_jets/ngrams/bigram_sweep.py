"""A sweep over the vocabulary for the bi-grams of some paths: checked options, memory, scans, unfinished states, tables."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.decoder import exact_logits
from tl_jets.core.free_memory import check_fits
from tl_jets.core.logit_reader import BLOCK, CHUNK_SIZE, slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.processes import ALONE, Processes
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.jobs import Job, State, Sweep, say_how_long
from tl_jets.ngrams.rows import RowReader, RowScan
from tl_jets.ngrams.scan import BestPairs, Tiles, TopScan
from tl_jets.ngrams.scoring import SCORES, Score, Scoring, check_unigram
from tl_jets.ngrams.screen import RoundedTiles, Screen, ScreenedScan, bf16_is_fast
from tl_jets.ngrams.streams import PathInput, TokenIds, VocabularyStreams, described, mlp_steps, read_tokens
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.vocabulary import is_tied

Per = Literal["global", "row"]
Paths = Literal["each_mlp"] | Sequence[PathInput]

# Rows per chunk of a scan; where their logits are held, `CHUNK_SIZE`.
CHUNK_CPU, CHUNK_DEVICE = 1024, 8192
# Bytes of a bi-gram while its table is sorted, and in each path's results.
PAIR_BYTES, FOUND_BYTES = 48, 64
# Minimum number of multiply-adds for which measuring the speed of bfloat16 pays off.
WORTH_PROBING = 10**11


def _given_paths(model: Any, paths: Paths) -> list[PathInput]:
    if paths != "each_mlp" if isinstance(paths, str) else not isinstance(paths, Iterable):
        raise ValueError(f'paths must be "each_mlp" or a list of paths; got {paths!r}. Use jet_bigrams for one path.')
    given: list[PathInput] = [*(mlp_steps(ResidualNetwork(model)) if isinstance(paths, str) else paths)]
    if not given:
        raise ValueError(
            'paths must name at least one path; got none. A model without MLPs has the path "direct" only.'
        )
    return given


class BigramSweep(Sweep):
    """A sweep over the vocabulary for some paths, with checked options; see `jet_bigrams`."""

    def __init__(
        self,
        model: Any,
        paths: Paths,
        *,
        top_k: int = 100,
        per: Per = "global",
        rows: TokenIds | None = None,
        columns: TokenIds | None = None,
        score: Score = "logprob",
        unigram: Float[Tensor, " d_vocab"] | None = None,
        exclude_self: bool = False,
        exclude: TokenIds | None = None,
        chunk_size: int | None = None,
        screen: Screen | None = "auto",
        progress: bool = True,
        processes: Processes = ALONE,
    ):
        self.streams = VocabularyStreams(model, _given_paths(model, paths))
        self.network, self.device, self.dtype = self.streams.network, self.streams.device, self.streams.dtype
        self.decoder, self.state = self.network.decoder, self.streams.state
        check_choice("per", per, ("global", "row"))
        check_choice("score", score, SCORES)
        self.top_k, self.per, self.screen = top_k, per, screen
        self.score: Score = score
        self.progress, self.processes = progress, processes
        self.exclude_self = exclude_self
        self.rows, self.columns = self._read_tokens(rows, columns, exclude)
        default = CHUNK_SIZE if per == "row" else CHUNK_CPU if self.device.type == "cpu" else CHUNK_DEVICE
        self.chunk_size = processes.chunk_size(len(self.rows), default) if chunk_size is None else chunk_size
        check_integers(1, top_k=top_k, chunk_size=self.chunk_size)
        self.settings = {
            "ngram": "bigram",
            "score": score,
            "per": per,
            "top_k": top_k,
            "rows": described(self.rows, rows),
            "columns": described(self.columns, columns),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        # Only where they are used, so that older tables are still of the same settings.
        self.settings |= {"exclude_self": True} if exclude_self else {}
        self.settings |= {} if exclude is None else {"exclude": described(self.left_out, exclude)}
        self.settings |= {"tied_embeddings": True} if is_tied(self.streams) else {}
        self.unigram = self._read_unigram(unigram)
        self._check_memory()
        self.screens = self._screens()

    def _read_tokens(
        self, rows: TokenIds | None, columns: TokenIds | None, exclude: TokenIds | None
    ) -> tuple[Tensor, Tensor | None]:
        """First tokens, and second ones (None for all), without those left out."""
        tokenizer, device = self.network.tokenizer, self.device
        first = read_tokens("rows", rows, self.streams.n_tokens, device, tokenizer)
        second = read_tokens("columns", columns, self.decoder.d_vocab, device, tokenizer)
        self.left_out = first[:0]
        if exclude is not None and len(exclude):
            size = max(self.streams.n_tokens, self.decoder.d_vocab)
            self.left_out = read_tokens("exclude", exclude, size, device, tokenizer)
            first, second = (x[~torch.isin(x, self.left_out)] for x in (first, second))
        if not len(first) or len(second) < 1 + self.exclude_self:
            raise ValueError(
                f"There must be tokens to choose from; exclude and exclude_self leave {len(first)} first and {len(second)} second "
                "ones. Leave fewer out, or give more rows and columns."
            )
        return first, None if len(second) == self.decoder.d_vocab else second

    def _read_unigram(self, unigram: Float[Tensor, " d_vocab"] | None) -> Float[Tensor, " d_vocab"] | None:
        """The unigram of a lift, on the sweep's device; without one, a lift needs mean logits."""
        if unigram is not None and self.score != "lift":
            raise ValueError(
                f'unigram= is the baseline of score="lift"; the score is {self.score!r}. Leave one of them out.'
            )
        if unigram is None and self.score == "lift" and self.decoder.transform is not None:
            raise NotImplementedError(
                'score="lift" computes mean logits from mean states, which is wrong with a softcap. Pass unigram=, the '
                "probability of every token, as its baseline."
            )
        if unigram is None:
            return None
        found = check_unigram(unigram, size=self.decoder.d_vocab)
        self.settings["unigram_sha256"] = hashlib.sha256(found.numpy().tobytes()).hexdigest()
        return found.to(self.device)

    @torch.no_grad()
    def _scoring(self, label: str) -> Scoring:
        """How pairs of a path are scored: the same for all, but for lifts over mean logits."""
        if self.score != "lift" or self.unigram is not None:
            return self._same_scoring
        every = torch.arange(self.streams.n_tokens, device=self.device)

        def total(part: slice) -> Tensor:
            return self.streams.states(self.streams.embed(every[part]), label).sum(0, dtype=torch.float64)

        totals = self.processes.map(total, list(slices(len(every), CHUNK_CPU)))
        mean = torch.stack(totals).sum(0, keepdim=True).to(self.device) / len(every)
        return replace(self._same_scoring, offsets=-exact_logits(self.decoder, mean)[0].double().log_softmax(0))

    @cached_property
    def _same_scoring(self) -> Scoring:
        """How pairs of every path are scored; tokens that a unigram does not know are left out."""
        known = self.unigram
        offsets = None if known is None else torch.where(known > 0, -known.log(), -math.inf)
        return Scoring(self.score, self.columns, offsets, self.exclude_self)

    def _check_memory(self) -> None:
        """Raise if the tables do not fit; bytes per pair were measured (tests/core/test_memory.py)."""
        n_rows, n_paths = len(self.rows), len(self.streams.paths)
        n_columns = self.decoder.d_vocab if self.columns is None else len(self.columns)
        n_pairs = n_rows * min(self.top_k, n_columns)
        if self.per == "global":
            # With K blocks or fewer there is no threshold, and all pairs are kept.
            n_blocks = n_rows * -(-n_columns // BLOCK)
            n_pairs = n_rows * n_columns if self.top_k >= n_blocks else self.top_k
        check_fits(
            n_pairs * (PAIR_BYTES + FOUND_BYTES * n_paths),
            f"Tables of {n_paths} {'path' if n_paths == 1 else 'paths'}, with {n_pairs:,} bi-grams to be held of each,",
            "Take a smaller top_k, fewer rows or columns, or fewer paths at a time.",
        )

    def _screens(self) -> bool:
        """Whether rows are screened in bfloat16."""
        check_choice("screen", self.screen, ("auto", "bf16", None))
        possible = self.per == "global" and self.score == "logprob" and self.columns is None and not self.exclude_self
        possible = possible and self.decoder.transform is None and self.dtype is torch.float32
        if self.screen == "bf16" and not possible:
            raise ValueError(
                'screen="bf16" needs per="global", score="logprob", all columns and pairs, a float32 sweep and a model '
                'without a softcap; this one has something else. Use screen="auto" or None.'
            )
        work = len(self.rows) * self.decoder.d_vocab * self.decoder.d_model
        if self.screen == "auto" and possible and work > WORTH_PROBING:
            return bf16_is_fast(self.device, self.decoder.d_model)
        return self.screen == "bf16"

    @cached_property
    def tiles(self) -> Tiles:
        """Tile buffers, shared by all paths."""
        return Tiles(self.decoder, self.dtype, self.device, self._same_scoring)

    def description(self) -> dict[str, Any]:
        """Options and model, which must be equal in all processes."""
        more = {"paths": list(self.streams.paths), "chunk_size": self.chunk_size, "screen": self.screen}
        return super().description() | more

    def _scans(self, labels: Sequence[str]) -> dict[str, TopScan | ScreenedScan | RowScan]:
        scorings = {label: self._scoring(label) for label in labels}
        shared: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        if self.per == "row":
            readers = {x: RowReader(self.decoder, self.top_k, scoring=x, **shared) for x in {*scorings.values()}}
            return {label: RowScan(readers[x]) for label, x in scorings.items()}
        scans = {
            label: TopScan(self.decoder, self.top_k, scoring=x, **shared, tiles=self.tiles)
            for label, x in scorings.items()
        }
        if not self.screens:
            return {**scans}
        tiles = RoundedTiles(self.decoder, self.dtype, self.device)
        return {label: ScreenedScan(scan, tiles, self.chunk_size) for label, scan in scans.items()}

    def job(self, name: str | None = None) -> Job:
        """The job of the only path, named as it by default."""
        (label,) = self.streams.paths

        def run(state: Path | None) -> NgramTable:
            return self.run([label], state)[label]

        return Job(name or label, run, **self.header(label), processes=self.processes)

    @torch.no_grad()
    @full_float32()
    def run(self, labels: Sequence[str], state_file: Path | None) -> dict[str, NgramTable]:
        """Sweep over the vocabulary and return the tables of the paths `labels`."""
        processes = self.processes
        scans = processes.agree(lambda: self._scans(labels), lambda scans: {"paths": list(scans)})
        state = State(state_file, self.header(" + ".join(self.streams.paths)) if state_file else {})

        def resume() -> int:
            done, tensors = state.resume()
            if not 0 <= done <= len(self.rows):
                raise ValueError(
                    f"An unfinished state must have read 0..{len(self.rows)} rows; {str(state_file)!r} says {done}. Delete it."
                )
            # Start again if the state lacks a path, whose table was deleted after the state was saved.
            if not set(scans) <= {name.rpartition("/")[0] for name in tensors}:
                done = 0
            _restore(scans, [tensors] if done else [])
            return done

        began = done = processes.first(resume)
        chunks = 1  # per process, between two synchronizations
        shown = None if self.progress and processes.rank == 0 else True
        with tqdm(total=len(self.rows), initial=done, unit="token", delay=1, leave=False, disable=shown) as bar:
            while done < len(self.rows):
                stop = min(done + chunks * processes.size * self.chunk_size, len(self.rows))
                seconds = max(processes.exchange(partial(self._scan, scans, done, stop)))
                if done == began and shown is None:
                    paths = list(self.streams.paths)
                    what = paths[0] if len(paths) == 1 else f"{len(paths)} paths"
                    left = seconds / (stop - done) * (len(self.rows) - stop)
                    say_how_long(f"{what} after {len(self.rows):,} tokens", left)
                chunks = processes.pace(chunks, seconds)
                bar.update(stop - done)
                done = stop
                if processes.first(state.is_due):
                    self._collect(scans, everywhere=False)
                    processes.first(partial(state.save, done, partial(_named, scans)))
        self._collect(scans, everywhere=True)
        return {label: self._table(label, scan.finish(processes)) for label, scan in scans.items()}

    def _scan(self, scans: Mapping[str, Any], start: int, stop: int) -> float:
        """Scan this process's chunks of rows start..stop; returns the seconds taken."""
        began = time.monotonic()
        processes, size = self.processes, self.chunk_size
        for own in range(start + processes.rank * size, stop, processes.size * size):
            ids = self.rows[own : min(own + size, stop)]
            embed = self.streams.embed(ids)
            for label, scan in scans.items():
                scan.add(self.streams.states(embed, label), ids)
        return time.monotonic() - began

    def _collect(self, scans: Mapping[str, Any], *, everywhere: bool) -> None:
        """Send all results to every process, or to process 0 alone (then the others start empty)."""
        if self.processes.size > 1:
            found = self.processes.exchange(partial(_named, scans))
            _restore(scans, found if everywhere or self.processes.rank == 0 else [])

    def _table(self, label: str, best: BestPairs) -> NgramTable:
        ids = best.ids.cpu()
        parts = {"log_normalizer": best.log_normalizers} if self.score in ("logprob", "lift") else {}
        names = token_names(self.network.tokenizer, [ids])
        return NgramTable(ids, best.scores, names, **self.header(label), parts=parts)


def _named(scans: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{label}/{key}": x for label, scan in scans.items() for key, x in scan.state().items()}


def _restore(scans: Mapping[str, Any], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Restore scans from the `_named` tensors of one or several processes."""
    for label, scan in scans.items():
        own = f"{label}/"
        scan.restore(
            *({key.removeprefix(own): x for key, x in state.items() if key.startswith(own)} for state in states)
        )
