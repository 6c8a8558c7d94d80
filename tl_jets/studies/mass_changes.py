r"""How the probability mass of word lists changed from one model to others, each change beside control lists.

.. math::
    \text{change} = \text{mass}_{\text{model}} - \text{mass}_{\text{first model}}, \qquad
    \text{mass} = \frac1n \sum_{(z_1, z_2)} P(z_2 | z_1)
    \quad \text{or} \quad \frac1n \sum_z \frac{1}{|C|} \sum_{c \in C} P(z | c)

over the bi-grams of a list (`tl_jets.studies.masses`), and over its words of one token, after random first tokens C, which
are the same for all models. They are two rows of the result, and never added: within a word P(z2|z1) is larger by orders of
magnitude.

The 95% interval is a **paired** percentile bootstrap: words are resampled (`mass`), with their change. It says nothing of the
choice of C. Three kinds of control lists, the same in all models:

=============  ==========================================  =====================================================
control        bi-gram (z1, z2)                            word of one token
=============  ==========================================  =====================================================
`shuffled`     z2 of another bi-gram of the list           none (NaN)
`matched`      both tokens as frequent                     as frequent
`as_likely`    z1 as frequent, and the token of z2's rank  as likely after C in the first model
               after it, in the first model
=============  ==========================================  =====================================================

The first two are nearly always small, so that any change of a list that has mass exceeds theirs. `as_likely` says whether
associations as strong, of no special meaning, changed as much. Tokens are as frequent if the lengths of their embeddings
in the first model (or their unigram) are among the nearest hundred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.intervals import Reduce, bootstrap_intervals, central
from tl_jets.core.measures import check_seed
from tl_jets.core.model_marks import model_mark
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.results import Result
from tl_jets.core.tokens import token_names, visible
from tl_jets.ngrams.scoring import check_unigram
from tl_jets.ngrams.streams import PathInput, Tokenize
from tl_jets.studies.masses import WordInput, read_list, units_of
from tl_jets.studies.matched_tokens import frequency_key, matched
from tl_jets.studies.pairs import RowScores, with_shuffles
from tl_jets.studies.vocabularies import check_vocabulary, vocabulary_of

BIGRAMS, TOKENS = "bi-grams", "tokens"
CONTROLS = ("shuffled", "matched", "as_likely")


@dataclass(frozen=True, eq=False, repr=False)
class MassChange(Result):
    """Masses of word lists in several models, and their changes.

    Attributes:
        models: Names of the models; changes are against the first.
        lists: Name of each row's list.
        kinds: What each row is of: the list's `bi-grams`, or its words of one token, `tokens`.
        sizes: Number of distinct bi-grams or tokens of each row.
        masses: Mean or sum over the list of probabilities. Shape [row, model].
        intervals: 95% paired bootstrap interval of each change; NaN for one word. Shape [row, model, 2].
        controls: Masses of control lists, by kind; NaN where a row has none. Shape [row, model, control] each.
        texts: Bi-gram or token of each entry.
        row_of: Row of each entry. Shape [entry].
        entries: Probability of each bi-gram or token. Shape [entry, model].
        reduce: `"mean"` or `"sum"`.
        path: Path of the n-grams.
        contexts: Number of first tokens before words of one token.
        matched_by: What makes tokens as frequent: `"embedding norm"` or `"unigram"`.
        seed: Random seed.
        marks: Mark of each model.
    """

    models: list[str]
    lists: list[str]
    kinds: list[str]
    sizes: list[int]
    masses: Float[Tensor, "row model"]
    intervals: Float[Tensor, "row model 2"]
    controls: dict[str, Tensor] = field(repr=False)
    texts: list[str] = field(repr=False)
    row_of: Int[Tensor, " entry"] = field(repr=False)
    entries: Float[Tensor, "entry model"] = field(repr=False)
    reduce: str
    path: str
    contexts: int
    matched_by: str
    seed: int
    marks: list[str]

    @property
    def changes(self) -> Float[Tensor, "row model"]:
        """Masses minus those of the first model. Shape [row, model]."""
        return self.masses - self.masses[:, :1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per list, kind and model but the first: masses, change and its interval, central 95% of controls' changes.

        `beyond` names the controls whose interval the change lies outside of.
        """
        rows = []
        for i, (name, kind) in enumerate(zip(self.lists, self.kinds, strict=True)):
            for j in range(1, len(self.models)):
                change = float(self.changes[i, j])
                low, high = self.intervals[i, j].tolist()
                row: dict[str, Any] = {"list": name, "kind": kind, "size": self.sizes[i], "model": self.models[j]}
                row |= {"first": float(self.masses[i, 0]), "mass": float(self.masses[i, j]), "change": change}
                row |= {"low": low, "high": high}
                beyond = []
                for control, values in self.controls.items():
                    low, high = central((values[i, j] - values[i, 0]).numpy())
                    row |= {f"{control}_low": low, f"{control}_high": high}
                    beyond += [control] if change < low or change > high else []
                rows.append(row | {"beyond": ", ".join(beyond)})
        return pd.DataFrame(rows)

    def largest(self, k: int = 10, *, model: str | None = None) -> pd.DataFrame:
        """The k bi-grams or tokens that changed most in a model (None: the last), relative to their size.

        Relative means |log(after / before)|; the column `change` is of probabilities.
        """
        check_integers(1, k=k)
        check_choice("model", model, [None, *self.models[1:]])
        before, after = self.entries[:, 0], self.entries[:, -1 if model is None else self.models.index(model)]
        ratio = (after / before).log()
        best = ratio.abs().nan_to_num(0.0, posinf=float("inf")).sort(descending=True, stable=True).indices[:k]
        rows = self.row_of[best].tolist()
        columns: dict[str, Any] = {
            "list": [self.lists[i] for i in rows],
            "text": [self.texts[i] for i in best.tolist()],
        }
        columns |= {"first": before[best].tolist(), "mass": after[best].tolist()}
        return pd.DataFrame(columns | {"change": (after - before)[best].tolist(), "log_ratio": ratio[best].tolist()})

    def __repr__(self) -> str:
        frame = self.to_dataframe()
        shown = frame[["list", "kind", "size", "model", "first", "mass", "change", "low", "high", "beyond"]]
        title = f"MassChange({self.reduce} over each list, path {self.path}; against {self.models[0]}; beyond: of control lists)"
        return f"{title}\n{shown.to_string(index=False, float_format='%.3g')}"


