"""Warns at the line of the caller outside of tl_jets."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_caller(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the first frame outside of tl_jets, torch and decorators."""
    frame, depth = sys._getframe(), 1
    while frame.f_back is not None and _is_inside(frame):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, category, stacklevel=depth)


def _is_inside(frame: FrameType) -> bool:
    """Whether a frame belongs to the library or to a decorator around it."""
    name = str(frame.f_globals.get("__name__", ""))
    inside = ("tl_jets", "torch.", "jaxtyping", "beartype", "contextlib")
    return name.startswith(inside) or frame.f_code.co_filename.startswith("<@beartype")
