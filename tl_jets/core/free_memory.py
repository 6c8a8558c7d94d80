"""Refuses computations that do not fit in memory: within a container's limit, and without swapping on Linux."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from tl_jets.core.numerals import size_text

GROUP = Path("/sys/fs/cgroup")


def check_fits(n_bytes: int, what: str, remedy: str) -> None:
    """Raise ValueError if `n_bytes` are more than is free; the message contains `what` and `remedy`."""
    left = free_bytes()
    if left is not None and n_bytes > left:
        raise ValueError(
            f"{what} must fit in memory, of which {size_text(left)} is left; it takes about {size_text(n_bytes)}. {remedy}"
        )


def free_bytes(device: torch.device | None = None) -> int | None:
    """Memory that this process may still allocate, in bytes: of a CUDA device, or the machine's; None if unknown."""
    if device is not None and device.type == "cuda" and torch.cuda.is_available():
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
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
    """Free memory of a version 2 control group: limit minus usage, not counting reclaimable file cache."""
    try:
        limit, taken = ((GROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        cached = re.search(r"^inactive_file (\d+)", (GROUP / "memory.stat").read_text(), re.MULTILINE)
        return int(limit) - int(taken) + int(cached[1] if cached else 0)
    except (OSError, ValueError):  # no such group, or no limit ("max")
        return None
