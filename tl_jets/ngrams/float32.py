"""Float32 products as they are, whatever a program allows elsewhere.

`torch.set_float32_matmul_precision("medium")`, TF32 and the settings of torch's backends round the factors of float32 products to
10 or 7 bits, for speed. What is exact about n-grams would not be: sweeps compute inside `full_float32()`.

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


@contextmanager
def full_float32() -> Iterator[None]:
    """A context, or a decorator, in which no product of float32 tensors rounds its factors. The setting is the process's."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if _HAS_BACKEND_SETTINGS else []
    before = [backend.fp32_precision for backend in backends]  # type: ignore[attr-defined]
    overall = None if backends else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"  # type: ignore[attr-defined]
        if overall is not None:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            backend.fp32_precision = setting  # type: ignore[attr-defined]
        if overall is not None:
            torch.set_float32_matmul_precision(overall)


# Torch 2.9 and later; a program may use these settings or the older one, and reading the older one then fails.
_HAS_BACKEND_SETTINGS = hasattr(torch.backends.mkldnn, "matmul") and hasattr(
    torch.backends.mkldnn.matmul, "fp32_precision"
)
