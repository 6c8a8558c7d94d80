"""Positions of prompts, and hooks that act at some positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

Hooks = list[tuple[str, Callable[..., Tensor]]]


def cells_at(valid: Bool[Tensor, "batch pos"], positions: Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """Cells at positions counted among each prompt's real tokens, -1 its last; ValueError if a prompt lacks one."""
    shortest = int(valid.sum(1).min())
    if not positions or not all(-shortest <= position < shortest for position in positions):
        raise ValueError(
            f"positions must lie in {-shortest}..{shortest - 1}, the real tokens of the source's shortest prompt; got "
            f"{list(positions)}."
        )
    place, length = valid.cumsum(1) - 1, valid.sum(1, keepdim=True)
    found = torch.zeros_like(valid)
    for position in positions:
        found |= place == position + (length if position < 0 else 0)
    return found & valid


def only_at(positions: Any, hooks: Hooks) -> Hooks:
    """The hooks, changing only some positions."""
    if positions is None:
        return hooks

    def only(edit: Callable[..., Tensor], write: Tensor, hook: Any = None) -> Tensor:
        where = positions
        if not isinstance(where, Tensor) or where.dtype is not torch.bool:
            where = torch.zeros(write.shape[:2], dtype=torch.bool, device=write.device)
            try:
                where[:, positions] = True
            except IndexError as error:
                raise ValueError(f"positions must lie in the input's {write.shape[1]}; got {positions}.") from error
        elif where.shape != write.shape[:2]:
            raise ValueError(f"A mask of positions must be {list(write.shape[:2])} here; got {list(where.shape)}.")
        chosen = where.to(write.device).view(*where.shape, *[1] * (write.ndim - 2))
        return torch.where(chosen, edit(write, hook), write)

    return [(point, partial(only, edit)) for point, edit in hooks]
