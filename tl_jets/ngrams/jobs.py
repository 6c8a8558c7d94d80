"""Sweeps: many tables, each saved when it is finished; a killed sweep resumes without repeating finished work.

A `Job` describes a table (path, settings, fingerprint) before it is computed. `sweep` saves tables as
`<folder>/<name>.parquet`, atomically. It loads existing tables that match their job, and refuses other files. Jobs may
come from a generator, which loads one model at a time:

    jobs = (bigram_job(load(step), "mlps", name=f"step-{step}") for step in steps)
    tables = sweep(jobs, "tables")

Example:
    >>> import tempfile, tl_jets as tj
    >>> from tl_jets.ngrams import bigram_job
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     list(sweep([bigram_job(tj.load_tinydocs(), path, top_k=5) for path in ("mlps", "direct")], folder))
    ['mlps', 'direct']
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.atomic_files import check_writable, remove_leftovers, write_atomically
from tl_jets.core.network import ResidualNetwork
from tl_jets.core.processes import ALONE, Distributed, Processes
from tl_jets.ngrams.fingerprints import known_fingerprint
from tl_jets.ngrams.tables import NgramTable

# Seconds from which a sweep says at its start how long it will take.
LONG = 20.0

Kind = TypeVar("Kind", bound="Sweep")
SUFFIX = ".parquet"
STATE_FORMAT = 2
FILE_NAME = re.compile(r"\w[\w .,>+-]*")
# Seconds between two saves of an unfinished table.
STATE_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """A table to compute.

    Attributes:
        name: File name without suffix: letters, digits, and `_ - . , > +` with spaces between.
        run: Computes the table; takes a file for its unfinished state (see `State`), or None.
        path: The table's path.
        settings: The table's settings, plain JSON values.
        fingerprint: The model's fingerprint.
        processes: Processes that compute the table together, each with its own copy of the job.

    Raises:
        ValueError: The name is not a file name.
    """

    name: str
    run: Callable[[Path | None], NgramTable] = field(repr=False)
    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    processes: Processes = field(default=ALONE, repr=False)

    def __post_init__(self) -> None:
        if not FILE_NAME.fullmatch(self.name):
            raise ValueError(
                f"A job's name must begin with a letter or digit and be a file name; got {self.name!r}. Give name=..."
            )

    @property
    def header(self) -> dict[str, Any]:
        """The table's header."""
        settings = json.loads(json.dumps(dict(self.settings)))
        return {"path": self.path, "settings": settings, "fingerprint": self.fingerprint}


class Sweep:
    """Base of bi-gram and skip-trigram sweeps: what tables are named and checked by."""

    network: ResidualNetwork
    settings: dict[str, Any]
    processes: Processes
    # Whether tables go to files, and the state of weights and hooks that a fingerprint may be known of.
    saves: bool = True
    state: Any = None

    @classmethod
    def planned(
        cls: type[Kind], *args: Any, saves: bool = False, distributed: Distributed = False, **options: Any
    ) -> Kind:
        """A sweep with checked options, equal in all processes; `saves` says whether its tables go to files."""
        processes = Processes.of(distributed)

        def plan() -> Kind:
            made = cls(*args, processes=processes, **options)  # type: ignore[call-arg]
            made.saves = saves
            return made

        return processes.agree(plan, lambda made: made.description() | {"saves": saves})

    @cached_property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return known_fingerprint(self.network, None if self.saves else self.state)

    def description(self) -> dict[str, Any]:
        """Options and model, which must be equal in all processes."""
        return {**self.settings, "model": self.fingerprint}

    def header(self, path: str) -> dict[str, Any]:
        """The header of a path's table."""
        return {"path": path, "settings": self.settings, "fingerprint": self.fingerprint}

    def load(self, folder: str | Path, paths: Iterable[str]) -> dict[str, NgramTable]:
        """The tables of `paths` that are in a folder, which is created if needed."""

        def load() -> dict[str, NgramTable]:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tables = {path: saved(_file(folder, path), self.header(path)) for path in paths}
            return {path: table for path, table in tables.items() if table is not None}

        return self.processes.first(load)

    def save(self, folder: str | Path, tables: Collection[NgramTable], state: Path | None = None) -> None:
        """Save finished tables in a folder, then delete the file of their unfinished state."""
        self.processes.first(lambda: save(tables, [_file(folder, table.path) for table in tables], state))


def _file(folder: str | Path, name: str) -> Path:
    return Path(folder) / f"{name}{SUFFIX}"


