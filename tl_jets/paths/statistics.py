"""Shares of the logits of paths, path lengths, components and sources, without listing the paths.

In a frozen network (`tl_jets.core.frozen_network`) every stage is affine, so sums over all paths take a few vectors:

- **lengths**: multiply every write by z; the coefficient of z^n at the end is the sum of all paths with n writes. Stage
  by stage v_n := v_n + A_s v_{n-1}: at most L + 1 vectors, O(L^2) stage applications.
- **components**: the prefixes before a stage sum to the stream h_s, so all paths through a step a are A_a h_s (the
  linear part of its write), carried through the later stages.
- **sources**: an embedding, an edit or a bias, carried through all later stages.

Shares of lengths sum to 1, and so do those of sources. Components overlap: their shares sum to the mean number of
writes, sum_n n share_n. The constant of a write is a source (`3_mlp_bias`), not a path through `3_mlp`.
*Read before use*: parts cancel (`cancellation`, above 3 with a warning); lengths of SmolLM2-135M do, tens of times over.

Source: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*; Golden (arXiv 2505.24293).

Example:
    >>> from tl_jets import CallableModel, Decoder, Norm
    >>> _ = torch.manual_seed(0)
    >>> W = torch.randn(3, 4, 4, dtype=torch.float64)
    >>> model = CallableModel(
    ...     embed=torch.nn.Embedding(5, 4, dtype=torch.float64),
    ...     stages=[{f"{i}_mlp": lambda x, i=i: torch.nn.functional.silu(x @ W[i])} for i in range(3)],
    ...     decoder=Decoder(Norm("RMS"), torch.randn(4, 7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)),
    ... )
    >>> lengths = path_lengths(model, torch.tensor([[0, 3, 1]]))
    >>> lengths.labels, lengths.counts
    (['0', '1', '2', '3'], [1, 3, 3, 1])
    >>> bool(torch.allclose(lengths.share.sum(0), torch.ones(1, 3, dtype=torch.float64)))
    True
    >>> path_sums(model, torch.tensor([[0, 3]])).labels
    ['0_mlp', '1_mlp', '2_mlp']
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.attribution import LogitAttribution
from tl_jets.core.averages import Averaged
from tl_jets.core.changes import one_look
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.logit_reader import top_tokens
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.notebook import SHOWN_ROWS, dataframe_html
from tl_jets.core.options import check_choice
from tl_jets.core.protocol import BIAS, DECODER_STEP
from tl_jets.core.selection import Rows, TargetInput, positions_at
from tl_jets.core.sinks import Sinks
from tl_jets.core.target_results import TargetResult, target_fields
from tl_jets.core.tokens import nested_texts, token_names
from tl_jets.core.trace import Trace
from tl_jets.paths.cancellation import Cancelling
from tl_jets.paths.circuit import Circuit, circuit_of
from tl_jets.paths.evaluation import taken_rows, with_edits
from tl_jets.paths.graph import PathGraph, count_text, counts_of, narrowed, path_graph

By = Literal["path", "length", "component", "source"]
MEASURES = ("norm", "cosine", "share", "effect")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PathStatistics(Cancelling, TargetResult, Averaged):
    """Measures of parts of the model's logits. Axes: [part, batch, pos]; NaN (ids: -1) at padding.

    Positions and targets as in `TargetResult`.

    Attributes:
        labels: Paths, path lengths, components or sources (see `by`), aligned to the part axis.
        counts: Number of paths in each part.
        lengths: By path, its number of writes; None for sums.
        valid: Which `tokens` are real.
        norm: Length of the part's logits over that of the model's, both centered over the vocabulary.
        cosine: Cosine of the angle between them.
        share: The part's projection on the model's logits over their squared length.
        effects: Logits that the part adds to each target, beyond the mean of the vocabulary.
        top_ids: The part's best token; `model_top_ids` holds the model's.
        sinks: Positions that `average` leaves out.
    """

    labels: list[str]
    by: By
    counts: list[int]
    lengths: list[int] | None
    valid: Bool[Tensor, "batch pos"]
    norm: Float[Tensor, "part batch pos"]
    cosine: Float[Tensor, "part batch pos"]
    share: Float[Tensor, "part batch pos"]
    effects: Float[Tensor, "part batch pos target"]
    top_ids: Int[Tensor, "part batch pos"]
    model_top_ids: Int[Tensor, "batch pos"]
    sinks: Sinks | None = None

    def __repr__(self) -> str:
        return (
            f"PathStatistics({len(self.labels):,} parts by {self.by}, {count_text(sum(self.counts))} paths; tokens "
            f"{list(self.tokens.shape)}; effect on {self.target_names}{in_unit(self.unit)}{self._cancel()}{self._left_out()})"
        )

    def _body(self) -> str:
        table = self.largest(SHOWN_ROWS, "size", include_sinks=self.only_sinks)
        return dataframe_html(table, total=len(self.labels), whole="average()")

    @property
    def effect(self) -> Float[Tensor, "part batch pos"]:
        """The effect on the first target."""
        return self.effects[..., 0]

    @property
    def copies(self) -> Bool[Tensor, "part batch pos"]:
        """Whether the part's best token is the model's own answer."""
        return (self.top_ids == self.model_top_ids) & self.valid

    def _columns(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """Measures, effects on further targets, `size` (mean absolute effect), `copies` (best tokens that are the model's)."""
        lengths = [{}] * len(self.labels) if self.lengths is None else [{"length": length} for length in self.lengths]
        parts = zip(self.labels, self.counts, lengths, strict=True)
        columns = {name: getattr(self, name) for name in MEASURES}
        columns |= {f"effect:{name}": self.effects[..., i] for i, name in enumerate(self.target_names) if i}
        columns |= {"size": self.effect.abs(), "copies": self.copies.to(self.effect.dtype)}
        return [{self.by: label, "count": count, **length} for label, count, length in parts], columns

    def largest(self, k: int = 20, measure: str = "effect", **options: Any) -> pd.DataFrame:
        """The rows of `average` (with its options) with the k largest absolute values of a column, largest first."""
        table = self.average(**options)
        if measure not in table:
            raise ValueError(f"measure must be a column of the table, {list(table.columns)}; got {measure!r}.")
        order = table[measure].abs().sort_values(ascending=False, kind="stable").index[:k]
        return table.loc[order].reset_index(drop=True)

    def histogram(self, measure: str = "norm", bins: int | Sequence[float] = 20) -> pd.DataFrame:
        """Histogram of a measure over all cells (part, prompt, real position). Columns: left, right, count.

        Args:
            measure: `"norm"`, `"cosine"`, `"share"` or `"effect"`.
            bins: Number of bins, or edges. For norms a number gives logarithmic bins, and one more if some are zero.
        """
        check_choice("measure", measure, MEASURES)
        values = getattr(self, measure)[:, self.valid].flatten().double().cpu().numpy()
        edges: Any = bins
        if isinstance(bins, int) and measure == "norm" and (values > 0).any():
            edges = np.geomspace(values[values > 0].min(), values.max() * (1 + 1e-9), bins + 1)
            edges = np.concatenate([[0.0], edges]) if (values == 0).any() else edges
        counts, edges = np.histogram(values, edges)
        return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per part, prompt, real position and target.

        Columns: the part (`path`, `length`, ...), batch, pos, token (read at that position), norm, cosine, share,
        target, effect, top_token (the part's best), is_answer (whether that is the model's own).
        """
        names = self._names(tokenizer)
        part, b, p, t = self.valid[None, :, :, None].expand_as(self.effects).nonzero().T.cpu()
        texts = {"token": self.tokens[b, p], "target": self.target_ids[b, p, t], "top_token": self.top_ids[part, b, p]}
        table = {self.by: [self.labels[i] for i in part], "batch": b, "pos": positions_at(self.positions, b, p)}
        table |= {"token": None, **{name: getattr(self, name)[part, b, p] for name in ("norm", "cosine", "share")}}
        table |= {"target": None, "effect": self.effects[part, b, p, t], "top_token": None}
        table |= {name: [names[i] for i in ids.tolist()] for name, ids in texts.items()}
        table["is_answer"] = self.copies[part, b, p]
        return pd.DataFrame({k: v.tolist() if isinstance(v, Tensor) else v for k, v in table.items()})

    def top_tokens(self, tokenizer: Any = None) -> dict[str, Any]:
        """The part's best token by label: {label: nested lists [batch][pos]}."""
        names = self._names(tokenizer)
        return {label: nested_texts(names, self.top_ids[i]) for i, label in enumerate(self.labels)}

    def to_circuit(self, k: int | None = None, *, by_position: bool = False) -> Circuit:
        """The `Circuit` of the k paths of largest effect (of two targets: their difference), as `PathCache.to_circuit`."""
        return circuit_of(self, k, by_position)

    def _names(self, tokenizer: Any) -> dict[int, str]:
        return token_names(tokenizer, [self.top_ids, self.tokens, self.target_ids]) if tokenizer else self.token_names


@torch.no_grad()
def statistics_of(
    trace: Trace,
    attribution: LogitAttribution,
    tokens: Int[Tensor, "batch out_pos"],
    labels: list[str],
    states: Float[Tensor, "part batch out_pos d_model"],
    bias_weights: Float[Tensor, " part"],
    *,
    by: By,
    counts: list[int],
    lengths: list[int] | None = None,
) -> PathStatistics:
    """Measure parts, given by what the unembedding reads of them and their multiples of b_U."""
    rows = attribution.rows
    measured = attribution.measure(attribution.augmented(states, bias_weights))
    best = top_tokens(trace.decoder, states[:, rows.kept[0], rows.kept[1]], bias_weights[:, None].to(states), k=1)
    top_ids = rows.spread(best.indices[..., 0], fill=-1)
    answers = rows.spread(attribution.answers, fill=-1)
    found = PathStatistics(
        labels=labels,
        by=by,
        counts=counts,
        lengths=lengths,
        valid=rows.keep,
        effects=measured.pop("effect"),
        **measured,
        top_ids=top_ids,
        model_top_ids=answers,
        sinks=Sinks.of(trace, rows),
        **target_fields(
            trace, rows, attribution.target_ids, attribution.target_names, tokens=tokens, named=[top_ids, answers]
        ),
    )
    found.warn_of_cancellation()
    return found


@one_look()
def path_lengths(
    model: Any,
    text_or_tokens: Any,
    *,
    avoiding: str | Sequence[str] | None = None,
    sources: str | Sequence[str] | None = None,
    positions: int | Sequence[int] | None = None,
    targets: TargetInput | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
) -> PathStatistics:
    """Share of the logits of all detached paths with 0, 1, 2, ... writes, at any depth.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (whose granularity says what a write is).
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        avoiding: Steps, sources or kinds (`"attn"`) that paths do not pass through.
        sources: Where paths start; None for all.
        positions: Positions to read; None for all.
        targets: Tokens to report the effect on: strings or ids, one list of them a prompt, or ids [batch, pos, target];
            None for the model's own best token.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Returns:
        A `PathStatistics` by length. Shares sum to 1 unless paths were left out. `counts` omit constants that are zero.

    Raises:
        ValueError: Bad labels, positions or input.
        NotImplementedError: The model cannot be frozen.

    Source: as the module. Cost: freezing (two evaluations of every stage), then stages^2 / 2 frozen stages.
    """
    sums = _Sums.of(model, text_or_tokens, positions, attention_mask, cache, avoiding=avoiding, sources=sources)
    graph, stages = sums.graph, sums.graph.stages
    with torch.no_grad():
        by_length = sums.nothing.new_zeros(len(stages) + 2, *sums.nothing.shape)
        for stage in range(len(stages) + 1):
            by_length[0] += sum(sums.joining(stage).values(), sums.nothing)
            if stage < len(stages) and stages[stage]:
                by_length[1 : stage + 2] += sums.writes(stage, by_length[: stage + 1]).sum(0)
    parts = {str(length): values for length, values in enumerate(by_length[: len(graph.count_by_length)])}
    return sums.measured(parts, "length", list(graph.count_by_length), targets, constant="0")


@one_look()
def path_sums(
    model: Any,
    text_or_tokens: Any,
    *,
    by: Literal["component", "source"] = "component",
    avoiding: str | Sequence[str] | None = None,
    positions: int | Sequence[int] | None = None,
    targets: TargetInput | None = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
) -> PathStatistics:
    """Share of the logits of all detached paths through each component, or from each source, at any depth.

    Args:
        model: A TransformerLens model, or a `ResidualNetwork` (`"head"` granularity for single heads).
        text_or_tokens: A prompt, a list of prompts, token ids [batch, pos], or a `Trace`.
        by: `"component"`: for each step, all paths through it, without those from its own bias; `"source"`: all paths
            from each embedding, edit and bias.
        avoiding: Steps, sources or kinds (`"attn"`) that paths do not pass through.
        positions: Positions to read; None for all.
        targets: Tokens to report the effect on, as in `path_lengths`; None for the model's own best token.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Returns:
        A `PathStatistics`. Sources sum to the model; components overlap.

    Raises:
        ValueError: Bad labels, positions or input.
        NotImplementedError: The model cannot be frozen.

    Source: as the module. Cost: freezing, then components x stages / 2 frozen stages.
    """
    check_choice("by", by, ("component", "source"))
    sums = _Sums.of(model, text_or_tokens, positions, attention_mask, cache, avoiding=avoiding)
    parts: dict[str, Tensor] = {}
    with torch.no_grad():
        stream = sums.nothing  # the sum of all prefixes
        for stage, steps in enumerate([*sums.graph.stages, ()]):
            joining = sums.joining(stage)
            stream = stream + sum(joining.values(), sums.nothing)
            parts |= joining if by == "source" else {}
            if steps:
                carried = torch.stack([*parts.values(), stream])
                writes = sums.writes(stage, carried)
                parts = dict(zip(parts, carried[:-1] + writes[:, :-1].sum(0), strict=True))
                stream = stream + writes[:, -1].sum(0)
                parts |= dict(zip(steps, writes[:, -1], strict=True)) if by == "component" else {}
    if not parts:
        raise ValueError("path_sums needs a step or source that is not avoided; got none. Avoid less.")
    constant = DECODER_STEP + BIAS if by == "source" else None
    return sums.measured(parts, by, None, targets, constant)


@dataclass(frozen=True, eq=False)
class _Sums:
    """The frozen network of one input and the selected paths, whose sums go through the stages."""

    trace: Trace
    rows: Rows
    graph: PathGraph
    frozen: FrozenNetwork

    @classmethod
    def of(cls, model: Any, text_or_tokens: Any, positions: Any, mask: Any, cache: Any, **filters: Any) -> _Sums:
        network = ResidualNetwork.of(model)
        whole = path_graph(network.stages, network.sources, detached=True)
        with torch.inference_mode(False):
            trace = trace_of(network, text_or_tokens, mask, cache)
            if isinstance(text_or_tokens, Trace) and text_or_tokens.network is network:
                trace = text_or_tokens  # which keeps the frozen network
            graph = narrowed(with_edits(whole, trace), network.stages, **filters)
            frozen = FrozenNetwork.of(trace)
            return cls(trace, Rows.of(trace, positions), graph.starting_at(frozen.sources), frozen)

    @property
    def nothing(self) -> Tensor:
        """The sum of no paths [batch, pos, d_model]."""
        return torch.zeros_like(self.trace[self.trace.network.streams[0]])

    def joining(self, stage: int) -> dict[str, Tensor]:
        """The sources that start at a stage, by label."""
        return {s.label: self.frozen.sources[s.label] for s in self.graph.sources if s.start == stage}

    def writes(self, stage: int, values: Tensor) -> Tensor:
        """The selected steps' linear writes of many values [step, value, batch, pos, d_model]."""
        return self.frozen.writes(stage, values)[taken_rows(self.graph, self.frozen, stage)]

    def measured(
        self,
        parts: dict[str, Tensor],
        by: By,
        counts: list[int] | None,
        targets: TargetInput | None,
        constant: str | None,
    ) -> PathStatistics:
        """Statistics of parts of the last stream; the decoder's own constant is added to the part `constant`."""
        trace, rows = self.trace, self.rows
        states = dict(zip(parts, self.frozen.decode(torch.stack(list(parts.values())), rows), strict=True))
        weights = dict.fromkeys(states, 0.0)
        if constant is not None:
            for value in self.joining(len(self.graph.stages) + 1).values():
                states[constant] = states.get(constant, 0) + rows.at(value)
                weights[constant] = 1.0
        labels, every = list(states), torch.stack(list(states.values()))
        counts = counts_of(self.graph, labels, by) if counts is None else counts
        attribution, tokens = LogitAttribution.of(trace, rows, targets), rows.at(trace.tokens)
        bias_weights = every.new_tensor([weights[label] for label in labels])
        return statistics_of(trace, attribution, tokens, labels, every, bias_weights, by=by, counts=counts)
