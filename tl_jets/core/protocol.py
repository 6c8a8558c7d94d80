"""The words of a residual network: steps, stages, what one forward pass recorded, and what a view of a model provides.

See `tl_jets.core.network` for the mathematics and the labels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_jets.core.decoder import Decoder

Granularity = Literal["block", "sublayer", "head"]
StepKind = Literal["block", "attn", "mlp", "head", "attn_bias", "neuron", "mlp_rest", "mlp_bias", "callable"]
# Outside of the blocks, then by block: the numbers of the hooks now on it, and of the state of its weights.
State = tuple[tuple[tuple[int, ...], int], ...]
GRANULARITIES: tuple[Granularity, ...] = ("block", "sublayer", "head")

FINAL_STREAM = "final_post"
DECODER_STEP = "ln_final"
# A step + this: the constant that its frozen form writes.
BIAS = "_bias"


@dataclass(frozen=True)
class Step:
    """One gamma of the network: a function of a stream that writes to the stream.

    Attributes:
        label: `3_attn`, `3_mlp`, `3_block`, `L3H2`, `3_attn_bias`, `L3N17`, `3_mlp_bias`, or the caller's own for plain
            callables.
        layer: The block that it belongs to.
        kind: What it is.
        head: The head index of a `head` step, else None.
        neuron: The index of a `neuron` step in its layer, else None.
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


@dataclass(frozen=True)
class Stage:
    """The steps that read one stream; their writes and the stream itself sum to the next stream.

    Attributes:
        stream: Label of the stream that the steps read.
        steps: The steps, in the order in which the stacked writes carry them.
    """

    stream: str
    steps: tuple[Step, ...]

    @property
    def is_part(self) -> bool:
        """Whether it is some neurons of an MLP, or its bias, so that the writes do not sum to the next stream."""
        kinds = {step.kind for step in self.steps}
        return not kinds.isdisjoint({"neuron", "mlp_bias"}) and "mlp_rest" not in kinds


@dataclass
class Recording:
    """What one forward pass on one input gave, at the finest level that the view records.

    Attributes:
        tokens: The model's input.
        valid: Which positions are real tokens (not padding).
        sources: `embed`, `pos_embed`, ...: they sum to the first stream, edits apart.
        streams: Stream label -> tensor [batch, pos, d_model].
        writes: Write label -> tensor [batch, pos, d_model].
        edits: Stream label -> {`edit:<hook>`: what a user's hook added to that stream}.
        logits: The model's own output, softcap and scale included; None if only a cache was given.
        hook_state: The user's hooks that were active, and the state of the weights; replaying under others would be another
            model.
        calls: What the view needs to call the model's modules again, in its own form.
        accuracy: Relative error that replays and sums may have: rounding, or that of a cache made elsewhere.
        memo: The view's own cache of constants of this input.
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
    """What a residual network must know about a model; `tl_jets.adapters` and `CallableModel` provide it."""

    decoder: Decoder
    tokenizer: Any
    name: str

    @property
    def sources(self) -> tuple[str, ...]:
        """Labels of what the first stream is the sum of."""
        ...

    def stages(self, granularity: Granularity) -> tuple[Stage, ...]:
        """The stages at a granularity; their last output is `final_post`."""
        ...

    def fine_step(self, label: str) -> Step | None:
        """The neuron (`L3N17`) or MLP bias (`3_mlp_bias`) that a label, or that of a write, names; None if it names neither."""
        ...

    def tokenize(self, text: Any, prepend_bos: bool | None) -> tuple[Tensor, Tensor]:
        """Token ids of text, and which of them are real [batch, pos]."""
        ...

    def record(self, text_or_tokens: Any, attention_mask: Tensor | None, cache: Any) -> Recording:
        """Run the model once (or read `cache`) and return every stream and write."""
        ...

    def writes(self, recording: Recording, stage: Stage, stream: Tensor) -> Tensor:
        """The stage's writes at any `stream` [batch, pos, d_model], stacked: [write, batch, pos, d_model]."""
        ...

    def hook_state(self, layer: int | None = None) -> State:
        """What identifies the hooks now in force, and the state of the weights; of one block, or of what is outside (-1)."""
        ...

    def follow(self, *, everywhere: bool = True) -> State:
        """Read anew what is kept of the model (its decoder), where its weights are no longer those that it was read from."""
        ...


def frozen_biases(stages: Sequence[Stage]) -> list[list[tuple[str, list[int]]]]:
    """By stage, the labels of the constants that it adds once frozen, and the steps whose constants each gathers.

    The constants of heads are part of `<l>_attn_bias`, as everywhere; another step's are its label + `_bias`.
    """
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
    """Relative error that a replay or a sum of a few terms may have: 256 units in the last place."""
    return 256 * torch.finfo(dtype).eps


def relative_error(found: Tensor, true: Tensor) -> float:
    """Largest absolute difference relative to the largest absolute true value; inf where it is not a number."""
    if true.numel() == 0:
        return 0.0
    error = ((found - true).abs().max() / true.abs().max().clamp_min(torch.finfo(true.dtype).tiny)).item()
    return error if error == error else float("inf")


def some(labels: Iterable[str], count: int = 12) -> str:
    """The first labels, for an error message."""
    labels = list(labels)
    return ", ".join(map(repr, labels[:count])) + (f", ... ({len(labels)} in all)" if len(labels) > count else "")