def sweep(jobs: Iterable[Job], folder: str | Path, *, progress: bool = True) -> dict[str, NgramTable]:
    """Compute and save every table that does not exist yet; returns all of them, by the names of their jobs.

    Args:
        jobs: Jobs in the order to run, with distinct names.
        folder: Folder of the tables; created if needed.
        progress: Show a bar in a terminal.

    Raises:
        ValueError: An existing file is damaged or belongs to another job or (unfinished states) to another version of
            tl-jets; or two jobs have the same name.
        OSError: A table could not be saved.

    Cost: that of the unfinished jobs; a killed sweep repeats the work since the last save, or one head of skip-trigrams.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(jobs) if hasattr(jobs, "__len__") else None  # type: ignore[arg-type]
    tables: dict[str, NgramTable] = {}
    for job in tqdm(jobs, total=total, unit="table", delay=1, leave=False, disable=None if progress else True):
        if job.name in tables:
            raise ValueError(f"Jobs must have names of their own; {job.name!r} comes twice. Give name=...")
        tables[job.name] = finish(job, _file(folder, job.name))
    return tables


def finish(job: Job, file: str | Path) -> NgramTable:
    """The table of a job, loaded from its file or computed and saved; ValueError if the file is of another job."""
    file = Path(file)
    state = file.with_name(f"{file.name}.state")
    table = job.processes.first(lambda: saved(file, job.header, state))
    if table is not None:
        return table
    table = job.run(state)
    assert table.header == job.header, "a job makes the table that it announces"
    job.processes.first(lambda: save([table], [file], state))
    return table


def saved(file: Path, header: Mapping[str, Any], state: Path | None = None) -> NgramTable | None:
    """The table in a file, or None; removes leftovers of killed processes. ValueError if the header differs."""
    remove_leftovers(file)
    if not os.path.isfile(file):
        check_writable(file)
        return None
    table = NgramTable.load(file)
    check_header(table.header, header, file)
    if state is not None:
        state.unlink(missing_ok=True)
        remove_leftovers(state)
    return table


def save(tables: Iterable[NgramTable], files: Iterable[Path], state: Path | None) -> None:
    """Save finished tables, then delete the file of their unfinished state."""
    for table, file in zip(tables, files, strict=True):
        table.save(file)
    if state is not None:
        state.unlink(missing_ok=True)


def check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError unless the header found in a file is the required one."""
    old, new = ({**header, **header["settings"]} for header in (found, wanted))
    # Older tables do not say whether embeddings are tied, which the fingerprint implies.
    names = sorted({*old, *new} - {"settings", "tied_embeddings"})
    different = [f"{name} {old.get(name)!r}, not {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]
    if different:
        raise ValueError(
            f"A file that is there must be of the same model and settings to go on from; {str(file)!r} has "
            f"{'; '.join(different)}. Save to another file or folder, or delete this one."
        )


class State:
    """A file with the unfinished state of a table, from which a killed process resumes; no state without a `file`.

    It holds the digest of the rest, JSON (header, versions of tl-jets and of this format, number of finished rows), and
    tensors as safetensors. Files of other versions are refused.
    """

    def __init__(self, file: Path | None, header: Mapping[str, Any]):
        self.file = file
        self.header = {**header, "state_format": STATE_FORMAT, "tl_jets": version("tl-jets")}
        self.saved = time.monotonic()

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """Remove leftovers of killed processes, then `load`. For the one process that writes the state."""
        if self.file is not None:
            remove_leftovers(self.file)
        return self.load()

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """The number of finished rows and the tensors (0 and none without a file), only read; ValueError for other files."""
        if self.file is None or not self.file.exists():
            return 0, {}
        try:
            digest, about, data = self.file.read_bytes().split(b"\n", 2)
            if digest != _digest(about, data):
                raise ValueError("its digest is not that of what it holds")
            found, tensors = json.loads(about), from_bytes(data)
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{str(self.file)!r} is no state of an unfinished table, or was changed ({error}). Delete it to begin anew."
            ) from error
        check_header(found["header"], self.header, self.file)
        return found["rows"], tensors

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.file is not None and time.monotonic() >= self.saved + STATE_SECONDS

    def save(self, rows: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Save the tensors that `tensors` returns, and the number of rows they cover."""
        assert self.file is not None, "a state without a file is never due"
        about = json.dumps({"header": self.header, "rows": rows}).encode()
        data = to_bytes({name: x.cpu().contiguous() for name, x in tensors().items()})
        parts = (_digest(about, data), b"\n", about, b"\n", data)
        write_atomically(self.file, lambda stream: stream.writelines(parts))
        self.saved = time.monotonic()


def _digest(about: bytes, data: bytes) -> bytes:
    total = hashlib.sha256(about + b"\n")
    total.update(data)
    return total.hexdigest().encode()


def say_how_long(what: str, seconds: float) -> None:
    """Say how long a long sweep will take, from the time of its first chunk; on standard error, above the bar."""
    if seconds > LONG:
        time_left = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        tqdm.write(f"tl-jets: {what}: about {time_left}", file=sys.stderr)
