"""Output files, checked before anything is computed: a name of - is standard output, which then holds nothing else."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tl_jets.cli.arguments import UsageError, one_line

STDOUT = "-"
KINDS = ("html", "json", "svg", "save")


def output_files(options: argparse.Namespace) -> dict[str, str]:
    """The files of a command line by kind; UsageError if one cannot be written, or two are the same."""
    files = {kind: file for kind in KINDS if (file := getattr(options, kind, None)) is not None}
    for kind, file in files.items():
        if kind == "save":
            check_tables(file)
        elif file != STDOUT:
            check_writable(Path(file))
        elif sys.stdout is None:
            raise UsageError(f"--{kind} {STDOUT} writes to standard output, which is closed; give a file")
    places = [file if file == STDOUT else str(Path(file).resolve()) for file in files.values()]
    twice = [file for file, place in zip(files.values(), places, strict=True) if places.count(place) > 1]
    if twice:
        raise UsageError(f"each output needs a file of its own; got {twice[0]!r} more than once")
    return files


def write(file: str, parts: Iterable[str]) -> None:
    """Write a text in parts to a file, in UTF-8."""
    if file == STDOUT:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as in files, whatever the terminal's encoding
        sys.stdout.writelines(parts)
        sys.stdout.write("\n")
        return
    try:
        with Path(file).open("w", encoding="utf-8") as opened:
            opened.writelines(parts)
    except OSError as error:
        raise UsageError(f"cannot write {file!r}: {one_line(error)}") from error


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


def check_tables(file: str) -> None:
    """Raise UsageError if tables cannot be saved to a file, or into a folder."""
    path = Path(file)
    if file == STDOUT:
        raise UsageError("--save writes Parquet to a file, not to standard output; use --json - for that")
    if not is_folder(file):
        check_writable(path)
        check_replaceable(path)
    elif path.exists() and not path.is_dir():
        raise UsageError(f"cannot write into {str(path)!r}: it is no directory")
    else:
        check_writable(path / "table" if path.is_dir() else path)


def check_replaceable(path: Path) -> None:
    """Raise UsageError if the path exists and is not a regular file (a device, say)."""
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {str(path)!r}: it is there already, and no regular file")
