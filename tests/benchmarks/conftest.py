"""Ratios of what a user calls to what it cannot do without, measured in one process, baseline and target interleaved.

Run with `pytest tests/benchmarks/bench_lenses.py`; nothing here asserts a time. `OMP_NUM_THREADS` sets the threads.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULTS: list[tuple[str, float, float, str]] = []
ROUNDS = 15


@pytest.fixture
def ratio(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`ratio(target, baseline, limit)`: median time of `target` over that of `baseline`, noted beside its limit."""

    def measure(target: Callable[[], Any], baseline: Callable[[], Any], limit: float, rounds: int = ROUNDS) -> None:
        times: list[float] = []

        def time_baseline() -> None:
            start = time.perf_counter()
            baseline()
            times.append(time.perf_counter() - start)

        baseline()
        benchmark.pedantic(target, setup=time_baseline, rounds=rounds, warmup_rounds=1)
        found = benchmark.stats.stats.median / statistics.median(times)
        RESULTS.append((request.node.name, found, limit, "x"))

    return measure


@pytest.fixture
def peak_memory(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`peak_memory(target, limit)`: the largest resident size while `target` runs, less that before, in MB."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def measure(target: Callable[[], Any], limit: float) -> None:
        target()  # what stays allocated stays
        before, peak, done = resident(), 0.0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.0005):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        target()
        done.set()
        watcher.join()
        RESULTS.append((request.node.name, peak - before, limit, "MB"))

    return measure


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was measured beside its limit."""
    if RESULTS:
        terminalreporter.section("ratios (median of interleaved rounds) and their limits")
    for name, found, limit, unit in RESULTS:
        mark = "" if found <= limit else "   <-- above"
        terminalreporter.write_line(f"{name:58s} {found:8.2f} {unit:2s}  limit {limit:.2f}{mark}")