def mass_change(
    models: Mapping[str, Any],
    lists: Mapping[str, WordInput],
    *,
    path: PathInput = "direct",
    tokenize: Tokenize | None = None,
    reduce: Reduce = "mean",
    unigram: Float[Tensor, " d_vocab"] | None = None,
    contexts: int | None = 512,
    controls: int = 40,
    seed: int = 0,
    bootstrap: int = 1000,
    progress: bool = True,
) -> MassChange:
    """Masses of word lists in two or more models of one vocabulary, and their changes beside those of control lists.

    Args:
        models: Models by name; changes are against the first.
        lists: Lists by name, each as in `mass`: bi-grams, or words with their leading space. Words of one token count, too.
        path: A path, as in `jet_bigrams`.
        tokenize: Function from a text to ids that replaces the model's tokenizer.
        reduce: Whether a mass is the `"mean"` or the `"sum"` over the list.
        unigram: Probability of every token: weight of first tokens, and what control tokens are matched by. Shape [d_vocab].
        contexts: Number of random first tokens before words of one token; None for all.
        controls: Number of control lists of each kind; below 39 their interval is from minimum to maximum.
        seed: Random seed of controls, contexts and bootstrap.
        bootstrap: Number of bootstrap resamples.
        progress: Show a bar in a terminal over models and lists.

    Raises:
        ValueError: Fewer than two models, no list, different vocabularies, or an option or list is invalid; see `mass`.

    Source: Chen et al., arXiv 2410.06024 (toxicity of base and chat models); paired intervals, words of one token and control
    lists are ours. Cost: each model reads every first token of lists and controls, and the contexts, in float64.

    Example:
        >>> import tl_jets as tj
        >>> models = {"docs": tj.load_tinydocs(), "code": tj.load_tinycode()}
        >>> found = mass_change(models, {"phrases": [(" more", " than"), (" such", " as"), " file"]}, contexts=32, controls=3)
        >>> found.kinds, found.changes.shape
        (['bi-grams', 'tokens'], torch.Size([2, 2]))
    """
    check_choice("reduce", reduce, get_args(Reduce))
    check_integers(0, controls=controls, bootstrap=bootstrap)
    check_integers(1, contexts=1 if contexts is None else contexts)
    check_seed(seed)
    readers = _readers(models, path)
    prior = None if unigram is None else check_unigram(unigram, size=readers[0].d_vocab)
    plans, means, n_contexts = _planned(readers, lists, tokenize, prior, contexts, controls, seed)
    values = []  # [list, entry, model] of each plan: the list itself, then its controls
    for plan in tqdm(plans, unit="list", delay=1, leave=False, disable=None if progress else True):
        sides = [mean[plan.ids] for mean in means] if plan.kind == TOKENS else _probabilities(readers, plan.ids, prior)
        values.append(torch.stack(sides, dim=-1))
    about = {"models": list(models), "reduce": reduce, "path": readers[0].path, "contexts": n_contexts, "seed": seed}
    about |= {"marks": [model_mark(reader.network) for reader in readers]}
    about |= {"matched_by": "embedding norm" if unigram is None else "unigram"}
    return _result(readers[0], plans, values, controls, bootstrap, about)


