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

_SETTING = "fp32_precision"


@contextmanager
def full_float32() -> Iterator[None]:
    """A context, or a decorator, in which no product of float32 tensors rounds its factors. The setting is the process's."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    if not all(hasattr(backend, _SETTING) for backend in backends):  # before torch 2.9
        overall = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(overall)
        return
    # A program may use these settings or the older one; where it uses these, reading the older one fails.
    before = [getattr(backend, _SETTING) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, _SETTING, "ieee")
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            setattr(backend, _SETTING, setting)
