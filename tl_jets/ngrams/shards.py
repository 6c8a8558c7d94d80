"""A sweep over several processes: each does its share of the work, and all return the same table.

Any number of devices or machines, one process each, started by `torchrun`; every process loads the model:

    # torchrun --nproc-per-node 2 sweep.py
    torch.distributed.init_process_group("gloo")  # or "nccl", after torch.cuda.set_device(...)
    table = tj.jet_bigrams(model, "mlps", top_k=100, distributed=True, save="mlps.parquet")

Nothing is divided unless `distributed` says so, whatever process groups there are: a job that is parallel for other
reasons stays as it is.

**Bi-grams.** Rows are read in chunks, chunk i by process i mod n. What a process has found so far is a few candidates
(`tl_jets.ngrams.scan`); at the end all processes get all of them, and the float64 scoring, which sets order and scores, is divided
again. So ids, order and scores are those of one process, up to the rounding of float64 sums. About every `PERIOD` seconds the
processes meet: one that failed stops the others then, with its message. Only process 0 reads and writes files; the state of an
unfinished sweep is that of one process, so that any number of processes resumes it.

**Skip-trigrams.** As many heads as there are processes are searched at a time; of a head that is left over the passes are divided,
queries in the first, keys in the second.

Everything is one primitive, `Processes.exchange`: do something, and learn what it gave in every process, or that one failed.
It uses torch's object collectives: what is sent passes through the CPU, and with nccl through the current CUDA device. Tests run
with gloo.

Cost: the slowest process's share. Memory: the model in each process; with `per="row"` all rows' best tokens in each.

Example:
    >>> alone = Processes.of(False)
    >>> alone.size, alone.exchange(lambda: 17), alone.map(abs, [-1, 2, -3])
    (1, [17], [1, 2, 3])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")
Item = TypeVar("Item")

Distributed = bool | ProcessGroup
# Seconds between two meetings of the processes of a sweep, about.
PERIOD = 5.0


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes that share a sweep, as one of them sees them.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        group: Torch's process group; None for a process by itself.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None

    @classmethod
    def of(cls, distributed: Distributed) -> Processes:
        """The processes that an option `distributed` means.

        Args:
            distributed: False: this process by itself. True: those of the default process group. Or a process group.

        Raises:
            ValueError: There is no default process group, or this process is not in the group.
            TypeError: It is neither a truth value nor a process group.
        """
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
        """What a computation gives in every process, by rank. All processes must call.

        Args:
            compute: Gives something that can be pickled; tensors arrive on the CPU (those of a process by itself stay).

        Raises:
            RuntimeError: Another process failed; its message is in the message.
            Exception: This process failed: what `compute` raised, after the others know.
        """
        if self.group is None:
            return [compute()]
        failure: Exception | None = None
        report: tuple[str | None, Any] = None, None
        try:
            report = None, _on_cpu(compute())
        except Exception as error:
            failure, report = error, (f"{type(error).__name__}: {error}", None)
        reports: list[Any] = [None] * self.size
        dist.all_gather_object(reports, report, group=self.group)
        if failure is not None:
            raise failure
        failed = [f"{rank} ({message})" for rank, (message, _) in enumerate(reports) if message is not None]
        if failed:
            raise RuntimeError(
                f"Every process of a sweep must do its share; of {self.size} processes this failed: {', '.join(failed)}. This "
                f"one is {self.rank}, and stops with it."
            )
        return [value for _, value in reports]

    def first(self, compute: Callable[[], T]) -> T:
        """What a computation gives in process 0, which alone does it; for files."""
        found: list[Any] = self.exchange(lambda: compute() if self.rank == 0 else None)
        return found[0]

    def map(self, compute: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """What a computation gives for every item: divided among the processes, known to all."""
        found: list[Any] = [None] * len(items)
        for rank, own in enumerate(self.exchange(lambda: [compute(x) for x in items[self.rank :: self.size]])):
            found[rank :: self.size] = own
        return found

    def agree(self, compute: Callable[[], T], about: Callable[[T], Mapping[str, Any]]) -> T:
        """What a computation gives in this process, if what is said about it is the same in all.

        Raises:
            ValueError: It is not; the message says in what.
        """
        if self.group is None:
            return compute()
        found: list[T] = []

        def said() -> dict[str, Any]:
            found.append(compute())
            return dict(about(found[0]))

        mine, *others = self.exchange(said)
        for rank, theirs in enumerate(others, 1):
            different = [
                f"{name} {mine.get(name)!r} and {theirs.get(name)!r}"
                for name in {**mine, **theirs}
                if mine.get(name) != theirs.get(name)
            ]
            if different:
                raise ValueError(
                    "All processes of a sweep must be given the same model and options; processes 0 and "
                    f"{rank} have {'; '.join(different)}. Give every process the same."
                )
        return found[0]

    def chunk_size(self, rows: int, largest: int) -> int:
        """Rows of a chunk so that all processes have as many chunks: at most `largest`, but for a multiple of 16."""
        if self.size == 1:
            return largest
        rounds = max(1, -(-rows // (self.size * largest)))
        return max(1, min(largest, -(-rows // (self.size * rounds * 16)) * 16))

    def pace(self, chunks: int, seconds: float) -> int:
        """How many chunks each process reads until all meet again, if the slowest took `seconds` for `chunks`."""
        return 1 if self.size == 1 else max(1, int(chunks * PERIOD / max(seconds, 1e-3)))


ALONE = Processes()


def _on_cpu(value: Any) -> Any:
    """Tensors of nested tuples, lists and dicts as copies on the CPU: a view would be sent with all that it is a view of."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _on_cpu(x) for key, x in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_on_cpu(x) for x in value)
    return value
