r"""Check by ablation: do the logits of a component's own n-grams fall when the component is ablated?

The best n-grams of the path through an MLP (or the skip-trigrams of a head) become prompts, all tokens but the last, that
begin as the model's own do. The change of the last token's logit under ablation is compared with two controls: the same
n-grams when **another component** of the same kind is ablated, and **last tokens shuffled** among the n-grams. The table
is *confirmed* if the logits fall, and fall further than the mean of the other components and than shuffled last tokens.
Other components that may cost these n-grams as much are `AblationCheck.rivals`: no evidence against the table, because
an early ablation changes what every later component reads.

**Intervals** are 95% percentile bootstraps over n-grams; differences are paired. N-grams that share a token are
resampled together (`units`). Fewer than six units are not judged; below twenty the intervals are somewhat too narrow.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_jets.adapters.callables import CallableModel
from tl_jets.core.intervals import bootstrap_intervals
from tl_jets.core.measures import check_seed
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.options import check_choice, check_integers
from tl_jets.core.protocol import some
from tl_jets.core.results import Result
from tl_jets.interventions.ablation_effects import ablation_effect
from tl_jets.ngrams import jet_bigrams
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import jet_trigrams
from tl_jets.studies.vocabularies import check_table

OWN, SHUFFLED = "own", "shuffled"
# Mean over the other components' ablations.
OTHERS = "others"
# Of the n-grams' change, and of own n-grams under their own ablation minus it.
CHANGE, BEYOND = "change", "beyond"
BELOW, ABOVE, UNCLEAR, NO_INTERVAL = "below 0", "above 0", "not told from 0", "no interval"
# With fewer units no sign is significant at 95%: five fair coins all agree in one case of 16.
LEAST_UNITS = 6
NAMED = 3


@dataclass(frozen=True, eq=False, repr=False)
class AblationCheck(Result):
    """Change of the logits of one component's n-grams under ablation (ablated - clean).

    Attributes:
        step: The component that the n-grams belong to.
        components: The ablated components, one at a time: `step`, then others of its kind.
        prompts: Token ids of the prompts. Shape [ngram, pos].
        own: Change of the logit of each n-gram's last token. Shape [component, ngram].
        shuffled: The same for last tokens of other n-grams. Shape [component, ngram, draw].
    """

    step: str
    components: list[str]
    table: NgramTable = field(repr=False)
    prompts: Int[Tensor, "ngram pos"] = field(repr=False)
    own: Float[Tensor, "component ngram"] = field(repr=False)
    shuffled: Float[Tensor, "component ngram draw"] = field(repr=False)
    mode: str = "zero"
    logit: str = "centered"
    resamples: int = 1000
    seed: int = 0

    @property
    def confirmed(self) -> bool:
        """Whether the logits fall, and further than under the mean of the other ablations and than shuffled ones."""
        return not self._missing()

    @property
    def strongest_other(self) -> str | None:
        """The other component with the largest mean cost (of many, large by chance, too); None without others."""
        return self._others_by_cost()[0] if len(self.components) > 1 else None

    @property
    def rivals(self) -> list[str]:
        """Other components, costliest first, not shown to cost less: the interval of own - other is not below zero."""
        return [label for label in self._others_by_cost() if self._judged[BEYOND, label, OWN]["verdict"] != BELOW]

    @property
    def verdict(self) -> str:
        """The result in words: confirmed or not, what is missing, and which other components cost as much."""
        own = self._judged[CHANGE, self.step, OWN]
        if own["verdict"] == NO_INTERVAL:
            return (
                f"not judged: no intervals with bootstrap={self.resamples} and {self.n_units} different first or last tokens "
                f"({LEAST_UNITS} are needed)"
            )
        strongest, missing = self.strongest_other, self._missing()
        found = f"confirmed against {'shuffled n-grams' if strongest is None else 'the mean of the others'}"
        if missing:
            found = f"not confirmed: no {' and no '.join(missing)} is shown"
        if strongest is None:
            return f"{found}; no other component was ablated"
        more = [label for label in self.rivals if self._judged[BEYOND, label, OWN]["verdict"] == ABOVE]
        unclear = [label for label in self.rivals if label not in more]
        parts = [f"{_listed(more)} cost{'s' if len(more) == 1 else ''} more"] if more else []
        parts += [f"not told apart from {_listed(unclear)}"] if unclear else []
        most = self._judged[CHANGE, strongest, OWN]["mean"]
        return (
            f"{found}; {', '.join(parts) or 'each of them costs less'} (strongest other: {strongest} {most:+.2f}; own "
            f"{own['mean']:+.2f})"
        )

    def summary(self) -> pd.DataFrame:
        """Own n-grams under their own ablation, the controls, and paired differences (negative: own ones fall further)."""
        strongest = self.strongest_other
        rows = {f"own n-grams, {self.step} ablated": (CHANGE, self.step, OWN)}
        if strongest is not None:
            rows[f"own n-grams, others ablated (mean of {len(self.own) - 1})"] = (CHANGE, OTHERS, OWN)
            rows[f"own n-grams, {strongest} ablated (strongest other)"] = (CHANGE, strongest, OWN)
        rows[f"shuffled n-grams, {self.step} ablated"] = (CHANGE, self.step, SHUFFLED)
        if strongest is not None:
            rows["own ablation - others'"] = (BEYOND, OTHERS, OWN)
            rows[f"own ablation - {strongest}'s"] = (BEYOND, strongest, OWN)
        rows["own - shuffled n-grams"] = (BEYOND, self.step, SHUFFLED)
        frame = pd.DataFrame([{"what": what, **self._judged[key]} for what, key in rows.items()])
        controls = [i for i, key in enumerate(rows.values()) if i and key[0] == CHANGE]
        frame.loc[controls, "verdict"] = ""
        return frame

    def to_dataframe(self) -> pd.DataFrame:
        """One row per ablated component and kind of n-gram: mean change, 95% interval, share of n-grams that fell.

        `difference` is paired, own n-grams under their own ablation minus this row; `verdict` is its side of zero.
        """
        rows = []
        for component, kind in itertools.product(self.components, (OWN, SHUFFLED)):
            row = {"ablated": component, "n-grams": kind, **self._judged[CHANGE, component, kind]}
            beyond = self._judged[BEYOND, component, kind]
            names = {"mean": "difference", "low": "difference_low", "high": "difference_high"}
            row |= {name: beyond[end] if rows else math.nan for end, name in names.items()}
            rows.append(row | {"verdict": beyond["verdict"] if rows else ""})
        return pd.DataFrame(rows)

    @cached_property
    def units(self) -> Int[Tensor, " ngram"]:
        """Bootstrap unit of each n-gram: its last token, or its first if there are fewer first tokens."""
        return min((self.table.ids[:, column] for column in (-1, 0)), key=lambda ids: len(ids.unique()))

    @property
    def n_units(self) -> int:
        """Number of bootstrap units."""
        return len(self.units.unique())

    def _missing(self) -> list[str]:
        """What is not shown, of that which confirms the table."""
        required = {"fall": (CHANGE, self.step, OWN)}
        if len(self.components) > 1:
            required["fall beyond the mean of the others"] = (BEYOND, OTHERS, OWN)
        required["fall beyond shuffled n-grams"] = (BEYOND, self.step, SHUFFLED)
        return [name for name, key in required.items() if self._judged[key]["verdict"] != BELOW]

    def _others_by_cost(self) -> list[str]:
        return [self.components[1 + i] for i in self.own[1:].mean(1).argsort(stable=True).tolist()]

    @cached_property
    def _judged(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Mean, interval, share that fell and side of zero by (`CHANGE` or `BEYOND`, ablated component, kind of n-gram)."""
        changes = {(label, OWN): self.own[i] for i, label in enumerate(self.components)}
        changes |= {(label, SHUFFLED): self.shuffled[i].mean(1) for i, label in enumerate(self.components)}
        if len(self.components) > 1:
            changes[OTHERS, OWN] = self.own[1:].mean(0)
        series = {(CHANGE, *key): values for key, values in changes.items()}
        series |= {(BEYOND, *key): self.own[0] - values for key, values in changes.items()}
        values = torch.stack(list(series.values()))
        resamples = self.resamples if self.n_units >= LEAST_UNITS else 0
        ends = bootstrap_intervals(values, units=self.units, resamples=resamples, seed=self.seed)
        columns = torch.stack([values.mean(1), *ends, (values < 0).double().mean(1)], dim=1).tolist()
        rows = [dict(zip(("mean", "low", "high", "fell"), row, strict=True)) for row in columns]
        judged = [row | {"verdict": _sign(row["low"], row["high"])} for row in rows]
        return dict(zip(series, judged, strict=True))

    def __repr__(self) -> str:
        title = (
            f"AblationCheck({self.step}: {len(self.table)} n-grams of path {self.table.path} in {self.n_units} units, {self.mode} "
            f"ablation, change of the {self.logit} logit; {self.verdict})"
        )
        return f"{title}\n{self.summary().round(3).to_string(index=False)}"

    def _body(self) -> str:
        return dataframe_html(self.summary())


