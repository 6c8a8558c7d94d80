"""N-grams over checkpoints: when a path of the model learns them. One model is in memory at a time.

A generator of (step, copy of the model) may follow a training run: it is advanced after each evaluation. The control of
the hit ratio shuffles the reference's second tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.measures import check_seed
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.results import Result
from tl_jets.core.tokens import token_names, visible
from tl_jets.ngrams import fingerprint
from tl_jets.ngrams.jobs import FILE_NAME
from tl_jets.ngrams.streams import PathInput, VocabularyStreams
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.overlap import hit_ratio, share_found
from tl_jets.studies.pairs import PairInput, RowScores, read_pairs, with_shuffles
from tl_jets.studies.text_comparison import best_tables, every_path
from tl_jets.studies.vocabularies import check_vocabulary, vocabulary_of

Checkpoint = str | int
Loader = Callable[[Any], Any]
Models = Loader | Mapping[Checkpoint, Any] | Iterable[tuple[Checkpoint, Any]]
Reference = NgramTable | Literal["last"]


@dataclass(frozen=True, eq=False, repr=False)
class Track(Result):
    """Scores of given bi-grams and hit ratios over checkpoints, along one path.

    Attributes:
        checkpoints: Names of the checkpoints.
        pairs: The given bi-grams as texts; empty if none were given.
        scores: Their log-probabilities in nats. Shape [checkpoint, pair].
        hit_ratio: Share of the reference's n best bi-grams among the checkpoint's; NaN without one. Shape [checkpoint].
        n: Number of bi-grams of the hit ratio; 0 without a reference.
        hit_control: Hit ratios with the reference's second tokens shuffled. Shape [checkpoint, control].
        tables: The n best bi-grams of each checkpoint; empty without a reference.
    """

    checkpoints: list[Checkpoint]
    pairs: list[str]
    scores: Float[Tensor, "checkpoint pair"]
    hit_ratio: Float[Tensor, " checkpoint"]
    n: int
    path: str
    fingerprints: list[str] = field(repr=False)
    hit_control: Float[Tensor, "checkpoint control"] = field(repr=False)
    tables: list[NgramTable] = field(repr=False)

    def __repr__(self) -> str:
        title = f"Track({len(self.checkpoints)} checkpoints, {len(self.pairs)} bi-grams, path {self.path})"
        return f"{title}\n{self.to_dataframe().to_string(index=False, max_cols=8)}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per checkpoint: hit ratio and mean control (with a reference), mean score, score of each bi-gram."""
        columns: dict[str, Any] = {"checkpoint": self.checkpoints}
        if self.n:
            columns["hit_ratio"] = self.hit_ratio.tolist()
            if self.hit_control.shape[1]:
                columns["hit_control"] = self.hit_control.mean(1).tolist()
        if self.pairs:
            columns["mean_score"] = self.scores.mean(1).tolist()
        frame = pd.DataFrame(columns)
        return pd.concat([frame, pd.DataFrame(self.scores.numpy(), columns=self.pairs)], axis=1)


def track(
    models: Models,
    checkpoints: Sequence[Checkpoint] | None = None,
    *,
    pairs: PairInput | None = None,
    reference: Reference | None = None,
    n: int = 1000,
    path: PathInput = "direct",
    unigram: Float[Tensor, " d_vocab"] | None = None,
    controls: int = 20,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
) -> Track:
    """Scores of given bi-grams, and hit ratios against a reference, over checkpoints of a model.

    Args:
        models: A function from a checkpoint to its model, an iterable of (checkpoint, model), or a mapping.
        checkpoints: Arguments of the function, in order; None otherwise.
        pairs: Bi-grams to score, as in `pair_scores`.
        reference: A table whose n best bi-grams are looked for among those of each checkpoint (for counts of a text,
            also give its unigram), or `"last"` for the table of the last checkpoint, whose own hit ratio is 1.
        n: Number of bi-grams of the hit ratio.
        path: A path, as in `jet_bigrams`.
        unigram: Probability of every token, to rank by exact pseudo-joint; None for log-probability. Shape [d_vocab].
        controls: Number of shuffles of the reference's second tokens.
        seed: Random seed of the shuffles.
        progress: Show progress bars.
        folder: Save the sweeps here, one subfolder per checkpoint; an interrupted study resumes.

    Raises:
        ValueError: Neither pairs nor a reference; no checkpoint; different vocabularies; a reference with fewer than
            n bi-grams; or a `folder` without a reference, with unsuitable file names, or with other tables.

    Source: Chen et al., arXiv 2410.06024, section 5.2 (training dynamics); the control is ours.
    Cost: per checkpoint, a sweep over the vocabulary if there is a reference, and the first tokens of `pairs`.
    """
    options: dict[str, Any] = {"pairs": pairs, "reference": reference, "n": n, "unigram": unigram, "controls": controls}
    options |= {"seed": seed, "progress": progress, "folder": folder}
    (found,) = track_by_path(models, checkpoints, paths=[path], **options).values()
    return found


