"""Atomic file writes: a reader sees the old file or the complete new one, never a part."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(file: str | Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write to a temporary file beside `file`, sync it to disk, and rename it to `file`. Returns the path.

    If the process is killed, the old file stays, possibly with a hidden `.<name>.*.tmp` (see `remove_leftovers`).
    """
    file = Path(file)
    handle, temporary = _temporary(file)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp lets only the owner read
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename must reach the disk, too
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return file


def check_writable(file: str | Path) -> None:
    """Raise OSError unless `write_atomically` can write a file, by creating a temporary file beside it."""
    file = Path(file)
    if os.path.exists(file) and not os.path.isfile(file):  # Path methods raise if the name is too long
        raise OSError(
            f"A result is saved as a regular file; {str(file)!r} exists and is no regular file. Save elsewhere."
        )
    try:
        handle, temporary = _temporary(file)
    except OSError as error:
        raise type(error)(
            f"A result must be saved in a writable folder; {str(file)!r} cannot be written ({error.strerror}). Make "
            "the directory, or save elsewhere."
        ) from error
    os.close(handle)
    temporary.unlink()


def remove_leftovers(file: str | Path) -> None:
    """Remove temporary files left by processes that were killed while writing a file."""
    file = Path(file)
    for leftover in file.parent.glob(f".{glob.escape(file.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)


def _temporary(file: Path) -> tuple[int, Path]:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    return handle, Path(name)
