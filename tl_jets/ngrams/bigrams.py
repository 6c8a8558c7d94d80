r"""Jet bi-grams: what a path of the network says after every token of the vocabulary, without a corpus.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

with the path's stream x of a single token (`tl_jets.ngrams.streams` lists the paths: `direct`, MLPs, nested MLPs, the
attention-free stream) and the model's own decoder upsilon: final norm, unembedding, bias, softcap or scale. `direct` is the
order-0 jet of the decoder at the embedding. No position enters. The table is exact: ids, order and scores are those of the
whole V x V matrix, which is never held (`tl_jets.ngrams.scan`).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), section on jet n-grams, footnote 4.

Cost: V^2 d_model multiply-adds a path (GPT-2 small: 40 forward passes of 1,024 tokens) and about a tenth of it for everything
else; the MLPs of the path on V tokens. Memory: about 60 MB for GPT-2 small; with screening `W_U` in bfloat16 besides. Several
processes divide it (`tl_jets.ngrams.shards`).

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
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.logit_reader import LOG2_E, slices
from tl_jets.ngrams.bigram_sweep import BigramSweep, Options, Per, planned
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.jobs import SUFFIX, Job, finish, saved
from tl_jets.ngrams.scan import Score, check_finite
from tl_jets.ngrams.screen import Screen
from tl_jets.ngrams.shards import Distributed
from tl_jets.ngrams.streams import PathInput
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.token_ids import TokenIds


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
        model: A model or a `ResidualNetwork`. Hooks inside MLPs and norms are respected; hooks on streams are refused.
        path: `"direct"`, `"mlps"`, or MLP steps in the order of the network: a list (`["1_mlp", "3_mlp"]`), or a label as the
            `path` of a table is (`"3_mlp"`, `"1_mlp > 3_mlp"`).
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
            another model); the unfinished state is saved beside it every half a minute, and resumed by the same version of
            tl-jets. Whether it can be written is found out first.
        distributed: True, or a process group: all its processes call this with the same model and options, divide the rows,
            and return the same table. Files are those of process 0. See `tl_jets.ngrams.shards`.

    Returns:
        Bi-grams, best first, ties by ids; with the part `log_normalizer`, log sum exp of the first token's logits, for
        log-probabilities.

    Raises:
        ValueError: The path mixes positions or does not exist, ids are not of the vocabulary, an option is not one of its
            values, a logit is not finite, or `save` belongs to something else; or processes were given different things.
        RuntimeError: Another process failed.

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
    options = Options(top_k, per, rows, columns, score, chunk_size, screen, progress, distributed)
    job = _job(planned(model, [path], options, saves=save is not None), "table")
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
    distributed: Distributed = False,
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
        distributed: Divide the rows among processes.

    Returns:
        Tables by path.

    Raises:
        ValueError: See `jet_bigrams`; or the model has no MLP.
    """
    options = Options(top_k, per, rows, columns, score, chunk_size, screen, progress, distributed)
    plan = planned(model, paths, options, saves=folder is not None)
    labels = list(plan.streams.paths)
    if folder is None:
        return plan.run(labels, None)
    folder = Path(folder)
    files = {label: folder / f"{label}{SUFFIX}" for label in labels}
    tables = plan.processes.first(lambda: _found(plan, files))
    missing = [label for label in labels if label not in tables]
    if missing:
        state = folder / "unfinished.state"
        tables |= plan.run(missing, state)

        def save() -> None:
            for label in missing:
                tables[label].save(files[label])
            state.unlink(missing_ok=True)

        plan.processes.first(save)
    return {label: tables[label] for label in labels}


def bigram_job(model: Any, path: PathInput = "direct", *, name: str | None = None, **options: Any) -> Job:
    """`jet_bigrams` as a job of `tl_jets.ngrams.jobs.sweep`.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        name: Of the file; the path by default.
        **options: Those of `jet_bigrams`, without `save`.
    """
    plan = planned(model, [path], Options(**options), saves=True)
    return _job(plan, name or next(iter(plan.streams.paths)))


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
    """Logarithms of the sums of exp the logits after each first token: what its log-probabilities are normalized by.

    Args:
        model: A model or a `ResidualNetwork`.
        path: See `jet_bigrams`.
        rows: Ids of the first tokens; None for all.
        chunk_size: First tokens at a time.
        distributed: Divide the rows among processes.

    Returns:
        Nats, in float64; as exact as logits in working precision. Shape [row].

    Raises:
        ValueError: See `jet_bigrams`.

    Cost:
        As `jet_bigrams`.
    """
    options = Options(rows=rows, chunk_size=chunk_size, screen=None, distributed=distributed)
    plan = planned(model, [path], options)
    (label,) = plan.streams.paths
    tiles, offset = plan.tiles, 0.0

    def read(part: slice) -> Tensor:
        nonlocal offset
        states = plan.states(plan.streams.embed(plan.rows[part]), label)
        maxima = torch.empty(len(states), tiles.n_blocks, dtype=tiles.dtype, device=tiles.device)
        shifted, applied, offset = tiles.read(states, maxima, offset)
        assert shifted is not None
        check_finite(shifted, plan.rows[part])
        return (shifted.double() - applied) / LOG2_E

    return torch.cat(plan.processes.map(read, list(slices(len(plan.rows), plan.chunk_size)))).to(plan.device)


def _found(plan: BigramSweep, files: Mapping[str, Path]) -> dict[str, NgramTable]:
    """The tables that are there already; the folder is made."""
    for file in files.values():
        file.parent.mkdir(parents=True, exist_ok=True)
    tables = {label: saved(file, plan.header(label)) for label, file in files.items()}
    return {label: table for label, table in tables.items() if table is not None}


def _job(plan: BigramSweep, name: str) -> Job:
    (label,) = plan.streams.paths

    def run(state: Path | None) -> NgramTable:
        return plan.run([label], state)[label]

    return Job(name, run, **plan.header(label), processes=plan.processes)
