"""What the tests of the command share: models loaded once, the width of the terminal, a file of prompts."""

from __future__ import annotations

from typing import Any

import pytest
from commands import PROMPTS, share_models, tinydocs

import tl_jets as tj


@pytest.fixture(autouse=True)
def _models(monkeypatch: Any, request: Any) -> None:
    """Each model is loaded once for all tests; a module's COLUMNS is the width of its terminal."""
    share_models(monkeypatch)
    columns = getattr(request.module, "COLUMNS", None)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))


@pytest.fixture(scope="session")
def network():
    return tj.ResidualNetwork(tinydocs(), "sublayer")


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    """A file of `PROMPTS`, one a line."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return str(path)
