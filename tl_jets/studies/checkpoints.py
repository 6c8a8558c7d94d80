"""N-grams over checkpoints: when a path of the model learns them, one model in memory at a time.

Example:
    >>> import tl_jets as tj
    >>> loaders = {"docs": tj.load_tinydocs, "docs again": tj.load_tinydocs}
    >>> found = track(lambda name: loaders[name](), list(loaders), pairs=[(" more", " than")], path="mlps", reference="last", n=20)
    >>> found.hit_ratio.tolist()
    [1.0, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.network import ResidualNetwork
from tl_jets.ngrams import fingerprint, jet_bigrams
from tl_jets.ngrams.streams import PathInput
from tl_jets.studies.overlap import hit_ratio
from tl_jets.studies.pairs import PairInput, RowScores, read_pairs
from tl_jets.studies.text_comparison import best_joint
from tl_jets.studies.vocabularies import Vocabulary
from tl_jets.tables import NgramTable
from tl_jets.tokens import token_names, visible

Checkpoint = str | int
Loader = Callable[[Any], Any]


@dataclass(frozen=True, eq=False, repr=False)
class Track:
    """Scores of given bi-grams and hit ratios over checkpoints.

    Attributes:
        checkpoints: What the checkpoints are called.
        pairs: The given bi-grams as texts; empty if none were given.
        scores: Their log-probabilities in nats. Shape [checkpoint, pair].
        hit_ratio: Share of the reference's n best bi-grams among each checkpoint's; NaN without a reference. Shape [checkpoint].
        n: How many bi-grams the hit ratio is of; 0 without a reference.
        path: The path.
        fingerprints: Of each checkpoint's weights.
    """

    checkpoints: list[Checkpoint]
    pairs: list[str]
    scores: Float[Tensor, "checkpoint pair"]
    hit_ratio: Float[Tensor, " checkpoint"]
    n: int
    path: str
    fingerprints: list[str] = field(repr=False)

    def __repr__(self) -> str:
        title = f"Track({len(self.checkpoints)} checkpoints, {len(self.pairs)} bi-grams, path {self.path})"
        return f"{title}\n{self.to_dataframe().to_string(index=False, max_cols=8)}"

    def to_dataframe(self) -> pd.DataFrame:
        """A row a checkpoint: hit ratio (if there is a reference), mean score, then each bi-gram's score."""
        columns: dict[str, Any] = {"checkpoint": self.checkpoints}
        if self.n:
            columns["hit_ratio"] = self.hit_ratio.tolist()
        if self.pairs:
            columns["mean_score"] = self.scores.mean(1).tolist()
        frame = pd.DataFrame(columns)
        return pd.concat([frame, pd.DataFrame(self.scores.numpy(), columns=self.pairs)], axis=1)


def track(
    models: Loader | Mapping[Checkpoint, Any] | Iterable[tuple[Checkpoint, Any]],
    checkpoints: Sequence[Checkpoint] | None = None,
    *,
    pairs: PairInput | None = None,
    reference: NgramTable | Literal["last"] | None = None,
    n: int = 1000,
    path: PathInput = "direct",
    unigram: Float[Tensor, " d_vocab"] | None = None,
    progress: bool = True,
) -> Track:
    """Scores of given bi-grams, and hit ratios against a reference, over checkpoints of a model.

    Args:
        models: A function from a checkpoint to its model, or (checkpoint, model) from a generator: they are asked for one at a
            time, and let go of before the next. Or models by checkpoint, which are in memory anyway.
        checkpoints: What the function is called with, in order; None otherwise.
        pairs: Bi-grams to be scored, as `pair_scores` takes them.
        reference: A table whose n best bi-grams are looked for among those of each checkpoint; `"last"` for that of the last one.
        n: How many.
        path: As `jet_bigrams` takes it.
        unigram: A probability for every token: tables are then by pseudo-joint, exactly, and by log-probability otherwise.
            Shape [d_vocab].
        progress: Show bars.

    Returns:
        A `Track`.

    Raises:
        ValueError: Neither pairs nor a reference, no checkpoint, checkpoints of different vocabularies, or a reference with fewer
            than n bi-grams.

    Source:
        Chen et al., arXiv 2410.06024, section 5.2 (training dynamics).

    Cost:
        For each checkpoint a sweep over the vocabulary if there is a reference, and the pairs' first tokens.
    """
    if pairs is None and reference is None:
        raise ValueError("There must be something to track: give pairs, a reference, or both.")
    vocabulary, path_label = None, ""
    names: list[Checkpoint] = []
    texts: list[str] = []
    scores, tables, prints = [], [], []
    for name, network in _one_at_a_time(models, checkpoints):
        vocabulary = vocabulary or Vocabulary.of(network)
        vocabulary.check(Vocabulary.of(network), f"checkpoint {name!r}")
        reader = RowScores(network, path)
        path_label = reader.path
        if pairs is not None:
            ids = read_pairs(reader, pairs)
            scores.append(reader.of(ids)[0])
            named = token_names(network.tokenizer, [ids])
            texts = texts or [" ".join(visible(named[token]) for token in pair) for pair in ids.tolist()]
        if reference is not None:
            tables.append(_best(network, path, unigram, n, progress))
        prints.append(fingerprint(network))
        names.append(name)
        del network, reader
    if not names:
        raise ValueError("There must be a checkpoint at least; got none. Is the generator used up?")
    known = tables[-1] if isinstance(reference, str) else reference
    hits = [math.nan] * len(names) if known is None else [hit_ratio(table, known, n) for table in tables]
    return Track(
        checkpoints=names,
        pairs=texts,
        scores=torch.stack(scores) if scores else torch.empty(len(names), 0, dtype=torch.float64),
        hit_ratio=torch.tensor(hits, dtype=torch.float64),
        n=0 if reference is None else n,
        path=path_label,
        fingerprints=prints,
    )


def _one_at_a_time(
    models: Any, checkpoints: Sequence[Checkpoint] | None
) -> Iterator[tuple[Checkpoint, ResidualNetwork]]:
    """(checkpoint, network), holding no model while the next is made."""
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


def _best(network: ResidualNetwork, path: PathInput, unigram: Tensor | None, n: int, progress: bool) -> NgramTable:
    if unigram is None:
        return jet_bigrams(network, path, top_k=n, progress=progress)
    (table,) = best_joint(network, [path], unigram, n, progress=progress).values()
    return table
