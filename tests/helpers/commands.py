"""Running `tl-jets` in the process of the tests, with each model loaded once for all of them."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import zoo

import tl_jets
from tl_jets import cli
from tl_jets.cli import session

PROMPTS = [
    "This function is available on Unix and",
    "If the file does not exist, an error is",
    "A list of",
    "The file is opened in",
    "Return a new",
    "This is a",
    "Raises an exception if the",
]
ANSWERS = [" Windows", "·raised", "id:317", " the", " list", " is", " file"]


@functools.cache
def tinydocs() -> Any:
    return tl_jets.load_tinydocs()


def share_models(monkeypatch: Any) -> None:
    """The commands' loaders give the same models again; `stories` is the name of stories260K."""
    load = session.load_model
    monkeypatch.setattr(session, "load_tinydocs", tinydocs)
    monkeypatch.setattr(
        session, "load_model", lambda name: zoo.load_stories("bridge") if name == "stories" else load(name)
    )


def run(capsys: Any, *arguments: str, status: int = 0) -> str:
    """What a command prints; nothing may stand on standard error, or one line if it fails."""
    assert cli.main(list(arguments)) == status
    captured = capsys.readouterr()
    if status:
        assert captured.out == ""
        assert captured.err.startswith("tl-jets: ") and captured.err.count("\n") == 1
        return captured.err
    assert captured.err == ""
    return captured.out


def numbers(capsys: Any, *arguments: str) -> Any:
    """What a command writes with `--json -`: JSON and nothing else."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads(run(capsys, *arguments, "--json", "-"), parse_constant=refuse)


def cells(text: str, label: str, section: str = "") -> list[str]:
    """The cells of the row of a table that holds a label, in the section of that title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(section))
    line = next(line for line in lines[start:] if label in re.split(r"\s{2,}", line.strip()))
    return re.split(r"\s{2,}", line.strip())