def track_by_path(
    models: Models,
    checkpoints: Sequence[Checkpoint] | None = None,
    *,
    paths: Sequence[PathInput] | None = None,
    pairs: PairInput | None = None,
    reference: Reference | None = None,
    n: int = 1000,
    unigram: Float[Tensor, " d_vocab"] | None = None,
    controls: int = 20,
    seed: int = 0,
    progress: bool = True,
    folder: str | Path | None = None,
) -> dict[str, Track]:
    """`Track` by path: each checkpoint is loaded once, and one sweep makes the tables of all its paths.

    `paths` is a list of paths, None for `direct`, every MLP, and `mlps`. All other arguments and errors are those of
    `track`; a reference table serves every path, and `"last"` is the last checkpoint's table of the same path.

    Example:
        >>> import tl_jets as tj
        >>> found = track_by_path({"docs": tj.load_tinydocs()}, paths=["direct", "mlps"], pairs=[(" more", " than")])
        >>> list(found), found["mlps"].pairs
        (['direct', 'mlps'], ['·more ·than'])
    """
    _check_options(pairs, reference, n, controls, seed, folder)
    vocabulary = None
    names: list[Checkpoint] = []
    prints: list[str] = []
    texts: list[str] = []
    scores: dict[str, list[Tensor]] = {}
    tables: dict[str, list[NgramTable]] = {}
    for name, network in _one_at_a_time(models, checkpoints):
        vocabulary = vocabulary or vocabulary_of(network)
        check_vocabulary(vocabulary, vocabulary_of(network), f"checkpoint {name!r}")
        paths = paths or every_path(network)
        labels = list(VocabularyStreams(network, paths).paths)
        if len(labels) < len(paths):
            raise ValueError(f"Each path must be given once; got {list(paths)}.")
        for label in labels:
            of_path = scores.setdefault(label, [])
            if pairs is not None:
                texts, values = _scores(network, label, pairs)
                of_path.append(values)
        if reference is not None:
            own = None if folder is None else Path(folder) / _file_name(name)
            for label, table in best_tables(network, paths, unigram, n, progress=progress, folder=own).items():
                tables.setdefault(label, []).append(table)
        prints.append(fingerprint(network))
        names.append(name)
        del network
    if not names:
        raise ValueError("There must be a checkpoint at least; got none. Is the generator used up?")
    found = {}
    for label, values in scores.items():
        own_tables = tables.get(label, [])
        hits = _hits(own_tables, reference, n, controls, seed, len(names))
        kept, size = torch.stack(values) if values else hits[:, :0], n if own_tables else 0
        found[label] = Track(names, texts, kept, hits[:, 0], size, label, prints, hits[:, 1:], own_tables)
    return found


def _check_options(pairs: Any, reference: Any, n: int, controls: int, seed: int, folder: str | Path | None) -> None:
    """Refuse what can be refused before a model is loaded."""
    if pairs is None and reference is None:
        raise ValueError("There must be something to track: give pairs, a reference, or both.")
    table = reference if isinstance(reference, NgramTable) else None
    if table is None and reference not in (None, "last"):
        raise ValueError(
            f'reference must be a table of n-grams, "last" for that of the last checkpoint, or None; got {reference!r}. For '
            "another checkpoint give its table, jet_bigrams(model, path, top_k=n)."
        )
    check_integers(1, n=n)
    check_integers(0, controls=controls)
    check_seed(seed)
    if table is not None and len(table) < n:
        raise ValueError(
            f"n must be at most the rows of the reference; got {n} and a reference of {len(table)} rows. Take a smaller n, or a "
            "longer table."
        )
    if folder is not None and reference is None:
        raise ValueError(
            "folder keeps the sweeps that a reference is looked for in; give a reference, or leave it out."
        )


def _scores(network: ResidualNetwork, path: str, pairs: PairInput) -> tuple[list[str], Float[Tensor, " pair"]]:
    """Texts of given bi-grams, and their log-probabilities."""
    reader = RowScores(network, path)
    ids = read_pairs(reader, pairs)
    named = token_names(network.tokenizer, [ids])
    return [" ".join(visible(named[token]) for token in pair) for pair in ids.tolist()], reader.of(ids)[0]


def _hits(
    tables: list[NgramTable], reference: Reference | None, n: int, controls: int, seed: int, count: int
) -> Float[Tensor, "checkpoint list"]:
    """Hit ratios of tables against a reference, and against the reference with second tokens shuffled; NaN without."""
    if reference is None:
        return torch.full((count, 1), math.nan, dtype=torch.float64, device="cpu")
    reference = reference if isinstance(reference, NgramTable) else tables[-1]
    shuffled = with_shuffles(reference.ids[:n], controls, seed)[1:]
    rows = [
        [hit_ratio(table, reference, n), *(share_found(table.ids[:n], pairs) for pairs in shuffled)] for table in tables
    ]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _one_at_a_time(
    models: Any, checkpoints: Sequence[Checkpoint] | None
) -> Iterator[tuple[Checkpoint, ResidualNetwork]]:
    """(checkpoint, network) pairs, holding no model while the next one is loaded."""
    if callable(models):
        if checkpoints is None:
            raise ValueError("A function that loads checkpoints must be told which: track(load, [1000, 2000], ...).")
        for name in checkpoints:
            yield name, ResidualNetwork(models(name))
        return
    if checkpoints is not None:
        raise ValueError("checkpoints are what a function is called with; give (checkpoint, model) without them.")
    source = iter(models.items() if isinstance(models, Mapping) else models)
    while (item := next(source, None)) is not None:
        name, network = item[0], ResidualNetwork(item[1])
        del item
        yield name, network
        del network


def _file_name(checkpoint: Checkpoint) -> str:
    if not FILE_NAME.fullmatch(str(checkpoint)):
        raise ValueError(
            f"Checkpoints must have names of files to be kept in a folder; got {checkpoint!r}. Call it something else: "
            "track(lambda name: load(files[name]), list(files), ...)."
        )
    return str(checkpoint)
