"""Hooks that act at some positions only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Hooks = list[tuple[str, Callable[..., Tensor]]]


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
