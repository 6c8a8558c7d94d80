"""Checks of tensors of rows, with as few synchronizations of a device as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless a tensor of rows has the given shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be [{axes}] = {tuple(shape)} here, got shape {tuple(tensor.shape)}. "
            "Give every input the same layers, orders and rows (batch and position flattened)."
        )


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless a tensor of rows has the given shape and is finite."""
    check_all_rows({name: (tensor, shape, axes)})


def check_all_rows(tensors: dict[str, tuple[Tensor, tuple[int, ...], str]], more: Sequence[Tensor] = ()) -> Tensor:
    """Raise ValueError unless tensors of rows have the given shapes, and are finite.

    Returns the flags `more` on the CPU, read along with the checks: every look at a device waits for it.
    """
    for name, (tensor, shape, axes) in tensors.items():
        check_shape(name, tensor, shape, axes)
    finite = [tensor.isfinite().all()[None] for tensor, _, _ in tensors.values()]
    flags = torch.cat([*finite, *more]).cpu()
    for (name, (tensor, _, _)), is_finite in zip(tensors.items(), flags.tolist(), strict=False):
        if not is_finite:
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{name} must be finite, got {count} NaN or infinite values of {tensor.numel()}. Look for masked (padding) "
                "positions, an overflow in half precision, a series evaluated at a zero center, or one of high order that "
                "diverges (rho > 1; see center_scale)."
            )
    return flags[len(tensors) :]
