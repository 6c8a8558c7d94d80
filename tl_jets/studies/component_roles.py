"""Roles of MLPs and heads: their own best n-grams, and the overlap with those of other paths and of a text.

The role of an MLP is read from the table of the path through it alone (`embed > 3_mlp > ln_final`); heads have
skip-trigrams, compared with those of other heads. `ablation_check` tests whether the model uses what a table says.
Overlaps have no control: two paths may share bi-grams because both know common tokens (`compare_with_counts`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.options import check_integers
from tl_jets.core.results import Result
from tl_jets.core.tokens import visible
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.ngrams.trigrams import jet_trigrams
from tl_jets.studies.counts import TEXT
from tl_jets.studies.overlap import check_same_vocabulary, share_found
from tl_jets.studies.text_comparison import best_tables, every_path

SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Roles(Result):
    """The best bi-grams of every MLP, and their overlaps.

    Attributes:
        components: The MLPs, in the order of the network.
        labels: Paths: `direct`, every MLP, `mlps`; then `text`, if counts were given.
        tables: The n best bi-grams of each path, by label.
        overlap: Share of bi-grams that two tables have in common. Shape [label, label].
        heads: The n best skip-trigrams of every head; empty unless requested.
    """

    components: list[str]
    labels: list[str]
    tables: dict[str, NgramTable] = field(repr=False)
    overlap: Float[Tensor, "label label"]
    n: int
    heads: dict[str, NgramTable] = field(default_factory=dict, repr=False)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path: overlap with `direct`, `mlps`, `text`, mean overlap with other MLPs or heads, best n-grams."""
        place = {label: i for i, label in enumerate(self.labels)}
        rows = []
        for label in self.labels:
            row: dict[str, Any] = {"path": label}
            for other in (DIRECT, MLPS, TEXT):
                if other in place:
                    row[other] = float(self.overlap[place[label], place[other]])
            others = [place[other] for other in self.components if other != label]
            row["other MLPs"] = float(self.overlap[place[label], others].mean()) if others else float("nan")
            rows.append(row | {"best": _best(self.tables[label])})
        for label, table in self.heads.items():
            shared = [share_found(table.ids, x.ids) for other, x in self.heads.items() if other != label]
            mean = sum(shared) / len(shared) if shared else float("nan")
            rows.append({"path": label, "other heads": mean, "best": _best(table)})
        return pd.DataFrame(rows)

    def side_by_side(self, k: int = 20) -> pd.DataFrame:
        """The k best bi-grams of every path, one column each."""
        return side_by_side(self.tables, k)

    def __repr__(self) -> str:
        heads = f"{len(self.heads)} heads" if self.heads else "heads are not looked at"
        title = f"Roles({len(self.components)} MLPs, the {self.n} best n-grams of each path; {heads})"
        with pd.option_context("display.width", 200, "display.max_colwidth", 90):
            return f"{title}\n{self.to_dataframe().round(3).to_string(index=False)}"


def _best(table: NgramTable) -> str:
    texts = {token: visible(text) for token, text in table.names.items()}
    return ", ".join(" ".join(texts[token] for token in ids) for ids in table.ids[:SHOWN].tolist())


def roles(
    model: Any,
    *,
    counts: NgramTable | None = None,
    unigram: Float[Tensor, " d_vocab"] | None = None,
    n: int = 100,
    heads: bool = False,
    progress: bool = True,
) -> Roles:
    """The n best n-grams of the path through each MLP (and of each head), and their overlaps.

    Args:
        model: A model or a `ResidualNetwork`.
        counts: Bi-grams of a text (`ngram_counts`); the n most frequent ones are compared.
        unigram: Probability of every token, to rank by exact pseudo-joint; None for log-probability. Shape [d_vocab].
        n: Number of n-grams per path.
        heads: Also compute the skip-trigrams of every head (`jet_trigrams`, distance 1).
        progress: Show progress bars.

    Raises:
        ValueError: No MLP, or `counts` of another vocabulary or with fewer than n bi-grams; see `jet_bigrams`.

    Source: Chen et al., arXiv 2410.06024, section 5.1 (table 1). Cost: a sweep over the vocabulary per path; less per head.

    Example:
        >>> import tl_jets as tj
        >>> roles(tj.load_tinydocs(), n=20).labels
        ['direct', '0_mlp', '1_mlp', '2_mlp', '3_mlp', 'mlps']
    """
    check_integers(1, n=n)
    network = ResidualNetwork(model)
    components = mlp_steps(network)
    if not components:
        raise ValueError("Roles are compared over MLPs; this model has none. Heads have skip-trigrams: jet_trigrams.")
    tables = best_tables(network, every_path(network), unigram, n, progress=progress)
    if counts is not None:
        if counts.n != 2 or len(counts) < n:
            raise ValueError(f"counts must be a table of {n} bi-grams or more; got {len(counts)} {counts.n}-grams.")
        check_same_vocabulary(tables[DIRECT], counts)
        frequency = counts.parts.get("count", counts.scores)
        given: dict[str, Any] = {"names": counts.names, "path": TEXT, "parts": counts.parts, "top_k": n}
        tables[TEXT] = NgramTable.ranked(counts.ids, frequency, **given)
    overlap = [[share_found(x.ids, y.ids) for y in tables.values()] for x in tables.values()]
    of_heads: dict[str, NgramTable] = {}
    for layer in sorted({step.layer for step in network.at("head").steps if step.kind == "head"}) if heads else ():
        of_heads |= {table.path: table for table in jet_trigrams(network, layer, top_k=n, progress=progress).values()}
    shares = torch.tensor(overlap, dtype=torch.float64, device="cpu")
    return Roles(components, list(tables), tables, shares, n, of_heads)
