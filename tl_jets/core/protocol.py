"""Definitions of steps, stages, recordings and model views; `tl_jets.core.network` explains the labels."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_jets.core.decoder import Decoder
from tl_jets.core.factors import Factors

Granularity = Literal["block", "sublayer", "head"]
StepKind = Literal[
    "block", "attn", "mlp", "head", "attn_bias", "neuron", "mlp_rest", "mlp_bias", "feature", "feature_rest", "callable"
]
# Outside the blocks, then by block: the ids of its hooks, and the number of its weights' state.
State = tuple[tuple[tuple[int, ...], int], ...]
GRANULARITIES: tuple[Granularity, ...] = ("block", "sublayer", "head")

FINAL_STREAM = "final_post"
DECODER_STEP = "ln_final"
# Suffix of a step's label for the constant of its frozen form.
BIAS = "_bias"


@dataclass(frozen=True)
class Step:
    """One gamma of the network: a function of a stream whose write is added to the stream.

    Attributes:
        label: `3_attn`, `3_mlp`, `3_block`, `L3H2`, `3_attn_bias`, `L3N17`, `3_mlp_bias`, or any label of a plain
            callable.
        layer: The block that it belongs to.
        head: Index of the head, for `head` steps.
        neuron: Index of the neuron in its layer, for `neuron` steps.
    """

    label: str
    layer: int
    kind: StepKind
    head: int | None = None
    neuron: int | None = None

    @property
    def write(self) -> str:
        """Label of what the step writes: `3_mlp_out`; biases are their own writes."""
        return self.label if self.kind in ("attn_bias", "mlp_bias") else f"{self.label}_out"

    @property
    def is_feature(self) -> bool:
        """Whether it is a part of a write by a dictionary (`tl_jets.adapters.dictionaries`)."""
        return self.kind in ("feature", "feature_rest")


@dataclass(frozen=True)
class Stage:
    """The steps that read one stream, in the order of the stacked writes; stream and writes sum to the next stream."""

    stream: str
    steps: tuple[Step, ...]

    @property
    def is_part(self) -> bool:
        """Whether it is only neurons or the bias of an MLP, so that its writes do not sum to the next stream."""
        kinds = {step.kind for step in self.steps}
        return not kinds.isdisjoint({"neuron", "mlp_bias"}) and "mlp_rest" not in kinds


# Of a recording's memo: sizes on the device that say whether it is sound, and what raises ValueError once they are read.
UNCHECKED = "unchecked"


@dataclass
class Recording:
    """Activations of one forward pass on one input, at the finest granularity that the view records.

    Attributes:
        sources: `embed`, `pos_embed`, ...; they sum to the first stream, apart from edits.
        edits: Stream label -> {`edit:<hook>`: what a user's hook added to that stream}.
        logits: The model's own output, with softcap and scale; None if only a cache was given.
        hook_state: The active user hooks and the state of the weights; replays under others are refused.
        calls: Recorded call arguments for replays, in the view's own form.
        accuracy: Allowed relative error of replays and sums: rounding, or the accuracy of a given cache.
        memo: The view's cache of constants of this input.
    """

    tokens: Tensor
    valid: Bool[Tensor, "batch pos"]
    sources: dict[str, Tensor]
    streams: dict[str, Tensor]
    writes: dict[str, Tensor]
    edits: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    logits: Tensor | None = None
    hook_state: State = ()
    calls: Any = None
    accuracy: float = 1e-5
    memo: dict[Hashable, Any] = field(default_factory=dict)


@runtime_checkable
class ModelView(Protocol):
    """Interface between a residual network and a model; implemented in `tl_jets.adapters`."""

    decoder: Decoder
    tokenizer: Any
    name: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Labels of the terms of the first stream."""
        ...

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages at a granularity; the last one produces `final_post`."""
        ...

    def fine_step(self, label: str) -> Step | None:
        """The neuron (`L3N17`) or MLP bias (`3_mlp_bias`) that a label or write label names, or None."""
        ...

    def inner_stage(self, label: Any) -> tuple[str, Stage] | None:
        """The hook inside a block that TransformerLens' name (`("z", 0)`) means, and the stage around it; or None."""
        ...

    def inner(self, recording: Recording, hook: str, stage: Stage, stream: Tensor) -> Tensor:
        """The activation [batch, ...] at a hook inside a block, with its stage evaluated at a stream."""
        ...

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Token ids of text, and a mask of real tokens [batch, pos]."""
        ...

    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any, heads: bool = False) -> Recording:
        """Run the model once (or read `cache`) and return every stream and write; `heads` keeps what heads write of."""
        ...

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any `stream` [batch, pos, d_model], stacked: [write, batch, pos, d_model]."""
        ...

    def factors(self, recording: Recording, stage: Stage, stream: Tensor) -> list[Factors] | None:
        """A stage's steps as products of matrices, frozen at one prompt's stream; None where that is not known."""
        ...

    def recorded_writes(
        self, recording: Recording, stage: Stage, batch: Tensor, pos: Tensor, *, of_changes: bool = False
    ) -> dict[str, Tensor] | None:
        """The writes of a stage's heads in the recorded pass at some cells [row], by label; None if they must be replayed.

        `of_changes`: heads may keep constants, which cancel in the difference of two runs.
        """
        ...

    def hook_state(self, layer: int | None = None) -> State:
        """State of the active hooks and the weights: overall, of one block, or outside the blocks (-1)."""
        ...

    def follow(self, *, everywhere: bool = True) -> State:
        """Reread cached parts of the model (its decoder) if its weights have changed."""
        ...


def frozen_biases(stages: Sequence[Stage]) -> list[list[tuple[str, list[int]]]]:
    """By stage: labels of its constants when frozen, and the steps that each collects. Heads share `<l>_attn_bias`."""
    found: list[list[tuple[str, list[int]]]] = []
    for stage in stages:
        labels: dict[str, list[int]] = {}
        for index, step in enumerate(stage.steps):
            label = step.label + BIAS
            if step.kind in ("head", "attn_bias"):
                label = f"{step.layer}_attn{BIAS}"
            labels.setdefault(label, []).append(index)
        found.append(list(labels.items()))
    return found


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative error of a replay or a short sum: 256 units in the last place."""
    return 256 * torch.finfo(dtype).eps


def relative_error(found: Tensor, true: Tensor) -> float:
    """Largest absolute difference divided by the largest absolute true value; inf where NaN."""
    if true.numel() == 0:
        return 0.0
    error = ((found - true).abs().max() / true.abs().max().clamp_min(torch.finfo(true.dtype).tiny)).item()
    return error if error == error else float("inf")


def some(labels: Iterable[str], count: int = 12, *, near: Any = None) -> str:
    """The first labels as text for an error message; those most like `near` first."""
    labels = list(labels)
    if isinstance(near, str):
        alike = difflib.get_close_matches(near, labels, 4)
        labels = [*alike, *(label for label in labels if label not in alike)]
    return ", ".join(map(repr, labels[:count])) + (f", ... ({len(labels)} in all)" if len(labels) > count else "")
