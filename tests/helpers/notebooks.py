"""Demo notebooks, read and executed."""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
MODEL_LINE = "model = tj.load_tinydocs()"


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_model(notebook: nbformat.NotebookNode, expression: str) -> nbformat.NotebookNode:
    """The notebook with another model in its one line."""
    for cell in code(notebook):
        cell.source = cell.source.replace(MODEL_LINE, f"model = {expression}")
    assert sum(f"model = {expression}" in cell.source for cell in code(notebook)) == 1
    return notebook


def run(notebook: nbformat.NotebookNode, monkeypatch) -> nbformat.NotebookNode:
    """A copy, executed by the running Python; an error in a cell is raised."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(
            [str(ROOT / "tests" / "package"), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
        ),
    )
    found = copy.deepcopy(notebook)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as sockets:
        warnings.simplefilter("ignore")  # of jupyter itself
        manager = AsyncKernelManager(kernel_name="python3")
        assert manager.kernel_spec is not None
        manager.kernel_spec.argv[0] = sys.executable  # another Python may have installed its own under this name
        if os.name == "posix":  # kernels that start side by side can be given the same ports
            manager.transport, manager.ip = "ipc", f"{sockets}/kernel"
        NotebookClient(found, km=manager, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute(
            cleanup_kc=True
        )
    return found
