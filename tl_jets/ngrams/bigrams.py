r"""Jet bi-grams: next-token scores of a path of the network, for every token of the vocabulary, without a corpus.

.. math::
    \text{score}(z_2 | z_1) = \log \mathrm{softmax}\bigl(\upsilon(x_{\text{path}}(z_1))\bigr)_{z_2}

or another score of the same logits (`tl_jets.ngrams.scoring`). x is the stream of a single token along the path
(`tl_jets.ngrams.streams` lists the paths), without positional embedding, and upsilon the model's decoder: final norm,
unembedding, bias, softcap or scale. `direct` is the order-0 jet of the decoder at the embedding. Tables are exact, and
no V x V matrix is stored (`tl_jets.ngrams.scan`).

Source: Chen et al., *Jet Expansions of Residual Computation* (arXiv 2410.06024), section on jet n-grams, footnote 4.
Cost: V^2 d_model multiply-adds a path (GPT-2 small: 40 forward passes of 1,024 tokens) plus about a tenth, and the
path's MLPs on V tokens. Memory: about 60 MB for GPT-2 small; screening also holds `W_U` in bfloat16.

Example:
    >>> import tl_jets as tj
    >>> list(jet_bigrams_by_path(tj.load_tinydocs(), "each_mlp", top_k=3))      # one sweep over the vocabulary
    ['0_mlp', '1_mlp', '2_mlp', '3_mlp']
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.logit_reader import LOG2_E, check_finite, slices
from tl_jets.core.processes import Distributed
from tl_jets.ngrams.bigram_sweep import BigramSweep, Paths, Per
from tl_jets.ngrams.float32 import full_float32
from tl_jets.ngrams.jobs import Job, finish
from tl_jets.ngrams.scoring import Score
from tl_jets.ngrams.screen import Screen
from tl_jets.ngrams.streams import PathInput, TokenIds
from tl_jets.ngrams.tables import NgramTable


def jet_bigrams(
    model: Any,
    path: PathInput = "direct",
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
    save: str | Path | None = None,
    distributed: Distributed = False,
) -> NgramTable:
    """The best bi-grams of a path over the whole vocabulary.

    Args:
        model: A model or a `ResidualNetwork`. Hooks inside MLPs and norms are applied; hooks on streams are refused.
        path: `"direct"`, `"mlps"`, or MLPs and heads in order: a list (`["1_mlp", "3_mlp"]`) or a label (`"L0H1 > 3_mlp"`);
            `tl_jets.ngrams.streams` lists them.
        top_k: Number of bi-grams.
        per: `"global"`: the best overall; `"row"`: the best of each first token.
        rows: Ids or texts (`[" at"]`) of the first tokens; None for all.
        columns: Of the second tokens; None for all. The softmax is over the whole vocabulary in any case.
        score: `"logprob"`, `"logit"` (after the model's softcap or scale), `"centered"` (minus its mean over the vocabulary) or
            `"lift"` (log-probability minus that of a baseline: what the path says after no token in particular).
        unigram: The baseline of `"lift"`; None for the softmax of the path's mean logits over all first tokens. Shape [d_vocab].
        exclude_self: Leave out a token after itself, which ranks first where embeddings are tied.
        exclude: Ids or texts of tokens to leave out on both sides, such as `untrained_tokens(model).ids`.
        chunk_size: First tokens scanned at a time; None for a default that suits the device.
        screen: `"bf16"` skips hopeless rows in bfloat16, `"auto"` if that is fast, None never; the table is the same.
        progress: Show a bar in a terminal after a second, and say after the first chunk how long a long sweep will take.
        save: File for the table. An existing table with equal settings and model is loaded, another one refused. An
            unfinished sweep is saved beside it every half a minute and resumed by the same version of tl-jets.
        distributed: True or a process group: its processes, all called with the same model and options, divide the rows
            and return the same table. Process 0 reads and writes files.

    Returns:
        Bi-grams, best first, ties by ids. Log-probabilities and lifts have a part `log_normalizer`, log sum exp of logits.

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
    options |= {"unigram": unigram, "exclude_self": exclude_self, "exclude": exclude}
    options |= {"chunk_size": chunk_size, "screen": screen, "distributed": distributed}
    job = BigramSweep.planned(model, [path], saves=save is not None, **options).job()
    return job.run(None) if save is None else finish(job, save)


def jet_bigrams_by_path(
    model: Any, paths: Paths = "each_mlp", *, folder: str | Path | None = None, **options: Any
) -> dict[str, NgramTable]:
    """The best bi-grams of several paths by path, in one sweep, which embeds each token once.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: `"each_mlp"` for each MLP alone, or a list of paths as in `jet_bigrams`.
        folder: Folder for the tables, `<path>.parquet`. Existing tables are loaded and an unfinished sweep is resumed.
        **options: Options of `jet_bigrams` but for `save`: `top_k` bi-grams a path, and so on. Errors are its own, too.
    """
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
    tiles, offset = plan.tiles, math.nan

    def read(part: slice) -> Tensor:
        nonlocal offset
        states = plan.streams.states(plan.streams.embed(plan.rows[part]), label)
        maxima = torch.empty(len(states), tiles.n_blocks, dtype=tiles.dtype, device=tiles.device)
        sums, offset = tiles.read(states, maxima, offset)
        assert sums is not None
        check_finite(sums.shift, plan.rows[part])
        return (sums.shift.double() - sums.offset) / LOG2_E

    return torch.cat(plan.processes.map(read, list(slices(len(plan.rows), plan.chunk_size)))).to(plan.device)
