r"""Jet bi-grams: what a path of the network says after every token of the vocabulary, without a corpus.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

with the path's stream x of a single token (`tl_jets.ngrams.streams` lists the paths: `direct`, MLPs, nested MLPs, the
attention-free stream) and the model's own decoder upsilon: final norm, unembedding, bias, softcap or scale. `direct` is the
order-0 jet of the decoder at the embedding. No position enters. The table is exact: ids, order and scores are those of the
whole V x V matrix, which is never held (`tl_jets.ngrams.scan`).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), section on jet n-grams, footnote 4.

Cost: V^2 d_model multiply-adds a path (GPT-2 small: 40 forward passes of 1,024 tokens) and about a tenth of it for everything
else; the MLPs of the path on V tokens. Memory: about 60 MB for GPT-2 small; with screening `W_U` in bfloat16 besides.

Example:
    >>> import tl_jets as tj
    >>> model = tj.load_tinydocs()
    >>> table = jet_bigrams(model, "mlps", top_k=100)
    >>> len(table), table.n, table.path
    (100, 2, 'mlps')
    >>> tables = jet_bigrams_by_path(model, "each_mlp", top_k=3)      # one sweep over the vocabulary
    >>> list(tables)
    ['0_mlp', '1_mlp', '2_mlp', '3_mlp']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_jets.network import ResidualNetwork
from tl_jets.ngrams.fingerprints import fingerprint
from tl_jets.ngrams.jobs import SUFFIX, Job, State, check_header, finish
from tl_jets.ngrams.rows import RowReader, RowScan
from tl_jets.ngrams.scan import SCORES, BestPairs, Score, Tiles, TopScan
from tl_jets.ngrams.screen import RoundedTiles, Screen, ScreenedScan, bf16_is_fast
from tl_jets.ngrams.streams import PathInput, VocabularyStreams, mlp_steps
from tl_jets.ngrams.token_ids import TokenIds, described, read_tokens
from tl_jets.reader import LOG2_E, slices
from tl_jets.tables import NgramTable
from tl_jets.tokens import token_names

Per = Literal["global", "row"]

# Rows of a scan at a time, and of the model's MLPs at a time.
CHUNK_CPU, CHUNK_DEVICE = 1024, 8192
CHUNK_PER_ROW = 320
STREAM_ROWS = 512
# Below so many multiply-adds, measuring whether bfloat16 is fast takes longer than it can save.
WORTH_PROBING = 10**11


@dataclass(frozen=True)
class Options:
    """How bi-grams are chosen and computed; see `jet_bigrams`."""

    top_k: int = 100
    per: Per = "global"
    rows: TokenIds | None = None
    columns: TokenIds | None = None
    score: Score = "logprob"
    chunk_size: int | None = None
    screen: Screen | None = "auto"
    progress: bool = True


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
) -> NgramTable:
    """The best bi-grams of a path over the whole vocabulary.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside MLPs and norms are respected; hooks on streams are refused.
        path: `"direct"`, a list of MLP steps in the order of the network (`["1_mlp", "3_mlp"]`), one step, or `"mlps"`.
        top_k: How many bi-grams.
        per: `"global"`: the best of all; `"row"`: the best of each first token.
        rows: Ids of the first tokens to look at; None for all.
        columns: Ids of the second tokens that may be chosen; None for all. Log-probabilities are normalized over the whole
            vocabulary nevertheless.
        score: `"logprob"` (nats) or `"logit"` (after the model's own softcap or scale).
        chunk_size: First tokens scanned at a time; None for what suits the device.
        screen: `"auto"`: pass over hopeless rows in bfloat16 where that is measured to be fast; `"bf16"`: do it; None: do
            not. The table is the same.
        progress: Show a bar in a terminal, if it takes longer than a second.
        save: A file for the table. If it is there already, it is loaded instead (and refused if it is of other settings or
            another model); the unfinished state is saved beside it every half a minute, and resumed.

    Returns:
        Bi-grams, best first, ties by ids; with the part `log_normalizer`, log sum exp of the first token's logits, for
        log-probabilities.

    Raises:
        ValueError: The path mixes positions or does not exist, ids are not of the vocabulary, an option is not one of its
            values, a logit is not finite, or `save` belongs to something else.

    Source:
        Chen et al., arXiv 2410.06024, jet n-grams.

    Cost:
        Of the order of V^2 d_model multiply-adds; 60 MB for GPT-2 small. See the module.

    Example:
        >>> import tl_jets as tj
        >>> table = jet_bigrams(tj.load_tinydocs(), ["1_mlp", "3_mlp"], per="row", top_k=2, rows=[40, 41, 42])
        >>> sorted(set(table.ids[:, 0].tolist())), len(table)
        ([40, 41, 42], 6)
    """
    options = Options(top_k, per, rows, columns, score, chunk_size, screen, progress)
    job = _job(_Sweep(model, [path], options), "table")
    return job.run(None) if save is None else finish(job, save)


def jet_bigrams_by_path(
    model: Any,
    paths: Literal["each_mlp"] | Sequence[PathInput] = "each_mlp",
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
) -> dict[str, NgramTable]:
    """The best bi-grams of several paths, in one sweep over the vocabulary: tokens are embedded once, buffers shared.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: `"each_mlp"`, every MLP by itself; or paths as `jet_bigrams` takes them.
        top_k: How many bi-grams a path.
        per: See `jet_bigrams`, as for all that follows.
        rows: Ids of the first tokens.
        columns: Ids of the second tokens that may be chosen.
        score: `"logprob"` or `"logit"`.
        chunk_size: First tokens scanned at a time.
        screen: Screening in bfloat16.
        progress: Show a bar.
        folder: Where each table is saved as `<path>.parquet`. Tables that are there are loaded, an unfinished sweep is
            resumed.

    Returns:
        Tables by path.

    Raises:
        ValueError: See `jet_bigrams`; or the model has no MLP.
    """
    if isinstance(paths, str) and paths != "each_mlp":
        raise ValueError(f'paths must be "each_mlp" or a list of paths; got {paths!r}. Use jet_bigrams for one path.')
    given = mlp_steps(ResidualNetwork(model)) if isinstance(paths, str) else list(paths)
    if not given:
        raise ValueError('There must be a path at least; got none. A model without MLPs has the path "direct" only.')
    options = Options(top_k, per, rows, columns, score, chunk_size, screen, progress)
    plan = _Sweep(model, given, options)
    if folder is None:
        return plan.run(list(plan.streams.paths), None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {label: folder / f"{label}{SUFFIX}" for label in plan.streams.paths}
    tables = {label: NgramTable.load(file) for label, file in files.items() if file.exists()}
    for label, table in tables.items():
        check_header(table.header, plan.header(label), files[label])
    missing = [label for label in files if label not in tables]
    if missing:
        state = folder / "unfinished.state"
        tables |= plan.run(missing, state)
        for label in missing:
            tables[label].save(files[label])
        state.unlink(missing_ok=True)
    return {label: tables[label] for label in files}


def bigram_job(model: Any, path: PathInput = "direct", *, name: str | None = None, **options: Any) -> Job:
    """`jet_bigrams` as a job of `tl_jets.ngrams.jobs.sweep`.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        name: Of the file; the path by default.
        **options: Those of `jet_bigrams`, without `save`.
    """
    plan = _Sweep(model, [path], Options(**options))
    return _job(plan, name or next(iter(plan.streams.paths)))


@torch.no_grad()
def bigram_log_normalizers(
    model: Any, path: PathInput = "direct", *, rows: TokenIds | None = None, chunk_size: int | None = None
) -> Float[Tensor, " row"]:
    """Logarithms of the sums of exp the logits after each first token: what its log-probabilities are normalized by.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        rows: Ids of the first tokens; None for all.
        chunk_size: First tokens at a time.

    Returns:
        Nats, in float64; as exact as logits in working precision. Shape [row].

    Raises:
        ValueError: See `jet_bigrams`.

    Cost:
        As `jet_bigrams`.
    """
    plan = _Sweep(model, [path], Options(rows=rows, chunk_size=chunk_size, screen=None))
    (label,) = plan.streams.paths
    tiles = plan.tiles
    found, offset = [], 0.0
    for part in slices(len(plan.rows), plan.chunk_size):
        states = plan.states(plan.streams.embed(plan.rows[part]), label)
        maxima = torch.empty(len(states), tiles.n_blocks, dtype=tiles.dtype, device=tiles.device)
        shifted, applied, offset = tiles.read(states, maxima, offset)
        assert shifted is not None
        found.append((shifted.double() - applied) / LOG2_E)
    return torch.cat(found)


class _Sweep:
    """Paths and options, checked; runs the sweep."""

    def __init__(self, model: Any, paths: Sequence[PathInput], options: Options):
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
        self.chunk_size = default if options.chunk_size is None else options.chunk_size
        if options.top_k < 1 or self.chunk_size < 1:
            raise ValueError(f"top_k and chunk_size must be 1 or more; got {options.top_k} and {self.chunk_size}.")
        self.dtype = self.decoder.compute_dtype(self.streams.embed(self.rows[:1]))
        self.screens = self._screens()

    def _screens(self) -> bool:
        """Whether rows are screened in bfloat16."""
        options = self.options
        if options.screen not in ("auto", "bf16", None):
            raise ValueError(f'screen must be "auto", "bf16" or None; got {options.screen!r}.')
        possible = (
            options.per == "global"
            and options.score == "logprob"
            and self.columns is None
            and self.decoder.logit_scale is not None
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
        """Buffers that all paths share."""
        normalize = self.options.score == "logprob"
        return Tiles(self.decoder, self.dtype, self.device, normalize=normalize, tokens=self.columns)

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return fingerprint(self.network)

    def header(self, label: str) -> dict[str, Any]:
        """What the header of a path's table is."""
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

    def states(self, embed: Tensor, label: str) -> Tensor:
        """What the unembedding reads, a few rows at a time: MLPs are wide."""
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
    def run(self, labels: Sequence[str], state_file: Path | None) -> dict[str, NgramTable]:
        """Sweep over the vocabulary and return the tables of some of the paths."""
        scans = self._scans(labels)
        state = State(state_file, self.header(" + ".join(self.streams.paths)) if state_file else {})
        first, tensors = state.load()
        if first:
            for label, scan in scans.items():
                own = f"{label}/"
                scan.restore(
                    {key.removeprefix(own): x.to(self.device) for key, x in tensors.items() if key.startswith(own)}
                )
        bar = {"unit": "token", "delay": 1, "leave": False, "disable": None if self.options.progress else True}
        with tqdm(total=len(self.rows), initial=first, **bar) as shown:
            for start in range(first, len(self.rows), self.chunk_size):
                ids = self.rows[start : start + self.chunk_size]
                embed = self.streams.embed(ids)
                for label, scan in scans.items():
                    scan.add(self.states(embed, label), ids)
                shown.update(len(ids))
                state.save(start + len(ids), lambda: _named(scans))
        for scan in scans.values():
            scan.close()
        return {label: self._table(label, scan.finish()) for label, scan in scans.items()}

    def _table(self, label: str, best: BestPairs) -> NgramTable:
        ids = best.ids.cpu()
        parts = {"log_normalizer": best.log_normalizers} if self.options.score == "logprob" else {}
        names = token_names(self.network.tokenizer, [ids])
        return NgramTable(ids, best.scores, names, **self.header(label), parts=parts)


def _job(plan: _Sweep, name: str) -> Job:
    (label,) = plan.streams.paths

    def run(state: Path | None) -> NgramTable:
        return plan.run([label], state)[label]

    return Job(name, run, **plan.header(label))


def _named(scans: Mapping[str, Any]) -> dict[str, Tensor]:
    return {f"{label}/{key}": x for label, scan in scans.items() for key, x in scan.state().items()}
