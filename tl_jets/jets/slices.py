"""Slices of the batch and position dimensions of caches, as TransformerLens' `ActivationCache` takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# As in TransformerLens, a tuple is (start, stop, step), and an int drops the dimension.
SliceInput = int | slice | tuple[int, ...] | list[int] | Tensor


def read_slice(
    name: str, index: Any, chosen: list[int] | int | Tensor | None, size: int
) -> tuple[int | slice | list[Any], list[int] | int | Tensor]:
    """A slice as PyTorch takes it, and the entries of `chosen` (None: all of `size`) that it keeps."""
    if isinstance(chosen, int) or (isinstance(chosen, Tensor) and chosen.ndim < 2):
        raise ValueError(
            f"A slice of the {name} dimension needs one; an int took it from this cache. Slice the cache from before, or "
            f"write [index] for the int."
        )
    index = index.tolist() if isinstance(index, Tensor) else slice(*index) if isinstance(index, tuple) else index
    size = size if chosen is None else chosen.shape[1] if isinstance(chosen, Tensor) else len(chosen)
    left = torch.arange(size, device="cpu")[index]
    if left.ndim > 1 or not left.numel():
        raise ValueError(
            f"A slice of the {name} dimension must keep some of its {size} entries; "
            f"{index!r} keeps {left.tolist()}. Pass an int, a slice, or indices."
        )
    if isinstance(chosen, Tensor):
        return index, chosen[:, left.to(chosen.device)]
    return index, left.tolist() if chosen is None else torch.tensor(chosen, device="cpu")[left].tolist()
