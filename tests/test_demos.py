"""The demos run, and print what the README says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import zoo

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_the_readme_table_is_what_the_demo_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["borrowed_answers.py", str(zoo.STORIES)])
    runpy.run_path(str(ROOT / "demos" / "borrowed_answers.py"), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == 5
    for row in rows:
        cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        found = next(line for line in printed.splitlines() if cells[0] in line)
        numbers = [[float(number) for number in re.findall(r"\d+\.\d+", text)] for text in (found, row)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.021), cells[0]
