r"""Compare the bi-grams of each path with those of a text, beside two controls.

- **Hit ratio**: share of the text's n most frequent bi-grams (ties by ids) among the path's n best by pseudo-joint,
  log P(z2|z1) + log unigram(z1), with the unigram of the text.
- **Rank correlation** (Spearman) of log P(z2|z1) of the path and of the text, over the n most frequent bi-grams.

Two controls: the same with the *second tokens shuffled* among the n bi-grams (the effect of common tokens, or of
chance), and a row `unigram (no model)`, the bi-grams of two independent draws of the text's tokens.

A measure is above its controls if it exceeds the row without a model and the 97.5% quantile of the shuffled lists (of
fewer than 39 their maximum). Only the verdict `hits and order`, both measures above, shows that a path knows which token
follows which. On another text of its kind, a hit ratio p varies by about sqrt(p (1 - p) / n) or more, a correlation r by
about (1 - r^2) / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.core.intervals import central
from tl_jets.core.logit_reader import rank
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.results import Result
from tl_jets.ngrams import jet_bigrams, jet_bigrams_by_path
from tl_jets.ngrams.join import best_sums
from tl_jets.ngrams.scoring import check_unigram
from tl_jets.ngrams.streams import DIRECT, MLPS, PathInput, mlp_steps
from tl_jets.ngrams.tables import NgramTable
from tl_jets.studies.overlap import pseudo_joint, share_found
from tl_jets.studies.pairs import RowScores, list_digest, with_shuffles
from tl_jets.studies.vocabularies import check_table

NO_MODEL = "unigram (no model)"
VERDICTS = {
    (True, True): "hits and order",
    (True, False): "hits only",
    (False, True): "order only",
    (False, False): "neither",
}
# Bi-grams per first token in the first sweep.
PER_ROW = 32
# Relative tolerance of ties between scores.
TIE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class TextComparison(Result):
    """Comparison of paths with the bi-grams of a text.

    Attributes:
        labels: Paths, then `unigram (no model)`.
        hit_ratio: Share of the text's n most frequent bi-grams among each path's n best. Shape [path].
        correlation: Rank correlation of conditional log-probabilities over these bi-grams. Shape [path].
        hit_control: Hit ratios with second tokens shuffled. Shape [path, control].
        correlation_control: Rank correlations with second tokens shuffled. Shape [path, control].
        tables: The n best bi-grams of each path by pseudo-joint.
        text: Settings of the table of counts.
    """

    labels: list[str]
    hit_ratio: Float[Tensor, " path"]
    correlation: Float[Tensor, " path"]
    hit_control: Float[Tensor, "path control"]
    correlation_control: Float[Tensor, "path control"]
    n: int
    tables: dict[str, NgramTable] = field(repr=False)
    text: dict[str, Any] = field(repr=False)
    fingerprint: str = ""

    @property
    def verdicts(self) -> dict[str, str]:
        """`hits and order`, `hits only`, `order only` or `neither` by path, of those that can be judged."""
        above = []
        for values, controls in ((self.hit_ratio, self.hit_control), (self.correlation, self.correlation_control)):
            ends = [central(row)[1] for row in controls.numpy()]
            above.append([x > max(end, float(values[-1])) for x, end in zip(values.tolist(), ends, strict=True)])
        known = ~(self.correlation.isnan() | self.correlation[-1].isnan() | self.correlation_control.isnan().any(1))
        known &= self.hit_control.shape[1] > 0
        rows = zip(self.labels[:-1], known.tolist(), *above, strict=False)
        return {label: VERDICTS[hits, order] for label, judged, hits, order in rows if judged}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path: both measures, mean and 95% interval of their controls, and the verdict."""
        frame, verdicts = pd.DataFrame({"path": self.labels}), self.verdicts
        for name, control in (("hit_ratio", "hit_control"), ("correlation", "correlation_control")):
            controls = getattr(self, control)
            frame[name] = getattr(self, name).numpy()
            frame[control] = controls.mean(1).numpy()
            frame[[f"{control}_low", f"{control}_high"]] = [central(row) for row in controls.numpy()]
        return frame.assign(verdict=[verdicts.get(label, "") for label in self.labels])

    def summary(self) -> pd.DataFrame:
        """`to_dataframe` as text, with each control and its interval in one column."""
        frame = self.to_dataframe()
        shown = frame[["path"]].copy()
        for title, name in (("hit ratio", "hit"), ("rank correlation", "correlation")):
            shown[title] = frame["hit_ratio" if name == "hit" else name].map("{:.2f}".format)
            ends = frame[[f"{name}_control", f"{name}_control_low", f"{name}_control_high"]].itertuples(index=False)
            texts = ["n/a" if math.isnan(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in ends]
            shown[f"{title}, shuffled"] = texts
        return shown.assign(verdict=frame["verdict"])

    def __repr__(self) -> str:
        shown = self.summary().to_string(index=False)
        return f"TextComparison(the {self.n:,} most frequent bi-grams of {self.text['total']:,} in the text)\n{shown}"

    def _body(self) -> str:
        return dataframe_html(self.summary(), rows=len(self.labels))


def compare_with_counts(
    model: Any,
    counts: NgramTable,
    *,
    paths: Sequence[PathInput] | None = None,
    n: int = 1000,
    controls: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> TextComparison:
    """Compare the bi-grams of each path with those of a text.

    Args:
        model: A model or a `ResidualNetwork`.
        counts: All bi-grams of the text in the model's vocabulary: `ngram_counts(tokens)`.
        paths: Paths; None for `direct`, every MLP, and `mlps`.
        n: Number of bi-grams to compare; fewer if the text has fewer.
        controls: Number of shuffled lists; a 95% interval of them needs 39 or more.
        seed: Random seed of the shuffles.
        progress: Show progress bars.

    Raises:
        ValueError: `counts` are not all bi-grams of a text, or have another vocabulary; see `jet_bigrams`.

    Source: Chen et al., arXiv 2410.06024, sections 5.2 (hit ratio) and 5.3; the controls are ours. Cost: per path, a
    sweep over the first tokens of the text, and again over those that may have more than `PER_ROW` of the n bi-grams.

    Example:
        >>> import tl_jets as tj
        >>> counts = tj.studies.ngram_counts([5, 6, 7, 5, 6])
        >>> compare_with_counts(tj.load_tinydocs(), counts, paths=["mlps"], controls=3).labels
        ['mlps', 'unigram (no model)']
    """
    network = ResidualNetwork(model)
    _check_counts(counts, network)
    paths = every_path(network) if paths is None else paths
    order = rank(counts.ids, counts.parts["count"])[:n]
    wanted = counts.ids[order]
    real = (counts.parts["count"] / counts.parts["context_count"]).log()[order]
    unigram, second = (_frequencies(counts, place, network.decoder.d_vocab) for place in (0, 1))
    tables = best_joint(network, paths, unigram, len(order), progress=progress)
    lists = with_shuffles(wanted, controls, seed)
    every = lists.flatten(0, 1)
    best = [*(table.ids for table in tables.values()), _best_products(unigram, second, len(order))]
    scores = [*(RowScores(network, label).of(every)[0] for label in tables), second.log()[every[:, 1]]]
    hits = torch.tensor(
        [[share_found(ids, pairs) for pairs in lists] for ids in best], dtype=torch.float64, device="cpu"
    )
    correlations = torch.stack([_correlations(values.view(len(lists), -1), real) for values in scores])
    text = dict(counts.settings) | {"compared": list_digest(wanted)}
    print_of_model = next(iter(tables.values())).fingerprint
    measures = (hits[:, 0], correlations[:, 0], hits[:, 1:], correlations[:, 1:])
    return TextComparison([*tables, NO_MODEL], *measures, len(order), tables, text, print_of_model)


def every_path(network: ResidualNetwork) -> list[str]:
    """`direct`, every MLP, and `mlps`."""
    steps = mlp_steps(network)
    return [DIRECT, *steps, *([MLPS] if steps else [])]


def best_tables(
    network: ResidualNetwork, paths: Sequence[PathInput], unigram: Tensor | None, n: int, **options: Any
) -> dict[str, NgramTable]:
    """The n best bi-grams of each path: by exact pseudo-joint with a unigram, or by log-probability without."""
    if unigram is None:
        return jet_bigrams_by_path(network, paths, top_k=n, **options)
    return best_joint(network, paths, check_unigram(unigram, size=network.decoder.d_vocab), n, **options)


def best_joint(
    model: Any,
    paths: Sequence[PathInput],
    unigram: Float[Tensor, " d_vocab"],
    n: int,
    *,
    progress: bool = True,
    folder: str | Path | None = None,
) -> dict[str, NgramTable]:
    """The exact n best bi-grams of each path by pseudo-joint, over all pairs whose first token the unigram knows.

    Args:
        model: A model or a `ResidualNetwork`.
        paths: Paths, as in `jet_bigrams_by_path`.
        unigram: Probability of every token. Shape [d_vocab].
        n: Number of bi-grams; fewer if there are fewer pairs.
        progress: Show progress bars.
        folder: Where the underlying sweep is saved and resumed, see `jet_bigrams_by_path`.
    """
    d_vocab = len(unigram)
    rows = unigram.nonzero()[:, 0].tolist()
    n = min(n, len(rows) * d_vocab)
    width = min(PER_ROW, d_vocab)
    network = ResidualNetwork(model)
    found = {}
    tables = jet_bigrams_by_path(network, paths, per="row", top_k=width, rows=rows, progress=progress, folder=folder)
    for label, table in tables.items():
        joint = pseudo_joint(table, unigram)
        unsure = _rows_with_more(joint, n) if width < d_vocab else []
        if unsure:
            options: dict[str, Any] = {"per": "row", "top_k": min(n, d_vocab), "rows": unsure, "progress": progress}
            joint = _with_rows(joint, pseudo_joint(jet_bigrams(network, label, **options), unigram), unsure)
        best = joint[:n]
        whole = {"per": "global", "top_k": n, "of": "all pairs", "exact_top": len(best)}
        found[label] = replace(best, settings={**best.settings, **whole})
    return found


def _rows_with_more(joint: NgramTable, n: int) -> list[int]:
    """First tokens that may have one of the n best pairs among those left out: their last kept pair ranks that high."""
    first, row = joint.ids[:, 0].unique(return_inverse=True)
    if len(joint) < n:
        return first.tolist()
    last = torch.full((len(first),), math.inf, dtype=torch.float64, device="cpu")
    last.scatter_reduce_(0, row, joint.scores, "amin")
    threshold = float(joint.scores[n - 1])
    return first[last >= threshold - TIE * (1 + abs(threshold))].tolist()


def _with_rows(joint: NgramTable, other: NgramTable, rows: list[int]) -> NgramTable:
    """Replace the rows of some first tokens by those of another table."""
    kept = joint.where(id_1=sorted(set(joint.ids[:, 0].tolist()) - set(rows)))
    return NgramTable.ranked(
        torch.cat([kept.ids, other.ids]),
        torch.cat([kept.scores, other.scores]),
        names={**joint.names, **other.names},
        parts={name: torch.cat([x, other.parts[name]]) for name, x in kept.parts.items()},
        **joint.header,
    )


def _correlations(scores: Tensor, real: Tensor) -> Float[Tensor, " list"]:
    """Rank correlations of each row of scores with `real`; NaN where either is constant."""
    ranks = pd.DataFrame(scores.T.numpy()).rank()
    varies = ranks.std(ddof=0) > 0
    found = ranks.corrwith(pd.Series(real.numpy()).rank()) if len(real) > 1 else ranks.sum() * math.nan
    return torch.tensor(found.where(varies).tolist(), dtype=torch.float64, device="cpu")


def _frequencies(counts: NgramTable, place: int, d_vocab: int) -> Float[Tensor, " d_vocab"]:
    """Relative frequency of every token in one column of a table of counts."""
    total = torch.zeros(d_vocab, dtype=torch.float64, device="cpu")
    total.index_add_(0, counts.ids[:, place], counts.parts["count"])
    return total / total.sum()


def _best_products(first: Tensor, second: Tensor, n: int) -> Int[Tensor, "pair 2"]:
    """The n pairs with the largest first(z1) second(z2), ties by ids."""
    i, j = best_sums(first.log(), second.log(), n)
    pairs = torch.stack([i, j], dim=1)
    return pairs[rank(pairs, first[i] * second[j])[:n]]


def _check_counts(counts: NgramTable, network: ResidualNetwork) -> None:
    complete = counts.settings.get("ngram") == "counts" and counts.settings.get("min_count") == 1
    if counts.n != 2 or not complete or int(counts.parts["count"].sum()) != counts.settings["total"]:
        raise ValueError(
            f"Paths are compared with all bi-grams of a text; got {len(counts)} {counts.n}-grams of path {counts.path!r}. Take "
            "ngram_counts(tokens) as it is, with min_count=1."
        )
    if int(counts.ids.max()) >= network.decoder.d_vocab:
        raise ValueError(
            f"A text must be in the model's vocabulary of {network.decoder.d_vocab} tokens; it has token "
            f"{int(counts.ids.max())}. Count tokens of the model's tokenizer."
        )
    check_table(counts, network)
