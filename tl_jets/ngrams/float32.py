"""Float32 matrix products in full precision, whatever the global settings of torch allow.

TF32, `torch.set_float32_matmul_precision("medium")` and the like round factors, which breaks the error bounds of sweeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_SETTING = "fp32_precision"


@contextmanager
def full_float32() -> Iterator[None]:
    """Context manager or decorator that turns off reduced precision in float32 products, for the whole process."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    with ExitStack() as restored:
        if all(hasattr(backend, _SETTING) for backend in backends):  # then reading the older setting may fail
            for backend in backends:
                restored.callback(setattr, backend, _SETTING, getattr(backend, _SETTING))
                setattr(backend, _SETTING, "ieee")
        else:  # before torch 2.9
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
