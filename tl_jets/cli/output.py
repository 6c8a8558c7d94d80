"""Where results go: tables to standard output, numbers and pages to files; what cannot be written is refused at once."""

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
    """The files asked for, by kind; `-` is standard output, which then holds nothing else.

    Raises:
        UsageError: A file cannot be written, two are the same, or more than one is standard output.
    """

    files: Mapping[str, str]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Output:
        """Those of a command line, checked before anything is computed."""
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
        """Where tables go: nowhere if standard output holds a file."""
        return Terminal(quiet=STDOUT in self.files.values())

    def __contains__(self, kind: str) -> bool:
        return kind in self.files

    def write(self, kind: str, text: str | Iterable[str]) -> None:
        """Write a text, or its parts, to the file of its kind."""
        parts = [text] if isinstance(text, str) else text
        if self.files[kind] == STDOUT:
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(encoding="utf-8")  # files are, whatever the terminal is
            sys.stdout.writelines(parts)
            sys.stdout.write("\n")
            return
        try:
            with Path(self.files[kind]).open("w", encoding="utf-8") as file:
                file.writelines(parts)
        except OSError as error:
            raise UsageError(f"cannot write {self.files[kind]!r}: {one_line(error)}") from error

    def write_json(self, data: Any) -> None:
        """Write data as JSON, if that was asked for."""
        if "json" in self:
            encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, indent=1)
            self.write("json", encoder.iterencode(plain(data)))

    def print(self, *parts: RenderableType) -> None:
        """Print tables."""
        console = self.console
        for part in parts:
            console.print(part)


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, before hours of work are lost.

    Raises:
        UsageError: It is a directory, in none, or not to be written.
    """
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: there is no directory {str(path.parent)!r}")
    if path.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: it is a directory")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {str(path)!r}: permission denied")


def is_folder(file: str) -> bool:
    """Whether a name is that of a folder: one that is there, or that ends in a slash."""
    return file.endswith(("/", os.sep)) or Path(file).is_dir()


def check_folder(path: Path) -> None:
    """Refuse a folder in which nothing can be written, or that cannot be made.

    Raises:
        UsageError: It is a file, in no directory, or not to be written in.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"cannot write into {str(path)!r}: it is no directory")
    check_writable(path / "table" if path.is_dir() else path)


def check_replaceable(path: Path) -> None:
    """Refuse to replace what is no file (a device, say) by a file of the same name.

    Raises:
        UsageError: It is there, and no regular file.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {str(path)!r}: it is there already, and no regular file")


def header(command: str, **asked: Any) -> dict[str, Any]:
    """The first entries of every file of numbers: the version, the command, and what was asked."""
    return {"tl_jets": version("tl-jets"), "command": command, **asked}


class Records(list[Any]):
    """Records of a file that are made one after another while they are written: memory never holds them all.

    To the encoder of JSON it is a list.

    Args:
        count: How many there are.
        make: Begins to make them.
    """

    def __init__(self, count: int, make: Callable[[], Iterator[Any]]):
        super().__init__()
        self.size, self.make = count, make

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        return map(plain, self.make())


def plain(value: Any) -> Any:
    """Plain lists, numbers and texts; what JSON has no number for (NaN, infinity) is None."""
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
