"""Token ids given by the user: checks, and their description in the settings of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

TokenIds = Sequence[int] | Int[Tensor, " token"]


def read_tokens(
    name: str, ids: TokenIds | None, size: int, device: torch.device | str = "cpu"
) -> Int[Tensor, " token"]:
    """Sorted, distinct token ids, None for all; ValueError, with `name`, unless they are ids below `size`."""
    if ids is None:
        return torch.arange(size, device=device)
    if not isinstance(ids, Tensor) and any(isinstance(token, str) for token in ids):
        raise ValueError(f"{name} must be token ids; got {ids!r}. `model.to_single_token` gives a token's id.")
    found = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), device=device)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype is torch.bool:
        raise ValueError(f"{name} must be a list of token ids, at least one; got {ids!r}. Pass None for all.")
    if int(found.min()) < 0 or int(found.max()) >= size:
        raise ValueError(f"{name} must be ids in 0..{size - 1}; got {int(found.min())}..{int(found.max())}.")
    return found.long().unique()


def described(ids: Tensor | None, given: Any) -> str | dict[str, Any]:
    """A short description of a subset of tokens: their number and hash, or "all"."""
    if given is None or ids is None:
        return "all"
    return {"count": len(ids), "sha256": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()}
