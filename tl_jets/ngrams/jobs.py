"""Sweeps: many tables, each saved when it is finished, resumed after a kill at any moment without redoing finished work.

A `Job` says what a table will be (path, settings, fingerprint of the model) before it is computed. `sweep` runs jobs one after the
other and saves each table as `<folder>/<name>.parquet`, atomically; started again, it loads what is there, after checking that it
is the table of the job, and computes the rest. A file of other settings or of another model is refused, never overwritten.

Jobs may come from a generator, so that one model at a time is loaded:

    jobs = (bigram_job(load(step), "mlps", name=f"step-{step}") for step in steps)
    tables = sweep(jobs, "tables")

Example:
    >>> import tempfile, tl_jets as tj
    >>> from tl_jets.ngrams import bigram_job
    >>> model = tj.load_tinydocs()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = sweep([bigram_job(model, "mlps", top_k=5)], folder)
    ...     again = sweep([bigram_job(model, "mlps", top_k=5), bigram_job(model, "direct", top_k=5)], folder)
    >>> list(again), first["mlps"].digest == again["mlps"].digest
    (['mlps', 'direct'], True)
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm import tqdm

from tl_jets.core.atomic_files import write_atomically
from tl_jets.ngrams.shards import ALONE, Processes
from tl_jets.ngrams.tables import NgramTable

SUFFIX = ".parquet"
FILE_NAME = re.compile(r"\w[\w .,>+-]*")
# How often the state of an unfinished table is saved.
STATE_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """A table to be made.

    Attributes:
        name: Of its file, without a suffix: letters, digits, and `_ - . , > +` with spaces between.
        run: Makes the table. It is given a file for its unfinished state (see `State`), or None.
        path: The table's path.
        settings: The table's settings, plain JSON values.
        fingerprint: The model's fingerprint.
        processes: Those that make the table together, each with its own such job; the first one reads and writes files.

    Raises:
        ValueError: The name is no file name.
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
        """What the table's header will be."""
        return {
            "path": self.path,
            "settings": json.loads(json.dumps(dict(self.settings))),
            "fingerprint": self.fingerprint,
        }


def sweep(jobs: Iterable[Job], folder: str | Path, *, progress: bool = True) -> dict[str, NgramTable]:
    """Make every table that is not there yet, saving each when it is finished.

    Args:
        jobs: What to make, in this order; of each name one.
        folder: Where the tables are; made if it does not exist.
        progress: Show a bar in a terminal.

    Returns:
        All tables, by the names of their jobs.

    Raises:
        ValueError: A file that is there belongs to other settings, another path or another model, or is damaged; or two
            jobs have one name.

    Cost:
        The jobs that are not finished. A killed sweep repeats at most the work since the state was last saved; of
        skip-trigrams, which have no such state, a head.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    total = len(jobs) if hasattr(jobs, "__len__") else None  # type: ignore[arg-type]
    tables: dict[str, NgramTable] = {}
    for job in tqdm(jobs, total=total, unit="table", delay=1, leave=False, disable=None if progress else True):
        if job.name in tables:
            raise ValueError(f"Jobs must have names of their own; {job.name!r} comes twice. Give name=...")
        tables[job.name] = finish(job, folder / f"{job.name}{SUFFIX}")
    return tables


def finish(job: Job, file: str | Path) -> NgramTable:
    """The table of a job: from its file if it is there, else made and saved.

    Raises:
        ValueError: The file is not of this job.
    """
    file = Path(file)
    table = job.processes.first(lambda: saved(file, job.header))
    if table is not None:
        return table
    state = file.with_name(f"{file.name}.state")
    table = job.run(state)
    assert table.header == job.header, "a job makes the table that it announces"

    def save() -> None:
        table.save(file)
        state.unlink(missing_ok=True)

    job.processes.first(save)
    return table


def saved(file: Path, header: Mapping[str, Any]) -> NgramTable | None:
    """The table of a file, if there is one; else what a killed process left half written is removed.

    Raises:
        ValueError: The file has another header.
    """
    if file.exists():
        table = NgramTable.load(file)
        check_header(table.header, header, file)
        return table
    for leftover in file.parent.glob(f".{file.name}.*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink(missing_ok=True)
    return None


def check_header(found: Mapping[str, Any], wanted: Mapping[str, Any], file: Path) -> None:
    """Raise ValueError unless what is in a file is what is wanted."""
    flat = [{**header, **header["settings"]} for header in (found, wanted)]
    names = sorted({*flat[0], *flat[1]} - {"settings"})
    different = [
        f"{name} {flat[0].get(name)!r}, not {flat[1].get(name)!r}"
        for name in names
        if flat[0].get(name) != flat[1].get(name)
    ]
    if different:
        raise ValueError(
            f"A file that is there must be of the same model and settings to go on from; {str(file)!r} has "
            f"{'; '.join(different)}. Save to another file or folder, or delete this one."
        )


class State:
    """The unfinished state of a table in a file, so that a killed process is resumed within it.

    Args:
        file: Where; None keeps no state.
        header: What the state belongs to.
    """

    def __init__(self, file: Path | None, header: Mapping[str, Any]):
        self.file = file
        self.header = dict(header)
        self.saved = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many rows are done, and the tensors; 0 and none without a file.

        Raises:
            ValueError: The file belongs to something else.
        """
        if self.file is None or not self.file.exists():
            return 0, {}
        try:
            with safe_open(self.file, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["tl_jets"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{str(self.file)!r} is no state of an unfinished table ({error}). Delete it.") from error
        check_header(about["header"], self.header, self.file)
        return int(about["rows"]), tensors

    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.file is not None and time.monotonic() >= self.saved + STATE_SECONDS

    def save(self, rows: int, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Save what `tensors` gives, and how many rows it is of."""
        assert self.file is not None, "a state without a file is never due"
        about = {"tl_jets": json.dumps({"header": self.header, "rows": rows})}
        data = to_bytes({name: x.cpu().contiguous() for name, x in tensors().items()}, metadata=about)
        write_atomically(self.file, lambda stream: stream.write(data))
        self.saved = time.monotonic()
