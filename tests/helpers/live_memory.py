"""Memory of the tensors that are alive while something runs: what an allocator or the rest of the process keeps is not in it.

Every operation passes through the mode, backward passes included; a storage counts from the operation that made it until
nothing refers to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Sizes of the storages that are alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(target: Callable[[], Any]) -> int:
    """The most that tensors made by `target` take at once, in bytes."""
    with Live() as live:
        kept = target()
    del kept
    return live.peak
