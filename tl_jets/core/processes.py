"""Divides a sweep, or many prompts, among processes, which all return the same result.

Use one process a device, on any number of machines, started by `torchrun`; every process loads the model:

    # torchrun --nproc-per-node 2 sweep.py
    torch.distributed.init_process_group("gloo")  # or "nccl", after torch.cuda.set_device(...)
    table = tj.jet_bigrams(model, "mlps", top_k=100, distributed=True, save="mlps.parquet")
    lens = tj.over_prompts(tj.iterative_jet_lens, model, prompts, distributed=True)

**Prompts.** Process i mod n reads batch i; at the end all exchange their results (`tl_jets.core.over_prompts`).

**Bi-grams.** Process i mod n reads chunk i of the rows. At the end all processes exchange their candidates
(`tl_jets.ngrams.scan`) and divide the float64 scoring, so the table is that of one process, up to the rounding of
float64 sums. They synchronize about every `PERIOD` seconds; a failure in one then stops the others, with its message.
Only process 0 reads and writes files, and any number of processes can resume an unfinished sweep.

**Skip-trigrams.** Each process searches one head at a time; the two passes of left-over heads are divided.

Cost: the slowest process's share. Memory: the model in each process; with `per="row"` all rows' best tokens in each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

T = TypeVar("T")
Item = TypeVar("Item")

Distributed = bool | ProcessGroup
# Approximate seconds between two synchronizations.
PERIOD = 5.0


@dataclass(frozen=True, eq=False)
class Processes:
    """This process (`rank`) and the others that share a sweep; `group` is None for a single process."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, distributed: Distributed) -> Processes:
        """The processes of an option `distributed`; ValueError or TypeError unless this process is in the group."""
        if distributed is False:
            return cls()
        if distributed is True:
            if not (dist.is_available() and dist.is_initialized()):
                raise ValueError(
                    "distributed=True needs a process group; there is none. Call "
                    'torch.distributed.init_process_group("gloo") in a script that torchrun starts (torchrun '
                    "--nproc-per-node 2 script.py), or leave distributed out."
                )
            distributed = dist.group.WORLD  # type: ignore[assignment]
        if not isinstance(distributed, ProcessGroup):
            raise TypeError(
                f"distributed must be True, False or a process group that this process is in; got {distributed!r}. A process "
                "that is not in a group must not call."
            )
        return cls(dist.get_rank(distributed), dist.get_world_size(distributed), distributed)

    def exchange(self, compute: Callable[[], T]) -> list[T]:
        """The results of `compute` in all processes, by rank; all must call. In a group, tensors move to the CPU.

        Raises RuntimeError if another process failed, with its message.
        """
        if self.group is None:
            return [compute()]
        failure: Exception | None = None
        try:
            report: tuple[str | None, Any] = None, tree_map(_on_cpu, compute())
        except Exception as error:
            failure, report = error, (f"{type(error).__name__}: {error}", None)
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, report, group=self.group)
        if failure is not None:
            raise failure
        failed = [f"{rank} ({message})" for rank, (message, _) in enumerate(reports) if message is not None]
        if failed:
            raise RuntimeError(
                f"Every process of a sweep must finish its part; of {self.size} processes this failed: {', '.join(failed)}. This "
                f"one is {self.rank}, and stops with it."
            )
        return [value for _, value in reports]

    def first(self, compute: Callable[[], T]) -> T:
        """The result of `compute` in process 0, the only one that runs it; for files."""
        found: list[Any] = self.exchange(lambda: compute() if self.rank == 0 else None)
        return found[0]

    def map(self, compute: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """The results of `compute` for all items, which are divided among the processes."""
        found: list[Any] = [None] * len(items)
        for rank, own in enumerate(self.exchange(lambda: [compute(x) for x in items[self.rank :: self.size]])):
            found[rank :: self.size] = own
        return found

    def agree(self, compute: Callable[[], T], about: Callable[[T], Mapping[str, Any]]) -> T:
        """The result of `compute`; raises ValueError if what `about` says of it differs between processes."""
        if self.group is None:
            return compute()
        found: list[T] = []

        def said() -> dict[str, Any]:
            found.append(compute())
            return dict(about(found[0]))

        mine, *others = self.exchange(said)
        for rank, theirs in enumerate(others, 1):
            names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
            different = [f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in names]
            if different:
                raise ValueError(
                    "All processes of a sweep must be given the same model and options; processes 0 and "
                    f"{rank} have {'; '.join(different)}. Give every process the same."
                )
        return found[0]

    def chunk_size(self, rows: int, largest: int) -> int:
        """Rows of a chunk, at most `largest`, such that all processes get equally many chunks."""
        if self.size == 1:
            return largest
        rounds = max(1, -(-rows // (self.size * largest)))
        return max(1, min(largest, -(-rows // (self.size * rounds * 16)) * 16))

    def pace(self, chunks: int, seconds: float) -> int:
        """Chunks per process until the next synchronization, if the slowest took `seconds` for `chunks`."""
        return 1 if self.size == 1 else max(1, int(chunks * PERIOD / max(seconds, 1e-3)))


ALONE = Processes()


def _on_cpu(value: Any) -> Any:
    """A CPU copy of a tensor; a view would be pickled with its whole storage."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return value
