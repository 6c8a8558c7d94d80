"""Interface of TransformerLens views for heads, neurons and ready caches."""

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
        """Activations by hook name, calls and logits of a forward pass, which may stop at hook `until`."""
        ...

    def hooks(self, hooks: list[tuple[str, Any]]) -> AbstractContextManager[None]:
        """`model.hooks`, invisible to the traces and evaluations of other threads."""
        ...

    def refuse(self, *steps: Step) -> None:
        """Raise NotImplementedError if any of the steps cannot be replayed."""
        ...

    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP."""
        ...

    def device_of(self, layer: int) -> torch.device:
        """The device of a block."""
        ...

    def call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""
        ...

    def finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """Map the attention module's output to its write."""
        ...

    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """The MLP's write."""
        ...

    def shares(self, layer: int, which: Sublayer, parts: Tensor, out: Tensor) -> Tensor:
        """Contributions of parts of a sublayer's output `out` to its write."""
        ...

    def post_bias(self, layer: int) -> Tensor | None:
        """The bias of a norm after the MLP, as added to the write [d_model]."""
        ...
