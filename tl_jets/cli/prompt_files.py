"""Files of prompts: one a line, or JSON lines with a prompt and, in all of them or in none, its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tl_jets.cli.arguments import UsageError, one_line

JSON_LINES = ".jsonl"
KEYS = {"prompt", "answer"}


def read_prompts(file: str) -> tuple[list[str], list[str] | None]:
    """The prompts of a file, and their answers if it gives them; UsageError names the line that is wrong.

    A name that ends in `.jsonl` holds JSON lines, `{"prompt": ..., "answer": ...}`; others one prompt a line.
    """
    try:
        lines = Path(file).read_text("utf-8").split("\n")
    except OSError as error:
        raise UsageError(f"cannot read {file!r}: {one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file!r} must be UTF-8; it is not at byte {error.start}") from error
    lines = lines[:-1] if not lines[-1] else lines
    if not lines:
        raise UsageError(f"{file!r} must hold at least one prompt; it is empty")
    is_json = file.endswith(JSON_LINES)
    read = [_record(file, number, line) if is_json else {"prompt": line} for number, line in enumerate(lines, 1)]
    for number, record in enumerate(read, 1):
        if not record["prompt"].strip():
            raise UsageError(f"{file!r} must hold a prompt in every line; line {number} has none")
    given = ["answer" in record for record in read]
    if any(given) and not all(given):
        raise UsageError(
            f"{file!r} must give the answer of every prompt or of none; line {given.index(False) + 1} has none"
        )
    return [record["prompt"] for record in read], [record["answer"] for record in read] if all(given) else None


def _record(file: str, number: int, line: str) -> dict[str, Any]:
    """The object of a JSON line."""
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"prompt"} <= set(record) <= KEYS:
        raise UsageError(
            f'{file!r} must hold {{"prompt": ...}} or {{"prompt": ..., "answer": ...}} in every line; line {number} is '
            f"{line[:60]!r}"
        )
    for key, value in record.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{file!r} must hold text; {key} of line {number} is {value!r}")
    return record
