"""N-grams over checkpoints: when a path of the model learns them, one model in memory at a time.

Checkpoints may be files, or a training run that is under way: a generator that yields (step, copy of the model) is asked for the
next one when the last has been read. The hit ratio stands beside the same with the reference's second tokens shuffled.

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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.measures import check_seed
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import Shown
from tl_jets.core.options import check_integers
from tl_jets.core.tokens import token_names, visible
from tl_jets.ngrams import fingerprint, jet_bigrams_by_path
from tl_jets.ngrams.jobs import FILE_NAME
from tl_jets.ngrams.streams import DIRECT, MLPS, PathInput, VocabularyStreams, mlp_steps
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.overlap import hit_ratio, share_found
from tl_jets.studies.pairs import PairInput, RowScores, read_pairs
from tl_jets.studies.text_comparison import best_joint
from tl_jets.studies.vocabularies import Vocabulary

Checkpoint = str | int
Loader = Callable[[Any], Any]
Models = Loader | Mapping[Checkpoint, Any] | Iterable[tuple[Checkpoint, Any]]
Reference = NgramTable | Literal["last"]


@dataclass(frozen=True, eq=False, repr=False)
class Track(Shown):
    """Scores of given bi-grams and hit ratios over checkpoints, along one path.

    Attributes:
        checkpoints: What the checkpoints are called.
        pairs: The given bi-grams as texts; empty if none were given.
        scores: Their log-probabilities in nats. Shape [checkpoint, pair].
        hit_ratio: Share of the reference's n best bi-grams among each checkpoint's; NaN without a reference. Shape [checkpoint].
        n: How many bi-grams the hit ratio is of; 0 without a reference.
        path: The path.
        fingerprints: Of each checkpoint's weights.
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
        """A row a checkpoint: hit ratio and the mean of its control (if there is a reference), mean score, each bi-gram's score."""
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
        models: A function from a checkpoint to its model, or (checkpoint, model) from a generator: they are asked for one at a
            time, and let go of before the next. Or models by checkpoint, which are in memory anyway.
        checkpoints: What the function is called with, in order; None otherwise.
        pairs: Bi-grams to be scored, as `pair_scores` takes them.
        reference: A table whose n best bi-grams are looked for among those of each checkpoint (counts of a text: give its
            unigram, too); `"last"` for that of the last one, whose own hit ratio is 1 by construction.
        n: How many.
        path: As `jet_bigrams` takes it.
        unigram: A probability for every token: tables are then by pseudo-joint, exactly, and by log-probability otherwise.
            Shape [d_vocab].
        controls: How often the second tokens of the reference are shuffled.
        seed: Of shuffling.
        progress: Show bars.
        folder: Where each checkpoint's sweep is kept, in a folder of its name: what was finished when a process was killed is
            loaded, an unfinished sweep is resumed.

    Returns:
        A `Track`.

    Raises:
        ValueError: Neither pairs nor a reference, no checkpoint, checkpoints of different vocabularies, a reference with fewer
            than n bi-grams, or a `folder` without a reference, for a checkpoint whose name is no file name, or that has tables of
            something else.

    Source:
        Chen et al., arXiv 2410.06024, section 5.2 (training dynamics); the control is ours.

    Cost:
        For each checkpoint a sweep over the vocabulary if there is a reference, and the pairs' first tokens.
    """
    (found,) = track_by_path(
        models,
        checkpoints,
        paths=[path],
        pairs=pairs,
        reference=reference,
        n=n,
        unigram=unigram,
        controls=controls,
        seed=seed,
        progress=progress,
        folder=folder,
    ).values()
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
    """`track` along several paths: each checkpoint is loaded once, and its tables come from one sweep.

    Args:
        models: See `track`, as for all that follows.
        checkpoints: What the function is called with.
        paths: Paths; None for `direct`, every MLP, and `mlps`.
        pairs: Bi-grams to be scored.
        reference: A table, of one path for all paths; `"last"` for that of the last checkpoint, of each path its own.
        n: How many bi-grams of the reference.
        unigram: A probability for every token. Shape [d_vocab].
        controls: How often second tokens are shuffled.
        seed: Of shuffling.
        progress: Show bars.
        folder: Where sweeps are kept.

    Returns:
        Tracks by path.

    Raises:
        ValueError: See `track`.

    Example:
        >>> import tl_jets as tj
        >>> found = track_by_path({"docs": tj.load_tinydocs()}, paths=["direct", "mlps"], pairs=[(" more", " than")])
        >>> list(found), found["mlps"].pairs
        (['direct', 'mlps'], ['·more ·than'])
    """
    if pairs is None and reference is None:
        raise ValueError("There must be something to track: give pairs, a reference, or both.")
    if not (
        reference is None or isinstance(reference, NgramTable) or (isinstance(reference, str) and reference == "last")
    ):
        raise ValueError(
            f'reference must be a table of n-grams, "last" for that of the last checkpoint, or None; got {reference!r}. For '
            "another checkpoint give its table, jet_bigrams(model, path, top_k=n)."
        )
    check_integers(1, n=n)
    check_integers(0, controls=controls)
    check_seed(seed)
    if isinstance(reference, NgramTable) and len(reference) < n:
        raise ValueError(
            f"n must be at most the rows of the reference; got {n} and a reference of {len(reference)} rows. Take a smaller n, or "
            "a longer table."
        )
    if folder is not None and reference is None:
        raise ValueError(
            "folder keeps the sweeps that a reference is looked for in; give a reference, or leave it out."
        )
    vocabulary = None
    names: list[Checkpoint] = []
    texts: list[str] = []
    prints: list[str] = []
    scores: dict[str, list[Tensor]] = {}
    tables: dict[str, list[NgramTable]] = {}
    for name, network in _one_at_a_time(models, checkpoints):
        vocabulary = vocabulary or Vocabulary.of(network)
        vocabulary.check(Vocabulary.of(network), f"checkpoint {name!r}")
        paths = paths or _every_path(network)
        if len(VocabularyStreams(network, paths).paths) < len(paths):
            raise ValueError(f"Each path must be given once; got {list(paths)}.")
        for path in paths:
            reader = RowScores(network, path)
            mine = scores.setdefault(reader.path, [])
            if pairs is not None:
                ids = read_pairs(reader, pairs)
                mine.append(reader.of(ids)[0])
                named = token_names(network.tokenizer, [ids])
                texts = texts or [" ".join(visible(named[token]) for token in pair) for pair in ids.tolist()]
            del reader
        if reference is not None:
            own = None if folder is None else Path(folder) / _file_name(name)
            for label, table in _best(network, paths, unigram, n, progress, own).items():
                tables.setdefault(label, []).append(table)
        prints.append(fingerprint(network))
        names.append(name)
        del network
    if not names:
        raise ValueError("There must be a checkpoint at least; got none. Is the generator used up?")
    found = {}
    for label, mine in scores.items():
        own = tables.get(label, [])
        known = own[-1] if isinstance(reference, str) else reference
        hits, controlled = (
            torch.full((len(names),), math.nan, device="cpu").double(),
            torch.empty(len(names), 0, device="cpu").double(),
        )
        if isinstance(known, NgramTable):
            hits, controlled = _hits(own, known, n, controls, seed)
        found[label] = Track(
            checkpoints=names,
            pairs=texts,
            scores=torch.stack(mine) if mine else torch.empty(len(names), 0, dtype=torch.float64, device="cpu"),
            hit_ratio=hits,
            n=n if own else 0,
            path=label,
            fingerprints=prints,
            hit_control=controlled,
            tables=own,
        )
    return found


def _every_path(network: ResidualNetwork) -> list[PathInput]:
    steps = mlp_steps(network)
    return [DIRECT, *steps, *([MLPS] if steps else [])]


def _hits(
    tables: list[NgramTable], reference: NgramTable, n: int, controls: int, seed: int
) -> tuple[Float[Tensor, " checkpoint"], Float[Tensor, "checkpoint control"]]:
    """Hit ratios of tables against a reference, and against the reference with second tokens shuffled."""
    hits = [hit_ratio(table, reference, n) for table in tables]
    first, second = reference.ids[:n].unbind(1)
    draw = np.random.default_rng(seed)
    shuffles = [second[torch.from_numpy(draw.permutation(n))] for _ in range(controls)]
    shuffled = [torch.stack([first, other], dim=1) for other in shuffles]
    controlled = [[share_found(table.ids[:n], pairs) for pairs in shuffled] for table in tables]
    return torch.tensor(hits, dtype=torch.float64, device="cpu"), torch.tensor(
        controlled, dtype=torch.float64, device="cpu"
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


def _file_name(checkpoint: Checkpoint) -> str:
    if not FILE_NAME.fullmatch(str(checkpoint)):
        raise ValueError(
            f"Checkpoints must have names of files to be kept in a folder; got {checkpoint!r}. Call it something else: "
            "track(lambda name: load(files[name]), list(files), ...)."
        )
    return str(checkpoint)


def _best(
    network: ResidualNetwork,
    paths: Sequence[PathInput],
    unigram: Tensor | None,
    n: int,
    progress: bool,
    folder: Path | None,
) -> dict[str, NgramTable]:
    if unigram is None:
        return jet_bigrams_by_path(network, paths, top_k=n, progress=progress, folder=folder)
    return best_joint(network, paths, unigram, n, progress=progress, folder=folder)
