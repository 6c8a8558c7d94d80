"""What each MLP and head adds: its own best n-grams, and how they overlap with those of other paths and of a text.

A component's role is read off the table of the path that passes through it alone (`embed > 3_mlp > ln_final`). Whether the
model uses what the table says is another question: `ablation_check`. Overlaps are counts, without a control: two paths may share
bi-grams because both know common tokens (`compare_with_counts` shuffles those), and no share of the 100 best is a share of what
two components do. Attention heads have skip-trigrams (`heads=True`), which overlap with those of other heads only.

Source: Chen et al., arXiv 2410.06024, section 5.1 (roles of components; table 1).

Cost: one sweep over the vocabulary for every path, less for every head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import Shown
from tl_jets.core.options import check_integers
from tl_jets.core.tokens import visible
from tl_jets.ngrams import jet_bigrams_by_path
from tl_jets.ngrams.streams import DIRECT, MLPS, mlp_steps
from tl_jets.ngrams.tables import NgramTable, rank, side_by_side
from tl_jets.ngrams.trigrams import jet_trigrams
from tl_jets.studies.counts import TEXT
from tl_jets.studies.overlap import check_same_vocabulary, check_unigram, share_found
from tl_jets.studies.text_comparison import best_joint

SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class Roles(Shown):
    """The best bi-grams of every MLP, and their overlaps.

    Attributes:
        components: The MLPs, in the order of the network.
        labels: Paths: `direct`, every MLP, `mlps`; then `text`, if counts were given.
        tables: The n best bi-grams of each, by label.
        overlap: Share of bi-grams that two tables have in common. Shape [label, label].
        n: How many n-grams a table has.
        heads: The n best skip-trigrams of every head; empty if they were not asked for.
    """

    components: list[str]
    labels: list[str]
    tables: dict[str, NgramTable] = field(repr=False)
    overlap: Float[Tensor, "label label"]
    n: int
    heads: dict[str, NgramTable] = field(default_factory=dict, repr=False)

    def to_dataframe(self) -> pd.DataFrame:
        """A row a path: overlap with `direct`, `mlps`, `text`, the mean over the (other) MLPs or heads, its best n-grams."""
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
        """The k best bi-grams of every path, a column each."""
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
    """What each MLP (and head) adds, read off the n-grams of the path through it alone.

    Args:
        model: A model or a `ResidualNetwork`.
        counts: Bi-grams of a text (`ngram_counts`), to compare the n most frequent ones with.
        unigram: A probability for every token: tables are then by pseudo-joint, exactly, and by log-probability otherwise.
            Shape [d_vocab].
        n: How many n-grams of each path.
        heads: Look at the skip-trigrams of every head, too (`jet_trigrams`, at distance 1).
        progress: Show bars.

    Returns:
        `Roles`.

    Raises:
        ValueError: The model has no MLP, `counts` are of another vocabulary or fewer than n; see `jet_bigrams`.

    Source:
        Chen et al., arXiv 2410.06024, section 5.1.

    Example:
        >>> import tl_jets as tj
        >>> found = roles(tj.load_tinydocs(), n=20)
        >>> found.labels
        ['direct', '0_mlp', '1_mlp', '2_mlp', '3_mlp', 'mlps']
    """
    check_integers(1, n=n)
    network = ResidualNetwork(model)
    components = mlp_steps(network)
    if not components:
        raise ValueError("Roles are compared over MLPs; this model has none. Heads have skip-trigrams: jet_trigrams.")
    paths = [DIRECT, *components, MLPS]
    if unigram is None:
        tables = jet_bigrams_by_path(network, paths, top_k=n, progress=progress)
    else:
        unigram = check_unigram(unigram, size=network.decoder.d_vocab)
        tables = best_joint(network, paths, unigram, n, progress=progress)
    if counts is not None:
        if counts.n != 2 or len(counts) < n:
            raise ValueError(f"counts must be a table of {n} bi-grams or more; got {len(counts)} {counts.n}-grams.")
        check_same_vocabulary(tables[DIRECT], counts)
        order = rank(counts.ids, counts.parts.get("count", counts.scores))[:n]
        parts = {name: x[order] for name, x in counts.parts.items()}
        tables[TEXT] = NgramTable.ranked(
            counts.ids[order], parts.get("count", counts.scores[order]), names=counts.names, path=TEXT, parts=parts
        )
    overlap = [[share_found(x.ids, y.ids) for y in tables.values()] for x in tables.values()]
    found = head_tables(network, n, progress=progress) if heads else {}
    return Roles(components, list(tables), tables, torch.tensor(overlap, dtype=torch.float64, device="cpu"), n, found)


def head_tables(model: Any, n: int, *, progress: bool = True) -> dict[str, NgramTable]:
    """The n best skip-trigrams of every head of a model, by label."""
    layers = sorted({step.layer for step in ResidualNetwork(model).at("head").steps if step.kind == "head"})
    found = (jet_trigrams(model, layer, top_k=n, progress=progress) for layer in layers)
    return {table.path: table for tables in found for table in tables.values()}
