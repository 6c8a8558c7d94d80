"""The result of ablations, `AblationEffect`, from the logits of clean and ablated runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.attribution import centered
from tl_jets.core.averages import Averaged
from tl_jets.core.decoder import in_unit
from tl_jets.core.labels import is_label
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.path import Path
from tl_jets.core.selection import ANSWER, Rows, TargetInput, read_targets
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import TargetResult, target_fields
from tl_jets.core.trace import Trace
from tl_jets.interventions.hooks import Mode, Steps, hooks_of_each
from tl_jets.interventions.places import Hooks


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AblationResult(TargetResult, Averaged):
    """Base of results of ablations, one at a time. Targets as in `TargetResult`.

    Attributes:
        labels: The ablated steps, aligned to the ablation axis.
        mode: The mode of `ablation_hooks`; `"path"` for ablations of single paths.
        sinks: Positions that `average` leaves out.
        seed: Seed of `"resample"`; None in other modes.
    """

    labels: list[str]
    mode: str
    sinks: Sinks | None = None
    seed: int | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.labels)} ablations, {self.mode}{self._of_series()}; {len(self.tokens)} prompts at "
            f"{self.positions}; of {self.target_names}{in_unit(self.unit)}{self._left_out()})"
        )

    def _of_series(self) -> str:
        return ""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AblationEffect(AblationResult):
    """Changes under ablations, ablated - clean. Axes: [ablation, batch, pos]. Ablations and targets as in `AblationResult`.

    Attributes:
        logit: Change of the targets' additive logits (before a softcap).
        centered: The same, less the change of the mean over the vocabulary.
        kl: KL(clean || ablated) of the model's own predictions, in nats.
    """

    logit: Float[Tensor, "ablation batch pos target"]
    centered: Float[Tensor, "ablation batch pos target"]
    kl: Float[Tensor, "ablation batch pos"]

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Columns step, logit, centered, kl; logits averaged over targets, too."""
        columns = {"logit": self.logit.mean(-1), "centered": self.centered.mean(-1), "kl": self.kl}
        return [{"step": label} for label in self.labels], columns

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per ablation, prompt, position, target: step, batch, pos, token, target, logit, centered, kl."""
        values = {"logit": self.logit, "centered": self.centered, "kl": self.kl[..., None]}
        return self._table("step", self.labels, values, tokenizer)


def effect_of(
    trace: Trace,
    clean: Float[Tensor, "batch pos d_vocab"],
    ablated: Iterable[Float[Tensor, "batch pos d_vocab"]],
    labels: list[str],
    mode: str,
    rows: Rows,
    *,
    targets: TargetInput | None,
) -> AblationEffect:
    """The effects of ablations from additive logits, `clean` and `ablated`, at some positions, in float64."""
    ids, names = targets_or_answer(trace, targets, rows, lambda: clean)
    decoder = trace.decoder
    logit, beyond, kl = [], [], []
    before = decoder.transformed(clean).log_softmax(-1)
    for found in ablated:
        change = found - clean
        logit.append(change.gather(-1, ids))
        beyond.append(centered(change, ids))
        after = decoder.transformed(found).log_softmax(-1)
        kl.append((before.exp() * (before - after)).sum(-1))
    return AblationEffect(
        labels=labels,
        mode=mode,
        logit=torch.stack(logit),
        centered=torch.stack(beyond),
        kl=torch.stack(kl),
        sinks=Sinks.of(trace, rows),
        **target_fields(trace, rows, ids, names),
    )


def targets_or_answer(
    trace: Trace, targets: TargetInput | None, rows: Rows, logits: Callable[[], Float[Tensor, "batch pos d_vocab"]]
) -> tuple[Int[Tensor, "batch pos target"], list[str | int]]:
    """Ids and names of targets; None for the best token of the clean logits."""
    ids, names = read_targets(trace.network, targets, rows)
    return (logits().argmax(-1, keepdim=True), [ANSWER]) if ids is None or names is None else (ids, names)


def exact_trace(network: ResidualNetwork, prompts: Any, attention_mask: Tensor | None) -> Trace:
    """A trace of the model's own pass, and not of a cache, which need not be exact."""
    trace = trace_of(network, prompts, attention_mask)
    if trace.logits is None:
        trace = network.trace(trace.tokens, attention_mask=trace.recording.memo.get("attention_mask"))
    return trace


def real_rows(trace: Trace, positions: int | Sequence[int]) -> Rows:
    """The requested positions among each prompt's real tokens; ValueError if a prompt is too short for one."""
    rows = Rows.of(trace, positions)
    if not rows.are_real:
        shortest = int(trace.valid.sum(1).min())
        raise ValueError(
            f"positions must lie in {-shortest}..{shortest - 1}, the real tokens of the shortest prompt; got {positions}."
        )
    return rows


def cells_of(trace: Trace, positions: int | Sequence[int] | None) -> Bool[Tensor, "batch pos"] | None:
    """Whether a cell of the padded rows is at one of the positions, counted as in `real_rows`; None for all."""
    if positions is None:
        return None
    return torch.zeros_like(trace.valid).scatter(1, real_rows(trace, positions).index, True)


def read_ablations(
    trace: Trace,
    steps: Steps | None,
    mode: Mode,
    reference: Any,
    ablated_positions: int | Sequence[int] | None,
    seed: int,
) -> tuple[list[str], list[Hooks]]:
    """Labels and hooks of ablations to make one at a time; None for all steps of the network."""
    network = trace.network
    if steps is None:
        kinds = ("attn_bias", "mlp_rest")
        steps = [step.label for step in network.steps if step.kind not in kinds and not step.is_feature]
    ablations: list[Any] = [steps] if is_label(steps) or isinstance(steps, Path) else list(steps)
    if not ablations:
        raise ValueError("ablation_effect needs at least one step or path; got none. Pass None for all steps.")
    labels = [str(a) if isinstance(a, Path) else network.label(a) for a in ablations]
    where = cells_of(trace, ablated_positions)
    return labels, hooks_of_each(network, ablations, mode=mode, reference=reference, positions=where, seed=seed)
