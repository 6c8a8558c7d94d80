"""Base class of results: tensors with labels and options that move to another device together.

Example:
    >>> import tl_jets as tj
    >>> sums = tj.path_sums(tj.load_tinydocs(), "This function is available on Unix and")
    >>> moved = sums.to("meta")
    >>> moved.share.device, sums.share.device, moved.labels == sums.labels
    (device(type='meta'), device(type='cpu'), True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tl_jets.core.notebook import Shown

Kind = TypeVar("Kind", bound="Result")


class Result(Shown):
    """Base of frozen dataclasses of tensors, labels, options, or other results."""

    def to(self: Kind, device: torch.device | str | int) -> Kind:
        """A copy on another device; raises TypeError for a dtype."""
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"A result moves to a device; got {device}, which is none. Convert the tensor that you need, .kl.double()."
            )
        return self._mapped(lambda values: values.to(device))

    def _mapped(self: Kind, change: Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> Kind:
        """A copy with `change` applied to every tensor, or to the named fields."""
        found: dict[str, Any] = {}
        for name in (field.name for field in fields(self)) if names is None else names:  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, Result):
                found[name] = value._mapped(change)
            elif isinstance(value, Tensor):
                found[name] = change(value)
        return replace(self, **found)  # type: ignore[type-var]
