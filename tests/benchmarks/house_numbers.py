"""The numbers of docs/pages/architecture.md: `python tests/benchmarks/house_numbers.py`, from the root of a checkout.

Lines and files by room, long ones; public names; seconds of CPU time (the least of three runs) to import the package and to answer
`--help`; modules with a function that a lens, and the command `tl-jets lens`, call.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.getcwd())

import tl_jets as tj
from tl_jets.cli import main

PROMPT = "If the file does not exist, an error is"
TIMED = {
    "import torch": "import torch",
    "import torch, tl_jets": "import torch, tl_jets",
    "tl-jets --help": "from tl_jets.cli import main; main(['--help'])",
}


def seconds(code: str) -> float:
    """CPU time of a Python process that runs some code."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    return spent() - before


def crossed(call: Callable[[], Any]) -> int:
    """How many modules of the package have a function that a call runs, on its second time."""
    modules = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and frame.f_code.co_flags & 2 and name.startswith("tl_jets"):  # a function, no module body
            modules.add(name)

    with contextlib.redirect_stdout(io.StringIO()):
        call()
        sys.setprofile(note)
        call()
        sys.setprofile(None)
    return len(modules)


files = sorted(Path("tl_jets").rglob("*.py"))
lines = Counter()
for file in files:
    lines[file.parts[1] if len(file.parts) > 2 else "."] += len(file.read_text().splitlines())
print(
    f"{sum(lines.values()):,} lines in {len(files)} files: " + ", ".join(f"{k} {n:,}" for k, n in lines.most_common())
)
parsed = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
long = sum((node.end_lineno or 0) - node.lineno >= 60 for node in parsed)
print(f"files over 400 lines: {sum(len(f.read_text().splitlines()) > 400 for f in files)}; functions over 60: {long}")
print("public names:", len(tj.__all__))
for name, code in TIMED.items():
    print(f"{name}: {min(seconds(code) for _ in range(3)):.2f} s")
model = tj.load_tinydocs()
print("modules crossed by iterative_jet_lens:", crossed(lambda: tj.iterative_jet_lens(model, PROMPT)))
print("modules crossed by tl-jets lens:", crossed(lambda: main(["lens", "--prompt", PROMPT])))
