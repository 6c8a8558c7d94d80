"""Activation patching of single writes, beside what attribution patching and jets of higher order say of it.

In the corrupted run the write of a site moves from x' to the clean run's x, and everything later responds. With f the logit
difference as a function of that write,

==================  ==========================================  =====================================================
method              value                                       what it is
==================  ==========================================  =====================================================
``activation``      f(x) - f(x')                                activation patching (denoising), exact
``attribution``     f'(x') (x - x')                             attribution patching: the order-1 jet at x'
``jet 2``, ...      J^k f(x')(x) - f(x')                        the order-k jet at x', its Taylor series to order k
==================  ==========================================  =====================================================

Where the series converges, higher orders come closer to `activation`; where it does not, they go away from it, and the table
says so. Source: Nanda 2023, *Attribution Patching*; Chen et al., arXiv 2410.06024, eq. 7 (jets).

Example:
    >>> import tl_jets as tj
    >>> clean, corrupted = "This function is available on Unix and", "This module is deprecated since version and"
    >>> table = compare_patching(tj.load_tinydocs(), clean, corrupted, ["2_mlp", "3_mlp"], order=2)
    >>> table
    PatchingComparison(2 sites by activation, attribution, jet 2; <clean answer> - <corrupted answer>)
    >>> list(table.to_dataframe().columns)
    ['site', 'activation', 'attribution', 'jet 2']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus import jet
from tl_jets.circuits.pairs import Pair, PairResult, writes_of
from tl_jets.core.changes import one_look
from tl_jets.core.labels import LabelInput, is_label
from tl_jets.core.notebook import dataframe_html
from tl_jets.core.options import check_integers
from tl_jets.core.protocol import FINAL_STREAM, some
from tl_jets.core.selection import TargetInput


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchingComparison(PairResult):
    """Changes of a logit difference when single writes become those of the clean run. Axes: [method, site, batch].

    Targets and their unit as in `PairResult`.

    Attributes:
        methods: `activation`, `attribution`, `jet 2`, ... (see the module).
        sites: Sources and steps whose write is patched, at all positions.
        change: Patched less corrupted, in `unit`.
        clean: The logit difference of the clean run.
        corrupted: That of the corrupted run.
    """

    methods: list[str]
    sites: list[str]
    change: Float[Tensor, "method site batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]

    def __repr__(self) -> str:
        return f"PatchingComparison({len(self.sites)} sites by {', '.join(self.methods)}; {self._difference_name})"

    def _body(self) -> str:
        return dataframe_html(self.to_dataframe())

    def to_dataframe(self) -> pd.DataFrame:
        """One row per site, averaged over prompts: site, and a column per method."""
        means = self.change.mean(-1)
        return pd.DataFrame({"site": self.sites, **{name: means[i].tolist() for i, name in enumerate(self.methods)}})

    def agreement(self) -> pd.DataFrame:
        """How each estimate agrees with `activation` over the sites.

        Columns: method, pearson, spearman (correlations), error (mean absolute difference over the mean absolute `activation`),
        closer (share of sites where it is closer to `activation` than `attribution` is).
        """
        table = self.to_dataframe().drop(columns="site")
        exact, errors = table.activation, table.sub(table.activation, axis=0).abs()
        columns = {"pearson": table.corrwith(exact), "spearman": table.rank().corrwith(exact.rank())}
        columns |= {"error": errors.mean() / exact.abs().mean(), "closer": errors.lt(errors.attribution, axis=0).mean()}
        return pd.DataFrame(columns, index=self.methods[1:]).rename_axis("method").reset_index()


@one_look()
def compare_patching(
    model: Any,
    clean: Any,
    corrupted: Any,
    sites: LabelInput | Sequence[LabelInput] | None = None,
    *,
    order: int = 2,
    targets: TargetInput | None = None,
    position: int = -1,
    attention_mask: Tensor | None = None,
) -> PatchingComparison:
    """Activation patching, attribution patching and jets of the same sites, as a `PatchingComparison`.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (`"head"` granularity for single heads).
        clean: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        corrupted: As many prompts, of the same lengths in tokens.
        sites: Sources and steps (`embed`, `3_mlp`, `L0H3`) or their writes; None for all.
        order: Highest order of the jets, at least 1 (attribution patching alone).
        targets: Two tokens, or two a prompt: the logit of the first less that of the second is measured. None for the clean and
            the corrupted prompt's answers.
        position: Where it is read, among each prompt's real tokens.
        attention_mask: Passed to the model (left padding needs it).

    Raises:
        ValueError: Inputs of different lengths or padding, bad targets, unknown sites, or prompts that do not differ in what is
            measured.
        NotImplementedError: A later step has no Taylor rule.

    Cost: for every site, about order + 3 evaluations of all later stages.

    Example: in the docstring of `tl_jets.circuits.patching`.
    """
    check_integers(1, order=order)
    pair = Pair.of(model, clean, corrupted, targets, position, attention_mask)
    ends = pair.ends()
    to, start = writes_of(pair.clean), writes_of(pair.corrupted)
    constants = [step.label for step in pair.network.steps if step.kind == "attn_bias"]
    known = [label for label in start if label not in constants]
    names = {step.write: step.label for step in pair.network.steps}
    asked = known if sites is None else [sites] if is_label(sites) else list(sites)
    labels = [names.get(label, label) for label in (pair.network.label(site) for site in asked)]
    unknown = [label for label in labels if label not in known]
    if unknown or not labels:
        raise ValueError(f"sites must be sources and steps of the network, {some(known)}; got {unknown or 'none'}.")
    change = []
    for label in labels:
        series = jet(lambda write, label=label: patched(pair, label, write), start[label], to[label], order)
        with torch.no_grad():
            exact = pair.said(patched(pair, label, to[label]) - patched(pair, label, start[label]))
        change.append(torch.cat([exact[None], pair.said(series.coefficients[1:]).cumsum(0)]))
    methods = ["activation", "attribution", *(f"jet {k}" for k in range(2, order + 1))]
    return PatchingComparison(methods=methods, sites=labels, change=torch.stack(change, 1), **ends, **pair.header)


def patched(pair: Pair, site: str, write: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch d_model"]:
    """What the unembedding reads in the corrupted run when a source or step writes something else."""
    trace = pair.corrupted
    stages = trace.network.stages
    own = next((i for i, stage in enumerate(stages) if site in (step.label for step in stage.steps)), -1)
    delta = write - writes_of(trace)[site]
    for stage in stages[own + 1 :]:
        delta = delta + (trace.stage_function(stage)(trace[stage.stream] + delta) - trace.writes(stage)).sum(0)
    return trace.decoder.norm(pair.rows.at(trace[FINAL_STREAM] + delta)[:, 0])
