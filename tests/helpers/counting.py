"""What a call would ask of a GPU, counted without one: dispatches, synchronisations, and bytes.

Tensors carry the name of a device that is not there (`tests/helpers/two_devices.py`), and run on the CPU. A *dispatch* is an
operation on named tensors that is no view, about a kernel launch. A *synchronisation* is what makes the host wait for the
device, as `torch.cuda.set_sync_debug_mode` defines it: reading a value (`.item()`, `bool(x)`, `.tolist()`), a copy to or from
the host, and operations whose result has a size that depends on values (`nonzero`, masks as indices, `unique`) or that look
at an error code. What is read on the host is free. Looks at weights, whether they have changed, bypass the names of devices, and
are counted where they are read. Bytes are those alive at once (`tests/helpers/live_memory.py`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from live_memory import Live
from torch.utils._pytree import tree_leaves
from two_devices import CPU, DEVICES, TwoDevices

import tl_jets.core.changes as changes

aten = torch.ops.aten
# Operations that make the host wait, whatever their arguments are.
_WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._linalg_check_errors, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.unique_dim_consecutive, aten.repeat_interleave),
}
_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


@dataclass
class Counts:
    """What a call took; `places` says where in the library it waited."""

    dispatches: int = 0
    synchronisations: int = 0
    peak_bytes: int = 0
    places: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)


class _Device(TwoDevices):
    """Tensors with names of devices; says whether the operation at work is one of the device."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.at_work = False

    def wait(self) -> None:
        """Count a synchronisation, at the innermost line of the library."""
        self.counts.synchronisations += 1
        self.counts.places[_place()] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, given = self.at_work, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        named = any(self.device(x) != CPU for x in given)
        self.at_work = named or torch.device((kwargs or {}).get("device") or CPU) != CPU
        try:
            if named and func in _READS:
                self.wait()
                return func(*args, **(kwargs or {}))
            return super().__torch_function__(func, types, args, kwargs)
        finally:
            self.at_work = before

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.at_work, source = False, self.device(args[0])
        out = super()._move(func, args, kwargs)
        if CPU in (source, self.device(out)) and source != self.device(out):
            self.wait()
        elif source != CPU and out is not args[0]:
            self.counts.dispatches += 1
        return out


class _Operations(Live):
    """Counts operations of a device."""

    def __init__(self, device: _Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.device.at_work and not func.is_view:
            self.device.counts.dispatches += 1
            self.device.counts.operations[str(func)] += 1
            if func.overloadpacket in _WAITING or _has_masks(func, args):
                self.device.wait()
        return super().__torch_dispatch__(func, types, args, kwargs)


def _has_masks(func: Any, args: Any) -> bool:
    """Whether an operation takes a mask as an index; one that fills with a number does not wait."""
    packet = func.overloadpacket
    if packet is aten.index:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if packet in (aten.index_put, aten.index_put_, aten._index_put_impl_):
        return any(x is not None and x.dtype == torch.bool for x in args[1]) and args[2].numel() > 1
    return False


def _place() -> str:
    """The innermost line of the library that is running."""
    frame: Any = sys._getframe(2)
    while frame is not None and "/tl_jets/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "outside"
    return f"{frame.f_code.co_filename.rpartition('/tl_jets/')[2]}:{frame.f_lineno}"


def counted(run: Callable[..., Any], *modules: torch.nn.Module, prepare: Callable[[], Any] | None = None) -> Counts:
    """Count what `run()` takes, with the parameters of some modules on a device.

    With `prepare`, `run` takes its result, and its second call is counted, when what is kept with a model is there.
    """
    counts, read = Counts(), changes._read

    def looked(flags: Any) -> Any:
        if flags:
            device.wait()
        return read(flags)

    with _Device(counts) as device, _Operations(device) as operations, mock.patch.object(changes, "_read", looked):
        for module in modules:
            device.put(module, DEVICES[0])
        given = [] if prepare is None else [prepare()]
        if given:
            run(*given)
        counts = device.counts = Counts()
        before = operations.peak = operations.now
        kept = run(*given)
        counts.peak_bytes = operations.peak - before
        del kept
    return counts
