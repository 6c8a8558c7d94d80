"""Outputs: tables to standard output, numbers and pages to files, checked before anything is computed."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import Tensor

from tl_jets.cli.session import UsageError, one_line
from tl_jets.cli.terminal.parts import Terminal

STDOUT = "-"
KINDS = ("html", "json", "svg", "save")


@dataclass(frozen=True)
class Output:
    """Output files by kind; `-` is standard output, which then holds nothing else."""

    files: Mapping[str, str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Output:
        """The files of a command line; UsageError if one cannot be written, or two are the same."""
        given = {kind: getattr(options, kind, None) for kind in KINDS}
        files = {kind: file for kind, file in given.items() if file is not None}
        places = [STDOUT if file == STDOUT else str(Path(file).resolve()) for file in files.values()]
        for kind, file in files.items():
            if kind == "save" and is_folder(file):
                check_folder(Path(file))
                continue
            if file != STDOUT:
                check_writable(Path(file))
            elif kind == "save":
                raise UsageError("--save writes Parquet to a file, not to standard output; use --json - for that")
            elif sys.stdout is None:
                raise UsageError(f"--{kind} {STDOUT} writes to standard output, which is closed; give a file")
            if kind == "save":
                check_replaceable(Path(file))
        twice = [file for file, place in zip(files.values(), places, strict=True) if places.count(place) > 1]
        if twice:
            raise UsageError(f"each output needs a file of its own; got {twice[0]!r} more than once")
        return cls(files)

    @property
    def console(self) -> Terminal:
        """Console for tables; silent if standard output holds a file."""
        return Terminal(quiet=STDOUT in self.files.values())

    def __contains__(self, kind: str) -> bool:
        return kind in self.files

    def write(self, kind: str, text: str | Iterable[str]) -> None:
        """Write a text, or its parts, to the file of this kind."""
        parts = [text] if isinstance(text, str) else text
        if self.files[kind] == STDOUT:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8")  # as in files, whatever the terminal's encoding
            sys.stdout.writelines(parts)
            sys.stdout.write("\n")
            return
        try:
            with Path(self.files[kind]).open("w", encoding="utf-8") as file:
                file.writelines(parts)
        except OSError as error:
            raise UsageError(f"cannot write {self.files[kind]!r}: {one_line(error)}") from error

    def write_json(self, data: Any) -> None:
        """Write data as JSON, if requested."""
        if "json" in self:
            encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, indent=1)
            self.write("json", encoder.iterencode(plain(data)))

    def print(self, *parts: RenderableType) -> None:
        """Print tables."""
        console = self.console
        for part in parts:
            console.print(part)


def check_writable(path: Path) -> None:
    """Raise UsageError if a file cannot be written."""
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
    if path.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: it is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {str(path)!r}: permission denied")


def is_folder(file: str) -> bool:
    """Whether a name is an existing folder, or ends in a slash."""
    return file.endswith(("/", os.sep)) or Path(file).is_dir()


def check_folder(path: Path) -> None:
    """Raise UsageError if a folder cannot be created or written to."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"cannot write into {str(path)!r}: it is no directory")
    check_writable(path / "table" if path.is_dir() else path)


def check_replaceable(path: Path) -> None:
    """Raise UsageError if the path exists and is not a regular file (a device, say)."""
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {str(path)!r}: it is there already, and no regular file")


def header(command: str, **asked: Any) -> dict[str, Any]:
    """The first entries of every JSON file: version, command, and request."""
    return {"tl_jets": version("tl-jets"), "command": command, **asked}


class Records(list[Any]):
    """`count` records from the iterator `make()`, a list to the JSON encoder, but never all in memory."""

    def __init__(self, count: int, make: Callable[[], Iterator[Any]]):
        super().__init__()
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return map(plain, self.make())


def plain(value: Any) -> Any:
    """Plain lists, numbers and texts; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Records):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
