"""Number formats of tables, pages and terminals.

Example:
    >>> number(3.14159), number(271.8), number(0.00031), number(1e-9), number(float("nan")), signed(2.5)
    ('3.14', '272', '3.1e-4', '0.00', 'n/a', '+2.50')
"""

from __future__ import annotations

import math
from typing import SupportsFloat


def number(value: SupportsFloat | None) -> str:
    """Two decimals, or three digits; `n/a` for None and NaN. Values below 1e-6 are rounding errors, shown as 0."""
    if value is None or math.isnan(value := float(value)):
        return "n/a"
    size = abs(value)
    if math.isinf(size):
        return "\u221e" if value > 0 else "-\u221e"
    if size <= 1e-6:
        return "0.00"
    if size >= 10_000 or size < 0.005:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def precise(value: float) -> str:
    """Four digits, for hover texts."""
    return number(value) if not math.isfinite(value) or abs(value) <= 1e-6 else f"{value:.4g}"


def signed(value: SupportsFloat | None) -> str:
    """A number with its sign."""
    text = number(value)
    return text if text[0] in "-n" else f"+{text}"


def size_text(n_bytes: int) -> str:
    """A size in memory as text with a unit."""
    size, unit = float(n_bytes), 0
    while size >= 1024 and unit < 5:
        size, unit = size / 1024, unit + 1
    return f"{size:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[unit]}"
