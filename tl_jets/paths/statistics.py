"""Shares of the logits of paths, path lengths, components and sources, without listing the paths.

In a frozen network (`tl_jets.core.frozen_network`) every stage is affine, so sums over exponentially many paths are a
few vectors that go through the stages:

- **lengths**: multiply every write by z; the coefficient of z^n at the end is the sum of all paths with n writes. Stage
  by stage v_n := v_n + A_s v_{n-1}: at most L + 1 vectors, O(L^2) stage applications.
- **components**: the prefixes before a stage sum to the stream h_s, so all paths through a step a are A_a h_s (the
  linear part of its write), carried through the later stages.
- **sources**: an embedding, an edit or a bias, carried through all later stages.

Shares of lengths sum to 1, and so do those of sources. Components overlap: their shares sum to the mean number of
writes, sum_n n share_n. The constant of a write is a source (`3_mlp_bias`): a path from it has not passed through
`3_mlp`. The measures are defined in `tl_jets.core.attribution`.

Source: Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*; Golden (arXiv 2505.24293).

Example:
    >>> import torch
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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_jets.core.attribution import Yardstick
from tl_jets.core.decoder import in_unit
from tl_jets.core.frozen_network import FrozenNetwork
from tl_jets.core.network import ResidualNetwork, trace_of
from tl_jets.core.notebook import SHOWN_ROWS, dataframe_html
from tl_jets.core.protocol import BIAS, DECODER_STEP
from tl_jets.core.readout import top_tokens
from tl_jets.core.results import Result
from tl_jets.core.selection import Rows, TargetInput
from tl_jets.core.structure import Structure
from tl_jets.core.tokens import decode, token_names
from tl_jets.core.trace import Trace
from tl_jets.paths.evaluation import rows_of, with_edits
from tl_jets.paths.graph import Lattice, count_text, lattice_of, narrowed

By = Literal["path", "length", "component", "source"]
MEASURES = ("norm", "cosine", "share", "effect")


@dataclass(frozen=True, eq=False, repr=False)
class PathStatistics(Result):
    """Measures of parts of the model's logits. Axes: [part, batch, pos]; NaN (ids: -1) at padding.

    Attributes:
        labels: Paths, path lengths, components or sources (see `by`), aligned to the part axis.
        counts: Number of paths in each part.
        n_writes: By path, its number of writes; None for sums.
        positions: Positions in the prompt, aligned to the pos axis.
        valid: Which `tokens` are real.
        norm: Length of the part's logits over that of the model's, both centered over the vocabulary.
        cosine: Cosine of the angle between them.
        share: The part's projection on the model's logits over their squared length.
        effects: Logits that the part adds to each target, beyond the mean of the vocabulary.
        target_names: The targets as requested; `<answer>` is the model's own best token.
        top_ids: The part's best token; `model_top_ids` holds the model's.
        unit: Unit of effects: `"logits"`, or `"logits before the softcap"`.
    """

    labels: list[str]
    by: By
    counts: list[int]
    n_writes: list[int] | None
    positions: list[int]
    tokens: Int[Tensor, "batch pos"]
    valid: Bool[Tensor, "batch pos"]
    norm: Float[Tensor, "part batch pos"]
    cosine: Float[Tensor, "part batch pos"]
    share: Float[Tensor, "part batch pos"]
    effects: Float[Tensor, "part batch pos target"]
    target_ids: Int[Tensor, "batch pos target"]
    target_names: list[str | int]
    top_ids: Int[Tensor, "part batch pos"]
    model_top_ids: Int[Tensor, "batch pos"]
    unit: str
    tokenizer: Any

    def __repr__(self) -> str:
        return (
            f"PathStatistics({len(self.labels):,} parts by {self.by}, {count_text(sum(self.counts))} paths; tokens "
            f"{list(self.tokens.shape)}; effect on {self.target_names}{in_unit(self.unit)})"
        )

    def _body(self) -> str:
        return dataframe_html(self.largest(SHOWN_ROWS, "size"), total=len(self.labels), whole="average()")

    @property
    def effect(self) -> Float[Tensor, "part batch pos"]:
        """The effect on the first target."""
        return self.effects[..., 0]

    @property
    def copies(self) -> Bool[Tensor, "part batch pos"]:
        """Whether the part's best token is the model's own answer."""
        return (self.top_ids == self.model_top_ids) & self.valid

    def average(self) -> pd.DataFrame:
        """One row per part, averaged over all real positions of all prompts.

        Columns: the part (`path`, `length`, ...), count, n_writes (of paths), norm, cosine, share, effect (on the first
        target; others as `effect:<name>`), size (mean absolute effect), copies (share of best tokens that are the model's).
        """
        table: dict[str, Any] = {self.by: self.labels, "count": self.counts}
        if self.n_writes is not None:
            table["n_writes"] = self.n_writes
        table |= {name: _mean(getattr(self, name)) for name in MEASURES}
        table |= {f"effect:{name}": _mean(self.effects[..., i]) for i, name in enumerate(self.target_names) if i}
        table["size"] = _mean(self.effect.abs())
        table["copies"] = (self.copies.flatten(1).sum(1).double() / self.valid.sum()).tolist()
        return pd.DataFrame(table)

    def largest(self, k: int = 20, measure: str = "effect") -> pd.DataFrame:
        """The rows of `average` with the k largest absolute values of a column, largest first."""
        table = self.average()
        if measure not in table:
            raise ValueError(f"measure must be a column of the table, {list(table.columns)}; got {measure!r}.")
        order = table[measure].abs().sort_values(ascending=False, kind="stable").index[:k]
        return table.loc[order].reset_index(drop=True)

    def histogram(self, measure: str = "norm", bins: int | Sequence[float] = 20) -> pd.DataFrame:
        """Histogram of a measure over all cells (part, prompt, real position). Columns: left, right, count.

        Args:
            measure: `"norm"`, `"cosine"`, `"share"` or `"effect"`.
            bins: Number of bins, or their edges. For norms a number gives logarithmic bins between the extremes.
        """
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}; got {measure!r}.")
        values = getattr(self, measure)[:, self.valid].flatten().double().cpu().numpy()
        edges: Any = bins
        if isinstance(bins, int) and measure == "norm" and (values > 0).any():
            values = values[values > 0]
            edges = np.geomspace(values.min(), values.max() * (1 + 1e-9), bins + 1)
            edges[0] = values.min()
        counts, edges = np.histogram(values, edges)
        return pd.DataFrame({"left": edges[:-1], "right": edges[1:], "count": counts})

    def to_dataframe(self, tokenizer: Any = None) -> pd.DataFrame:
        """One row per part, prompt, real position and target.

        Columns: the part (`path`, `length`, ...), batch, pos, token (read at that position), norm, cosine, share,
        target, effect, top_token (the part's best), is_answer (whether that is the model's own).
        """
        tokenizer = tokenizer or self.tokenizer
        names = token_names(tokenizer, [self.top_ids, self.tokens, self.target_ids])
        columns = {name: getattr(self, name).tolist() for name in ("norm", "cosine", "share", "effects", "top_ids")}
        targets, copies = self.target_ids.tolist(), self.copies.tolist()
        rows = []
        for i, label in enumerate(self.labels):
            for b, p in self.valid.nonzero().tolist():
                here = {self.by: label, "batch": b, "pos": self.positions[p], "token": names[int(self.tokens[b, p])]}
                here |= {name: columns[name][i][b][p] for name in ("norm", "cosine", "share")}
                for t, target in enumerate(targets[b][p]):
                    row = here | {"target": names[target], "effect": columns["effects"][i][b][p][t]}
                    rows.append(row | {"top_token": names[columns["top_ids"][i][b][p]], "is_answer": copies[i][b][p]})
        return pd.DataFrame(rows)

    def top_tokens(self, tokenizer: Any = None) -> dict[str, Any]:
        """The part's best token by label: {label: nested lists [batch][pos]}."""
        return {label: decode(tokenizer or self.tokenizer, self.top_ids[i]) for i, label in enumerate(self.labels)}


def _mean(values: Tensor) -> list[float]:
    return values.flatten(1).nanmean(1).tolist()


@torch.no_grad()
def statistics_of(
    network: Structure,
    yardstick: Yardstick,
    tokens: Int[Tensor, "batch out_pos"],
    labels: list[str],
    states: Float[Tensor, "part batch out_pos d_model"],
    bias_weights: Float[Tensor, " part"],
    *,
    by: By,
    counts: list[int],
    n_writes: list[int] | None = None,
) -> PathStatistics:
    """Measure parts, given by what the unembedding reads of them and their multiples of b_U."""
    if by not in get_args(By):
        raise ValueError(f"by must be one of {get_args(By)}; got {by!r}.")
    rows = yardstick.rows
    parts = yardstick.augmented(states, bias_weights)
    measured = yardstick.measure(parts)
    best = top_tokens(network.decoder, states[:, rows.keep], bias_weights[:, None].to(states), k=1)
    return PathStatistics(
        labels=labels,
        by=by,
        counts=counts,
        n_writes=n_writes,
        positions=rows.positions,
        tokens=tokens,
        valid=rows.keep,
        norm=measured["norm"],
        cosine=measured["cosine"],
        share=measured["share"],
        effects=measured["effect"],
        target_ids=yardstick.target_ids,
        target_names=yardstick.target_names,
        top_ids=rows.spread(best.indices[..., 0], fill=-1),
        model_top_ids=rows.spread(yardstick.answers, fill=-1),
        unit=network.decoder.unit,
        tokenizer=network.tokenizer,
    )


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
        targets: Tokens to report the effect on: strings or ids (the same everywhere), one list of them a prompt
            (`[[" Paris"], [" Rome"]]`), or ids [batch, pos, target]; None for the model's own best token.
        attention_mask: Passed to the model (left padding needs it).
        cache: A ready `ActivationCache` of the same input.

    Returns:
        A `PathStatistics` by length. Shares sum to 1 unless paths were left out. `counts` omit constants that are zero.

    Raises:
        ValueError: Bad labels, positions or input.
        NotImplementedError: The model cannot be frozen.

    Source: Elhage et al. 2021, path expansion; the frozen maps of Golden, arXiv 2505.24293. Cost: freezing (two
    evaluations of every stage), then stages^2 / 2 applications of a frozen stage.
    """
    trace, rows, lattice, frozen = _frozen(model, text_or_tokens, positions, attention_mask, cache, avoiding, sources)
    values = frozen.sources
    like = trace[trace.network.streams[0]]
    with torch.no_grad():
        by_length = like.new_zeros(len(lattice.stages) + 2, *like.shape)
        steps = _rows(lattice, frozen)
        for stage in range(len(lattice.stages) + 1):
            for source in lattice.sources:
                if source.start == stage and source.label in values:
                    by_length[0] += values[source.label]
            if stage < len(lattice.stages) and steps[stage]:
                by_length[1 : stage + 2] += frozen.writes(stage, by_length[: stage + 1])[steps[stage]].sum(0)
        states = frozen.decode(by_length[: len(lattice.count_by_length)], rows.positions)
        weights = states.new_zeros(len(states))
        constant = DECODER_STEP + BIAS
        if constant in values and any(source.label == constant for source in lattice.sources):
            states[0], weights[0] = states[0] + values[constant][:, rows.positions], 1.0
    counts = list(lattice.count_by_length)
    yardstick = Yardstick.of(trace, rows, targets)
    labels = [str(n) for n in range(len(counts))]
    tokens = trace.tokens[:, rows.positions]
    return statistics_of(trace.network, yardstick, tokens, labels, states, weights, by="length", counts=counts)


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

    Source: Elhage et al. 2021; Golden, arXiv 2505.24293. Cost: freezing, then components x stages / 2 frozen stages.

    Example:
        >>> from tl_jets import CallableModel, Decoder, Norm
        >>> model = CallableModel(
        ...     embed=torch.nn.Embedding(5, 4),
        ...     stages=[{"0_mlp": torch.relu, "0_attn": torch.tanh}],
        ...     decoder=Decoder(Norm("RMS"), torch.randn(4, 7), torch.zeros(7)),
        ... )
        >>> path_sums(model, torch.tensor([[0, 3]])).labels
        ['0_mlp', '0_attn']
    """
    if by not in ("component", "source"):
        raise ValueError(f"by must be 'component' or 'source'; got {by!r}.")
    trace, rows, lattice, frozen = _frozen(model, text_or_tokens, positions, attention_mask, cache, avoiding, None)
    values = frozen.sources
    every: dict[str, Tensor] = {}
    with torch.no_grad():
        stream = torch.zeros_like(trace[trace.network.streams[0]])  # the sum of all prefixes
        for stage, steps in enumerate([*_rows(lattice, frozen), []]):
            joining = {s.label: values[s.label] for s in lattice.sources if s.start == stage and s.label in values}
            stream = stream + sum(joining.values(), torch.zeros_like(stream))
            every |= joining if by == "source" else {}
            if steps:
                carried = torch.stack([*every.values(), stream])
                writes = frozen.writes(stage, carried)[steps]
                every = dict(zip(every, carried[:-1] + writes[:, :-1].sum(0), strict=True))
                stream = stream + writes[:, -1].sum(0)
                if by == "component":
                    every |= dict(zip(lattice.stages[stage], writes[:, -1], strict=True))
        if not every:
            raise ValueError("path_sums needs a step or source that is not avoided; got none. Avoid less.")
        states = frozen.decode(torch.stack(list(every.values())), rows.positions)
        weights = states.new_zeros(len(states))
        constant = DECODER_STEP + BIAS
        if by == "source" and constant in values and any(source.label == constant for source in lattice.sources):
            every[constant] = values[constant]
            states = torch.cat([states, values[constant][None, :, rows.positions]])
            weights = torch.cat([weights, weights.new_ones(1)])
    counts = _counts(lattice, list(every), by)
    yardstick, tokens = Yardstick.of(trace, rows, targets), trace.tokens[:, rows.positions]
    return statistics_of(trace.network, yardstick, tokens, list(every), states, weights, by=by, counts=counts)


def _counts(lattice: Lattice, labels: list[str], by: str) -> list[int]:
    """Number of paths in each sum."""
    if by == "source":
        return [lattice.count_from([label]) for label in labels]
    before = [n for n, _ in lattice.prefixes()]
    after = [sum(lattice.completions(stage + 1, 0)) for stage in range(len(lattice.stages))]
    stage_of = {step: stage for stage, steps in enumerate(lattice.stages) for step in steps}
    return [before[stage_of[label]] * after[stage_of[label]] for label in labels]


def _rows(lattice: Lattice, frozen: FrozenNetwork) -> list[list[int]]:
    return rows_of(lattice, [[step.label for step in stage.stage.steps] for stage in frozen.stages])


def _frozen(
    model: Any, text_or_tokens: Any, positions: Any, attention_mask: Any, cache: Any, avoiding: Any, sources: Any
) -> tuple[Trace, Rows, Lattice, FrozenNetwork]:
    """The input's trace, its frozen network, and the selected paths."""
    network = ResidualNetwork.of(model)
    whole = lattice_of(network.stages, network.sources, detached=True)
    with torch.inference_mode(False):
        trace = trace_of(network, text_or_tokens, attention_mask, cache)
        if isinstance(text_or_tokens, Trace) and text_or_tokens.network is network:
            trace = text_or_tokens  # which keeps the frozen network
        lattice = narrowed(with_edits(whole, trace), network.stages, avoiding=avoiding, sources=sources)
        frozen = FrozenNetwork.of(trace)
        return trace, Rows.of(trace, positions), lattice.starting_at(frozen.sources), frozen
