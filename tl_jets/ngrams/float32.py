"""Float32 matrix products in full precision, whatever the global settings of torch allow.

TF32, `torch.set_float32_matmul_precision("medium")` and backend settings round factors to 10 or 7 bits, which breaks
the error bounds of n-gram sweeps.

Example:
    >>> import torch
    >>> torch.set_float32_matmul_precision("medium")
    >>> x = torch.randn(64, 64)
    >>> with full_float32():
    ...     bool(((x @ x).double() - x.double() @ x.double()).abs().max() < 1e-4)
    True
    >>> torch.get_float32_matmul_precision()
    'medium'
    >>> torch.set_float32_matmul_precision("highest")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SETTING = "fp32_precision"


@contextmanager
def full_float32() -> Iterator[None]:
    """Context manager or decorator that turns off reduced precision in float32 products, for the whole process."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, _SETTING) for backend in backends):  # before torch 2.9
        overall = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(overall)
        return
    # Reading the older setting fails in programs that use these.
    before = [getattr(backend, _SETTING) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, _SETTING, "ieee")
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            setattr(backend, _SETTING, setting)
