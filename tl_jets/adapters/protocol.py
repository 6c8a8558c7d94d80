"""What heads, neurons and ready caches need of the view of a TransformerLens model."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tl_jets.core.protocol import Step

Sublayer = Literal["attn", "mlp"]


@runtime_checkable
class BlocksView(Protocol):
    """The blocks of a TransformerLens model, callable at any stream [batch, pos, d_model]."""

    model: Any
    blocks: list[Any]
    n_layers: int
    name: str
    dtype: torch.dtype
    native_dtype: torch.dtype
    device: torch.device
    stream_names: list[str]
    checked: set[Hashable]
    opaque: set[int]

    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None, until: str | None = None
    ) -> tuple[dict[str, Tensor], Any, Any]:
        """Streams and writes by hook name, calls and logits of a forward pass, which may end at hook `until`."""
        ...

    def hooks(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[None]:
        """`model.hooks`, which no other thread's traces and evaluations see."""
        ...

    def refuse(self, *steps: Step) -> None:
        """Raise NotImplementedError for the first of some steps that cannot be evaluated elsewhere."""
        ...

    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP at all."""
        ...

    def device_of(self, layer: int) -> torch.device:
        """Where a block is."""
        ...

    def call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""
        ...

    def finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """From the attention module's output to what is added to the stream."""
        ...

    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        ...

    def shares(self, layer: int, which: Sublayer, parts: Tensor, out: Tensor) -> Tensor:
        """What parts of a sublayer's output `out` are of its write."""
        ...

    def post_bias(self, layer: int) -> Tensor | None:
        """What the bias of a norm after the MLP adds to its write [d_model]."""
        ...
