"""The engine of `tl_jets.ngrams.bigrams`: checks options, divides rows among processes, saves and resumes a sweep.

All paths share the embeddings of a chunk of rows. Before a save, process 0 collects the results of all processes, so a
saved state does not depend on their number.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.free_memory import check_fits
from tl_jets.core.logit_reader import BLOCK, slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.fingerprints import fingerprint
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.jobs import State
from tl_jets.ngrams.rows import RowReader, RowScan
from tl_jets.ngrams.scan import SCORES, BestPairs, Score, Tiles, TopScan
from tl_jets.ngrams.screen import RoundedTiles, Screen, ScreenedScan, bf16_is_fast
from tl_jets.ngrams.shards import ALONE, Distributed, Processes
from tl_jets.ngrams.streams import PathInput, VocabularyStreams, mlp_steps
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.token_ids import TokenIds, described, read_tokens

Per = Literal["global", "row"]

# Rows per chunk of a scan, and rows per call of the MLPs.
CHUNK_CPU, CHUNK_DEVICE = 1024, 8192
CHUNK_PER_ROW = 320
STREAM_ROWS = 512
# Bytes of a bi-gram while its table is sorted, and in each path's results.
PAIR_BYTES, FOUND_BYTES = 48, 64
# Minimum number of multiply-adds for which measuring the speed of bfloat16 pays off.
WORTH_PROBING = 10**11


@dataclass(frozen=True)
class Options:
    """Options of a bi-gram sweep; see `jet_bigrams`."""

    top_k: int = 100
    per: Per = "global"
    rows: TokenIds | None = None
    columns: TokenIds | None = None
    score: Score = "logprob"
    chunk_size: int | None = None
    screen: Screen | None = "auto"
    progress: bool = True
    distributed: Distributed = False


def planned(
    model: Any, paths: Literal["each_mlp"] | Sequence[PathInput], options: Options, *, saves: bool = False
) -> BigramSweep:
    """A sweep with checked options, equal in all processes; `saves` says whether its tables go to files."""
    processes = Processes.of(options.distributed)

    def plan() -> BigramSweep:
        if paths != "each_mlp" if isinstance(paths, str) else not isinstance(paths, Iterable):
            raise ValueError(
                f'paths must be "each_mlp" or a list of paths; got {paths!r}. Use jet_bigrams for one path.'
            )
        given = mlp_steps(ResidualNetwork(model)) if isinstance(paths, str) else list(paths)
        if not given:
            raise ValueError(
                'There must be a path at least; got none. A model without MLPs has the path "direct" only.'
            )
        return BigramSweep(model, given, options, processes)

    return processes.agree(plan, lambda sweep: sweep.description() | {"saves": saves})


class BigramSweep:
    """A sweep over the vocabulary for some paths, with checked options."""

    def __init__(self, model: Any, paths: Sequence[PathInput], options: Options, processes: Processes = ALONE):
        self.processes = processes
        self.streams = VocabularyStreams(model, paths)
        self.network, self.options = self.streams.network, options
        self.decoder = self.network.decoder
        self.device = self.streams.device
        for name, value, known in (("per", options.per, ("global", "row")), ("score", options.score, SCORES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}; got {value!r}.")
        self.rows = read_tokens("rows", options.rows, self.streams.n_tokens, self.device)
        self.columns = None
        if options.columns is not None:
            self.columns = read_tokens("columns", options.columns, self.decoder.d_vocab, self.device)
        default = CHUNK_PER_ROW if options.per == "row" else CHUNK_CPU if self.device.type == "cpu" else CHUNK_DEVICE
        shared = processes.chunk_size(len(self.rows), default)
        self.chunk_size = shared if options.chunk_size is None else options.chunk_size
        check_integers(1, top_k=options.top_k, chunk_size=self.chunk_size)
        self._check_memory()
        self.dtype = self.decoder.compute_dtype(self.streams.embed(self.rows[:1]))
        self.screens = self._screens()

    def _check_memory(self) -> None:
        """Raise if the tables do not fit; bytes per pair were measured (tests/core/test_memory.py)."""
        options, n_rows = self.options, len(self.rows)
        n_columns = self.decoder.d_vocab if self.columns is None else len(self.columns)
        n_pairs = n_rows * min(options.top_k, n_columns)
        if options.per == "global":
            # With K blocks or fewer there is no threshold, and all pairs are kept.
            n_blocks = n_rows * -(-n_columns // BLOCK)
            n_pairs = n_rows * n_columns if options.top_k >= n_blocks else options.top_k
        n_paths = len(self.streams.paths)
        check_fits(
            n_pairs * (PAIR_BYTES + FOUND_BYTES * n_paths),
            f"Tables of {n_paths} {'path' if n_paths == 1 else 'paths'}, with {n_pairs:,} bi-grams to be held of each,",
            "Take a smaller top_k, fewer rows or columns, or fewer paths at a time.",
        )

    def _screens(self) -> bool:
        """Whether rows are screened in bfloat16."""
        options = self.options
        if options.screen not in ("auto", "bf16", None):
            raise ValueError(f'screen must be "auto", "bf16" or None; got {options.screen!r}.')
        possible = (
            options.per == "global"
            and options.score == "logprob"
            and self.columns is None
            and self.decoder.transform is None
            and self.dtype is torch.float32
        )
        if options.screen == "bf16" and not possible:
            raise ValueError(
                'screen="bf16" needs per="global", score="logprob", all columns, a float32 sweep and a model without a '
                'softcap; this one has something else. Use screen="auto" or None.'
            )
        work = len(self.rows) * self.decoder.d_vocab * self.decoder.d_model
        if options.screen == "auto" and possible and work > WORTH_PROBING:
            return bf16_is_fast(self.device, self.decoder.d_model)
        return options.screen == "bf16"

    @cached_property
    def tiles(self) -> Tiles:
        """Tile buffers, shared by all paths."""
        normalize = self.options.score == "logprob"
        return Tiles(self.decoder, self.dtype, self.device, normalize=normalize, tokens=self.columns)

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return fingerprint(self.network)

    def header(self, label: str) -> dict[str, Any]:
        """The header of a path's table."""
        options = self.options
        settings = {
            "ngram": "bigram",
            "score": options.score,
            "per": options.per,
            "top_k": options.top_k,
            "rows": described(self.rows, options.rows),
            "columns": described(self.columns, options.columns),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return {"path": label, "settings": settings, "fingerprint": self.fingerprint}

    def description(self) -> dict[str, Any]:
        """Options and model, which must be equal in all processes."""
        options, paths = self.options, list(self.streams.paths)
        header = self.header(" + ".join(paths))
        more = {"model": header["fingerprint"], "chunk_size": self.chunk_size, "screen": options.screen}
        return {"paths": paths, **header["settings"], **more}

    def states(self, embed: Tensor, label: str) -> Tensor:
        """Inputs of the unembedding, computed for a few rows at a time because MLPs are wide."""
        return torch.cat([self.streams.states(embed[part], label) for part in slices(len(embed), STREAM_ROWS)])

    def _scans(self, labels: Sequence[str]) -> dict[str, TopScan | ScreenedScan | RowScan]:
        options = self.options
        shared: dict[str, Any] = {
            "score": options.score,
            "tokens": self.columns,
            "dtype": self.dtype,
            "device": self.device,
        }
        if options.per == "row":
            reader = RowReader(self.decoder, options.top_k, **shared)
            return {label: RowScan(reader) for label in labels}
        scans = {label: TopScan(self.decoder, options.top_k, **shared, tiles=self.tiles) for label in labels}
        if not self.screens:
            return {**scans}
        tiles = RoundedTiles(self.decoder, self.dtype, self.device)
        return {label: ScreenedScan(scan, tiles, self.chunk_size) for label, scan in scans.items()}

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
                    f"A state must be of rows that there are, at most {len(self.rows)}; {str(state_file)!r} says {done}. Delete it."
                )
            # Start again if the state lacks a path, whose table was deleted after the state was saved.
            if not set(scans) <= {name.rpartition("/")[0] for name in tensors}:
                done = 0
            _restore(scans, [tensors] if done else [])
            return done

        done = processes.first(resume)
        chunks = 1  # per process, between two synchronizations
        shown = None if self.options.progress and processes.rank == 0 else True
        with tqdm(total=len(self.rows), initial=done, unit="token", delay=1, leave=False, disable=shown) as bar:
            while done < len(self.rows):
                stop = min(done + chunks * processes.size * self.chunk_size, len(self.rows))
                seconds = max(processes.exchange(partial(self._scan, scans, done, stop)))
                chunks = processes.pace(chunks, seconds)
                bar.update(stop - done)
                done = stop
                if processes.first(state.is_due):
                    self._collect(scans, everywhere=False)
                    processes.first(partial(state.save, done, partial(_named, scans)))
        processes.exchange(lambda: [scan.close() for scan in scans.values()])
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
                scan.add(self.states(embed, label), ids)
        return time.monotonic() - began

    def _collect(self, scans: Mapping[str, Any], *, everywhere: bool) -> None:
        """Send all results to every process, or to process 0 alone (then the others start empty)."""
        if self.processes.size > 1:
            found = self.processes.exchange(partial(_named, scans))
            _restore(scans, found if everywhere or self.processes.rank == 0 else [])

    def _table(self, label: str, best: BestPairs) -> NgramTable:
        ids = best.ids.cpu()
        parts = {"log_normalizer": best.log_normalizers} if self.options.score == "logprob" else {}
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
