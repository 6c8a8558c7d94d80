r"""Jet bi-grams: next-token scores of a path of the network, for every token of the vocabulary, without a corpus.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

x is the stream of a single token along the path (`tl_jets.ngrams.streams` lists the paths), without positional
embedding, and upsilon the model's decoder: final norm, unembedding, bias, softcap or scale. `direct` is the order-0 jet
of the decoder at the embedding. Tables are exact, and no V x V matrix is stored (`tl_jets.ngrams.scan`).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), section on jet n-grams, footnote 4.
Cost: V^2 d_model multiply-adds a path (GPT-2 small: 40 forward passes of 1,024 tokens) plus about a tenth, and the
path's MLPs on V tokens. Memory: about 60 MB for GPT-2 small; screening also holds `W_U` in bfloat16.

Example:
    >>> import tl_jets as tj
    >>> list(jet_bigrams_by_path(tj.load_tinydocs(), "each_mlp", top_k=3))      # one sweep over the vocabulary
    ['0_mlp', '1_mlp', '2_mlp', '3_mlp']
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.free_memory import check_fits
from tl_jets.core.logit_reader import BLOCK, CHUNK_SIZE, LOG2_E, check_finite, slices
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.processes import ALONE, Distributed, Processes
from tl_jets.core.tokens import token_names
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.jobs import Job, State, Sweep, finish
from tl_jets.ngrams.rows import RowReader, RowScan
from tl_jets.ngrams.scan import SCORES, BestPairs, Score, Tiles, TopScan
from tl_jets.ngrams.screen import RoundedTiles, Screen, ScreenedScan, bf16_is_fast
from tl_jets.ngrams.streams import PathInput, TokenIds, VocabularyStreams, described, mlp_steps, read_tokens
from tl_jets.ngrams.tables import NgramTable

Per = Literal["global", "row"]
Paths = Literal["each_mlp"] | Sequence[PathInput]

# Rows per chunk of a scan; where their logits are held, `CHUNK_SIZE`.
CHUNK_CPU, CHUNK_DEVICE = 1024, 8192
# Bytes of a bi-gram while its table is sorted, and in each path's results.
PAIR_BYTES, FOUND_BYTES = 48, 64
# Minimum number of multiply-adds for which measuring the speed of bfloat16 pays off.
WORTH_PROBING = 10**11


def jet_bigrams(
    model: Any,
    path: PathInput = "direct",
    *,
    top_k: int = 100,
    per: Per = "global",
    rows: TokenIds | None = None,
    columns: TokenIds | None = None,
    score: Score = "logprob",
    chunk_size: int | None = None,
    screen: Screen | None = "auto",
    progress: bool = True,
    save: str | Path | None = None,
    distributed: Distributed = False,
) -> NgramTable:
    """The best bi-grams of a path over the whole vocabulary.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside MLPs and norms are applied; hooks on streams are refused.
        path: `"direct"`, `"mlps"`, or MLP steps in order: a list (`["1_mlp", "3_mlp"]`) or a label (`"1_mlp > 3_mlp"`).
        top_k: Number of bi-grams.
        per: `"global"`: the best overall; `"row"`: the best of each first token.
        rows: Ids of the first tokens; None for all.
        columns: Ids of the second tokens; None for all. The softmax is over the whole vocabulary in any case.
        score: `"logprob"` (nats) or `"logit"` (after the model's softcap or scale).
        chunk_size: First tokens scanned at a time; None for a default that suits the device.
        screen: `"bf16"` skips hopeless rows in bfloat16, `"auto"` if that is fast, None never; the table is the same.
        progress: Show a bar in a terminal if the sweep takes longer than a second.
        save: File for the table. An existing table with equal settings and model is loaded, another one refused. An
            unfinished sweep is saved beside it every half a minute and resumed by the same version of tl-jets.
        distributed: True or a process group: its processes, all called with the same model and options, divide the rows
            and return the same table. Process 0 reads and writes files.

    Returns:
        Bi-grams, best first, ties by ids. Log-probabilities have a part `log_normalizer`, log sum exp of logits.

    Raises:
        ValueError: The path mixes positions or does not exist; an id or option is invalid; a logit is not finite;
            `save` holds another table; or processes got different arguments.
        RuntimeError: Another process failed.

    Example:
        >>> import tl_jets as tj
        >>> table = jet_bigrams(tj.load_tinydocs(), ["1_mlp", "3_mlp"], per="row", top_k=2, rows=[40, 41, 42])
        >>> sorted(set(table.ids[:, 0].tolist())), len(table)
        ([40, 41, 42], 6)
    """
    options = {"top_k": top_k, "per": per, "rows": rows, "columns": columns, "score": score, "progress": progress}
    options |= {"chunk_size": chunk_size, "screen": screen, "distributed": distributed}
    job = BigramSweep.planned(model, [path], saves=save is not None, **options).job()
    return job.run(None) if save is None else finish(job, save)


def jet_bigrams_by_path(
    model: Any,
    paths: Paths = "each_mlp",
    *,
    top_k: int = 100,
    per: Per = "global",
    rows: TokenIds | None = None,
    columns: TokenIds | None = None,
    score: Score = "logprob",
    chunk_size: int | None = None,
    screen: Screen | None = "auto",
    progress: bool = True,
    folder: str | Path | None = None,
    distributed: Distributed = False,
) -> dict[str, NgramTable]:
    """The best bi-grams of several paths by path, in one sweep, which embeds each token once.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: `"each_mlp"` for each MLP alone, or a list of paths as in `jet_bigrams`.
        top_k: Number of bi-grams a path.
        per: As in `jet_bigrams`, and so are the options below and the errors.
        rows: Ids of the first tokens.
        columns: Ids of the second tokens.
        score: `"logprob"` or `"logit"`.
        chunk_size: First tokens at a time.
        screen: Screening in bfloat16.
        progress: Show a bar.
        folder: Folder for the tables, `<path>.parquet`. Existing tables are loaded and an unfinished sweep is resumed.
        distributed: Divide the rows among processes.
    """
    options: dict[str, Any] = {"top_k": top_k, "per": per, "rows": rows, "columns": columns, "score": score}
    options |= {"chunk_size": chunk_size, "screen": screen, "progress": progress, "distributed": distributed}
    plan = BigramSweep.planned(model, paths, saves=folder is not None, **options)
    labels = list(plan.streams.paths)
    if folder is None:
        return plan.run(labels, None)
    tables = plan.load(folder, labels)
    missing = [label for label in labels if label not in tables]
    if missing:
        state = Path(folder) / "unfinished.state"
        found = plan.run(missing, state)
        plan.save(folder, found.values(), state)
        tables |= found
    return {label: tables[label] for label in labels}


def bigram_job(model: Any, path: PathInput = "direct", *, name: str | None = None, **options: Any) -> Job:
    """A job for `tl_jets.ngrams.jobs.sweep` that runs `jet_bigrams`.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        name: File name without suffix; the path by default.
        **options: Options of `jet_bigrams`, without `save`.
    """
    return BigramSweep.planned(model, [path], saves=True, **options).job(name)


@torch.no_grad()
@full_float32()
def bigram_log_normalizers(
    model: Any,
    path: PathInput = "direct",
    *,
    rows: TokenIds | None = None,
    chunk_size: int | None = None,
    distributed: Distributed = False,
) -> Float[Tensor, " row"]:
    """Log-normalizers (log sum exp of the logits) after each first token, in nats. Shape [row].

    They are float64 numbers with the accuracy of the working precision. Errors are those of `jet_bigrams`.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        rows: Ids of the first tokens; None for all.
        chunk_size: First tokens at a time.
        distributed: Divide the rows among processes.
    """
    plan = BigramSweep.planned(model, [path], rows=rows, chunk_size=chunk_size, screen=None, distributed=distributed)
    (label,) = plan.streams.paths
    tiles, offset = plan.tiles, 0.0

    def read(part: slice) -> Tensor:
        nonlocal offset
        states = plan.streams.states(plan.streams.embed(plan.rows[part]), label)
        maxima = torch.empty(len(states), tiles.n_blocks, dtype=tiles.dtype, device=tiles.device)
        shifted, applied, offset = tiles.read(states, maxima, offset)
        assert shifted is not None
        check_finite(shifted, plan.rows[part])
        return (shifted.double() - applied) / LOG2_E

    return torch.cat(plan.processes.map(read, list(slices(len(plan.rows), plan.chunk_size)))).to(plan.device)


def _given_paths(model: Any, paths: Paths) -> list[PathInput]:
    if paths != "each_mlp" if isinstance(paths, str) else not isinstance(paths, Iterable):
        raise ValueError(f'paths must be "each_mlp" or a list of paths; got {paths!r}. Use jet_bigrams for one path.')
    given: list[PathInput] = [*(mlp_steps(ResidualNetwork(model)) if isinstance(paths, str) else paths)]
    if not given:
        raise ValueError('There must be a path at least; got none. A model without MLPs has the path "direct" only.')
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
        chunk_size: int | None = None,
        screen: Screen | None = "auto",
        progress: bool = True,
        processes: Processes = ALONE,
    ):
        self.streams = VocabularyStreams(model, _given_paths(model, paths))
        self.network, self.device, self.dtype = self.streams.network, self.streams.device, self.streams.dtype
        self.decoder = self.network.decoder
        check_choice("per", per, ("global", "row"))
        check_choice("score", score, SCORES)
        self.top_k, self.per, self.score, self.screen = top_k, per, score, screen
        self.progress, self.processes = progress, processes
        self.rows = read_tokens("rows", rows, self.streams.n_tokens, self.device)
        self.columns = None if columns is None else read_tokens("columns", columns, self.decoder.d_vocab, self.device)
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
        self._check_memory()
        self.screens = self._screens()

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
        possible = self.per == "global" and self.score == "logprob" and self.columns is None
        possible = possible and self.decoder.transform is None and self.dtype is torch.float32
        if self.screen == "bf16" and not possible:
            raise ValueError(
                'screen="bf16" needs per="global", score="logprob", all columns, a float32 sweep and a model without a '
                'softcap; this one has something else. Use screen="auto" or None.'
            )
        work = len(self.rows) * self.decoder.d_vocab * self.decoder.d_model
        if self.screen == "auto" and possible and work > WORTH_PROBING:
            return bf16_is_fast(self.device, self.decoder.d_model)
        return self.screen == "bf16"

    @cached_property
    def tiles(self) -> Tiles:
        """Tile buffers, shared by all paths."""
        return Tiles(self.decoder, self.dtype, self.device, normalize=self.score == "logprob", tokens=self.columns)

    def description(self) -> dict[str, Any]:
        """Options and model, which must be equal in all processes."""
        more = {"paths": list(self.streams.paths), "chunk_size": self.chunk_size, "screen": self.screen}
        return super().description() | more

    def _scans(self, labels: Sequence[str]) -> dict[str, TopScan | ScreenedScan | RowScan]:
        shared = {"score": self.score, "tokens": self.columns, "dtype": self.dtype, "device": self.device}
        if self.per == "row":
            reader = RowReader(self.decoder, self.top_k, **shared)
            return {label: RowScan(reader) for label in labels}
        scans = {label: TopScan(self.decoder, self.top_k, **shared, tiles=self.tiles) for label in labels}
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
                    f"A state must be of rows that there are, at most {len(self.rows)}; {str(state_file)!r} says {done}. Delete it."
                )
            # Start again if the state lacks a path, whose table was deleted after the state was saved.
            if not set(scans) <= {name.rpartition("/")[0] for name in tensors}:
                done = 0
            _restore(scans, [tensors] if done else [])
            return done

        done = processes.first(resume)
        chunks = 1  # per process, between two synchronizations
        shown = None if self.progress and processes.rank == 0 else True
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
        parts = {"log_normalizer": best.log_normalizers} if self.score == "logprob" else {}
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
