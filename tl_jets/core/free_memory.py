"""What does not fit in memory is refused before it is computed: a machine that swaps may not come back.

What is left is what the system says it can give without swapping (Linux), or all there is, and no more than the control group of a
container has left. Where nobody says (Windows), nothing is refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from tl_jets.core.linear_map import size_text

GROUP = Path("/sys/fs/cgroup")


def check_fits(n_bytes: int, what: str, remedy: str) -> None:
    """Refuse what takes more memory than is left.

    Args:
        n_bytes: About what it takes.
        what: What it is, for the message.
        remedy: What to do, for the message.

    Raises:
        ValueError: It does not fit.
    """
    left = free_bytes()
    if left is not None and n_bytes > left:
        raise ValueError(
            f"{what} must fit in memory, of which {size_text(left)} is left; it takes about {size_text(n_bytes)}. {remedy}"
        )


def free_bytes() -> int | None:
    """What this process may still take; None where nobody says."""
    found = [left for left in (_of_system(), _of_group()) if left is not None]
    return min(found, default=None)


def _of_system() -> int | None:
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024 * int(available[1]) if available else None
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _of_group() -> int | None:
    """Of version 2: the limit less what is taken, but for what was read from files and can be given back."""
    try:
        limit, taken = ((GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)", (GROUP / "memory.stat").read_text(), re.MULTILINE)
        return int(limit) - int(taken) + int(cached[1] if cached else 0)
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return None