def ablation_check(
    model: Any,
    step: str,
    *,
    table: NgramTable | None = None,
    top_k: int = 50,
    mode: Literal["zero", "mean"] = "zero",
    reference: Any = None,
    others: Sequence[str] | int | None = None,
    n_random: int = 20,
    logit: Literal["centered", "raw"] = "centered",
    prepend_bos: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> AblationCheck:
    """Ablate a component and test whether the logits of its own n-grams fall.

    Args:
        model: A `TransformerBridge`, a `HookedTransformer`, or a `ResidualNetwork` of one.
        step: An MLP (`3_mlp`), a head (`L3H2`), or, with a table, an attention sublayer.
        table: Its n-grams (skip-trigrams of distance 1); None computes them.
        top_k: Number of n-grams, the first of a table.
        mode: Replacement of the ablated write: `"zero"`, or `"mean"` over a reference (see `ablation_hooks`).
        reference: For `"mean"`: a prompt, prompts, token ids [batch, pos], or a `Trace`.
        others: Components to compare with: labels, or the number to draw of the same kind; None for all.
        n_random: Number of shuffles of the last tokens.
        logit: `"centered"` over the vocabulary, or `"raw"`.
        prepend_bos: Whether prompts begin with the beginning-of-sequence token; None for the model's default.
        bootstrap: Number of bootstrap resamples.
        seed: Random seed of shuffles, draws and bootstrap.

    Raises:
        ValueError: Unknown step, an attention sublayer without a table, or an invalid option.
        NotImplementedError: Plain callables, or skip-trigrams of another distance.

    Source: Chen et al., arXiv 2410.06024, section 5.1; controls are ours. Cost: two forward passes a component.

    Example:
        >>> import tl_jets as tj
        >>> check = ablation_check(tj.load_tinydocs(), "0_mlp", top_k=10, n_random=5)
        >>> check.components, check.confirmed, check.rivals
        (['0_mlp', '1_mlp', '2_mlp', '3_mlp'], True, [])
    """
    check_choice("logit", logit, ("centered", "raw"))
    check_choice("mode", mode, ("zero", "mean"))
    check_integers(1, top_k=top_k, n_random=n_random)
    check_integers(0, bootstrap=bootstrap)
    check_seed(seed)
    network = ResidualNetwork(model)
    kinds = _kinds(network, step)
    table = _own_ngrams(network, step, kinds[step], table, top_k)
    prompts = _prompts(network, table, prepend_bos)
    draw = np.random.default_rng(seed)
    labels = [step, *_others(kinds, step, others, draw)]
    mask = torch.ones_like(prompts)  # every id is a token here, those of padding too
    given: dict[str, Any] = {"attention_mask": mask, "mode": mode, "reference": reference, "seed": seed}
    targets = _targets(table.ids[:, -1], n_random, draw)
    effect = ablation_effect(network, prompts, labels, targets=targets, **given)
    change = (effect.centered if logit == "centered" else effect.logit)[:, :, 0].cpu()
    return AblationCheck(step, labels, table, prompts, change[..., 0], change[..., 1:], mode, logit, bootstrap, seed)


def _kinds(network: ResidualNetwork, step: str) -> dict[str, str]:
    """The kind of every head and sublayer; ValueError unless `step` is one that can be checked."""
    if isinstance(network.view, CallableModel):
        raise NotImplementedError(
            "Ablations are hooks on a TransformerLens model; a network of plain callables has none. Give it other functions."
        )
    kinds = {s.label: s.kind for granularity in ("head", "sublayer") for s in network.at(granularity).steps}
    if step not in kinds or kinds[step] == "attn_bias":
        raise ValueError(
            f"step must be an MLP, an attention sublayer or a head, one of {some(kinds, 40)}; got {step!r}."
        )
    return kinds


def _targets(last: Int[Tensor, " ngram"], n_random: int, draw: np.random.Generator) -> Int[Tensor, "ngram 1 target"]:
    """The last token of each n-gram, then those that it gets in each shuffle."""
    shuffles = np.stack([draw.permutation(len(last)) for _ in range(n_random)], axis=1)
    return torch.cat([last[:, None], last[torch.from_numpy(shuffles)]], dim=1).unsqueeze(1)


def _own_ngrams(network: ResidualNetwork, step: str, kind: str, table: NgramTable | None, top_k: int) -> NgramTable:
    if table is None:
        if kind == "head":
            layer, head = (int(number) for number in re.findall(r"\d+", step))
            return jet_trigrams(network, layer, head, top_k=top_k, progress=False)
        if kind != "mlp":
            raise ValueError(
                f"MLPs have bi-grams and heads have skip-trigrams; {step} is of kind {kind}. Give a table: ablation_check(model, "
                f"{step!r}, table=...)."
            )
        return jet_bigrams(network, [step], top_k=top_k, progress=False)
    if table.n < 2 or len(table) < 2:
        raise ValueError(f"A table must have two n-grams of two tokens or more; got {len(table)} {table.n}-grams.")
    if table.settings.get("distance", 1) != 1:
        raise NotImplementedError(
            f"Key and query must stand side by side in a prompt; the table is of distance {table.settings['distance']}. Make it "
            "with distance=1."
        )
    check_table(table, network)
    return table[:top_k]


def _prompts(network: ResidualNetwork, table: NgramTable, prepend_bos: bool | None) -> Int[Tensor, "ngram pos"]:
    """All tokens but the last of each n-gram, with the model's default beginning of a prompt."""
    view: Any = network.view
    bos = getattr(network.tokenizer, "bos_token_id", None)
    if prepend_bos is None:
        prepend_bos = bos is not None and bool(getattr(view.cfg, "default_prepend_bos", True))
    prompts = table.ids[:, :-1]
    if not prepend_bos:
        return prompts
    if bos is None:
        raise ValueError("prepend_bos=True needs a tokenizer with a beginning-of-sequence token; the model has none.")
    return torch.cat([torch.full((len(prompts), 1), bos, device="cpu"), prompts], dim=1)


def _sign(low: float, high: float) -> str:
    """On which side of zero an interval lies."""
    return NO_INTERVAL if math.isnan(low) else BELOW if high < 0 else ABOVE if low > 0 else UNCLEAR


def _listed(labels: list[str]) -> str:
    more = len(labels) - NAMED
    return ", ".join(labels[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _others(
    kinds: dict[str, str], step: str, others: Sequence[str] | int | None, draw: np.random.Generator
) -> list[str]:
    same = [label for label, kind in kinds.items() if kind == kinds[step] and label != step]
    if others is None:
        return same
    if isinstance(others, int):
        return [same[i] for i in sorted(draw.permutation(len(same))[: max(0, others)])]
    unknown = [label for label in others if label not in same]
    if unknown:
        raise ValueError(f"Others must be components of the same kind, of {some(same, 40)}; got {unknown}.")
    return list(others)