class _Plan(NamedTuple):
    """A row of the result: its entries, those of its control lists, and the bootstrap unit of each entry."""

    name: str
    kind: str
    ids: Int[Tensor, "list entry *pair"]
    units: Int[Tensor, " entry"]


def _readers(models: Mapping[str, Any], path: PathInput) -> list[RowScores]:
    """The path in each model; ValueError unless there are two or more, of one vocabulary."""
    if not isinstance(models, Mapping) or len(models) < 2:
        raise ValueError(
            f'models must be two models or more by name, {{"base": a, "chat": b}}; got {models!r:.80}. For one model, take mass.'
        )
    readers = [RowScores(model, path) for model in models.values()]
    vocabulary = vocabulary_of(readers[0].network)
    for name, reader in zip(models, readers, strict=True):
        check_vocabulary(vocabulary, vocabulary_of(reader.network), f"model {name!r}")
    return readers


def _planned(
    readers: list[RowScores],
    lists: Mapping[str, WordInput],
    tokenize: Tokenize | None,
    prior: Float[Tensor, " d_vocab"] | None,
    contexts: int | None,
    controls: int,
    seed: int,
) -> tuple[list[_Plan], list[Float[Tensor, " d_vocab"]], int]:
    """The rows of the result; each model's mean probabilities after the contexts, if needed; and the number of these."""
    base = readers[0]
    sources = {name: read_list(base, words, tokenize) for name, words in lists.items()}
    if not sources or any(not len(pairs) and not alone for pairs, _, alone in sources.values()):
        raise ValueError(
            f"lists must be one or more lists of words or bi-grams by name, none of them empty; got {lists!r:.80}."
        )
    means, n_contexts = [], 0
    if any(alone for *_, alone in sources.values()):
        first, weights = _contexts(base, prior, contexts, seed)
        means, n_contexts = [_mean_probabilities(reader, first, weights) for reader in readers], len(first)
    key, draw = frequency_key(base.streams, prior), np.random.default_rng(seed)
    plans = []
    for name, (pairs, items, alone) in sources.items():
        if len(pairs):
            plans.append(_of_pairs(base, name, pairs, items, key, controls, seed, draw))
        if alone:
            tokens = torch.tensor(alone, device="cpu").unique()
            ids = torch.cat([tokens[None], *(matched(tokens, x, controls, draw) for x in (key, means[0]))])
            plans.append(_Plan(name, TOKENS, ids, torch.arange(len(tokens), device="cpu")))
    return plans, means, n_contexts


def _contexts(
    base: RowScores, prior: Float[Tensor, " d_vocab"] | None, contexts: int | None, seed: int
) -> tuple[Int[Tensor, " token"], Float[Tensor, " token"]]:
    """First tokens before words of one token, and their weights: random ones, or all."""
    size = base.n_tokens
    draw = torch.Generator().manual_seed(seed)
    if contexts is None or (prior is None and contexts >= size):
        every = torch.arange(size, device="cpu")
        weights = torch.ones(size, dtype=torch.float64, device="cpu") if prior is None else prior[:size]
        return every, weights / weights.sum()
    if prior is None:
        first = torch.randperm(size, generator=draw, device="cpu")[:contexts]
    else:
        first = torch.multinomial(prior[:size], contexts, replacement=True, generator=draw)
    return first, torch.full((contexts,), 1 / contexts, dtype=torch.float64, device="cpu")


def _mean_probabilities(
    reader: RowScores, first: Int[Tensor, " token"], weights: Float[Tensor, " token"]
) -> Float[Tensor, " d_vocab"]:
    """Weighted mean of the probabilities after some first tokens."""
    total = torch.zeros(reader.d_vocab, dtype=torch.float64, device="cpu")
    for scores, _, row, mine in reader.rows(first):
        of_row = torch.zeros(len(scores), dtype=torch.float64, device="cpu").index_add_(0, row, weights[mine])
        total += (of_row.to(scores) @ scores.exp()).cpu()
    return total


def _of_pairs(
    base: RowScores,
    name: str,
    pairs: Int[Tensor, "pair 2"],
    items: Int[Tensor, " pair"],
    key: Float[Tensor, " id"],
    controls: int,
    seed: int,
    draw: np.random.Generator,
) -> _Plan:
    """The distinct bi-grams of a list, and its controls."""
    distinct, place = pairs.unique(dim=0, return_inverse=True)
    n = len(distinct)
    either = matched(distinct.flatten(), key, 2 * controls, draw).view(2, controls, n, 2)
    ranks = torch.empty(n, dtype=torch.long, device="cpu")
    for scores, _, row, mine in base.rows(distinct[:, 0]):
        order = scores.cpu().argsort(descending=True, stable=True)
        ranks[mine] = (order[row] == distinct[mine, 1:]).nonzero()[:, 1]
    first = either[1, :, :, 0].flatten()
    second, ranks = torch.empty_like(first), ranks.repeat(controls)
    for scores, _, row, mine in base.rows(first) if controls else ():
        second[mine] = scores.cpu().argsort(descending=True, stable=True)[row, ranks[mine]]
    as_likely = torch.stack([first, second], dim=1).view(controls, n, 2)
    ids = torch.cat([with_shuffles(distinct, controls, seed), either[0], as_likely])
    return _Plan(name, BIGRAMS, ids, units_of(place, items))


def _probabilities(
    readers: list[RowScores], ids: Int[Tensor, "list pair 2"], prior: Float[Tensor, " d_vocab"] | None
) -> list[Float[Tensor, "list pair"]]:
    """P(z2|z1) of bi-grams in each model, times the unigram of z1 if any."""
    weights = 1.0 if prior is None else prior[ids[..., 0]]
    return [reader.of(ids.flatten(0, 1))[0].exp().view(ids.shape[:2]) * weights for reader in readers]


def _controls(masses: list[Tensor], plans: list[_Plan], count: int) -> dict[str, Float[Tensor, "row model control"]]:
    """Masses of control lists by kind, from those of each plan's lists [list, model]; NaN where a plan has none."""
    shape = (len(plans), masses[0].shape[1], count)
    found = {name: torch.full(shape, torch.nan, dtype=torch.float64, device="cpu") for name in CONTROLS}
    for i, (values, plan) in enumerate(zip(masses, plans, strict=True)):
        for name, own in zip(CONTROLS[plan.kind == TOKENS :], values[1:].split(count) if count else (), strict=False):
            found[name][i] = own.T
    return found


def _result(
    base: RowScores, plans: list[_Plan], values: list[Tensor], controls: int, bootstrap: int, about: dict[str, Any]
) -> MassChange:
    """The result, from the probabilities [list, entry, model] of each plan's lists."""
    masses = [x.mean(1) if about["reduce"] == "mean" else x.sum(1) for x in values]
    own, sizes = [x[0] for x in values], [x.shape[1] for x in values]
    options: dict[str, Any] = {"resamples": bootstrap, "seed": about["seed"], "reduce": about["reduce"]}
    changes = [((x - x[:, :1]).T, plan.units) for x, plan in zip(own, plans, strict=True)]
    names = token_names(base.network.tokenizer, [plan.ids[0] for plan in plans])
    entries = [entry for plan in plans for entry in plan.ids[0].reshape(len(plan.units), -1).tolist()]
    return MassChange(
        lists=[plan.name for plan in plans],
        kinds=[plan.kind for plan in plans],
        sizes=sizes,
        masses=torch.stack([x[0] for x in masses]),
        intervals=torch.stack([bootstrap_intervals(x, units=units, **options).T for x, units in changes]),
        controls=_controls(masses, plans, controls),
        texts=[" ".join(visible(names[token]) for token in entry) for entry in entries],
        row_of=torch.arange(len(plans), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu")),
        entries=torch.cat(own),
        **about,
    )
