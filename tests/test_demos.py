"""The demos run, and print what the README says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import zoo

import tl_jets

ROOT = Path(__file__).parents[1]


def printed_by(demo: str, *arguments: str, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", [demo, *arguments])
    runpy.run_path(str(ROOT / "demos" / demo), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def test_the_readme_shows_the_paths_that_the_demo_prints(monkeypatch, capsys):
    printed = printed_by("top_paths.py", monkeypatch=monkeypatch, capsys=capsys)
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| ") and line.endswith(" > ln_final` |")]
    assert len(rows) == 20
    for row in rows:
        path = row.split("`")[1]
        found = next(line for line in printed if f" {path} " in line)
        assert numbers(found) == pytest.approx(numbers(row), abs=0.011), path
    verdicts = [row.split("|")[4].strip() for row in rows]
    assert "these 20: 8 confirmed, 6 partly, 6 refuted" in " ".join(printed)
    assert [verdicts.count(kind) for kind in ("confirmed", "partly", "refuted")] == [8, 6, 6]
    assert "20 random paths: 5 confirmed, 7 partly, 8 refuted" in " ".join(printed)


def test_what_predicts_ablation_is_a_table_of_correlations(monkeypatch, capsys):
    demo = runpy.run_path(str(ROOT / "demos" / "what_predicts_ablation.py"))
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    found = demo["correlations"](network, demo["DOCS"][:2], [step.label for step in network.steps])
    assert len(found) == 3 and all(len(cells) == 4 and len(cells[0]) == 2 for cells in found.values())
    assert all(bool((cell.abs() <= 1).all()) for cells in found.values() for cell in cells)
    paths, weights = (found[name][1].mean() for name in ("all detached paths", "jet weights"))
    assert paths > weights, "path sums predict the KL of these two prompts better than jet weights"


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_the_readme_table_is_what_the_demo_prints(monkeypatch, capsys):
    printed = printed_by("borrowed_answers.py", str(zoo.STORIES), monkeypatch=monkeypatch, capsys=capsys)
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| `\d_pre` \|", line)]
    assert len(rows) == 5
    for row in rows:
        cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        found = next(line for line in printed if cells[0] in line)
        assert numbers(found) == pytest.approx(numbers(row), abs=0.021), cells[0]


def test_the_detached_map(monkeypatch, capsys):
    """Its checks are in the demo itself."""
    monkeypatch.setattr(sys, "argv", ["detached_map.py"])
    runpy.run_path(str(ROOT / "demos" / "detached_map.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"{table}. " in printed for table in range(1, 6))
    error = next(line for line in printed.splitlines() if "error" in line and "occurred" in line)
    assert "raised" in error and float(re.findall(r"[+-]\d+\.\d+", error)[0]) > 6


def test_the_readme_shows_the_bigrams_that_the_library_finds():
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    tables = tl_jets.jet_bigrams_by_path(network, ["direct", "mlps"], top_k=20)
    tables |= tl_jets.jet_bigrams_by_path(network, top_k=20)
    found = tl_jets.side_by_side(tables, 20)
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| " + " | ".join(["rank", *found.columns]) + " |")
    shown = [re.findall(r"`` (.*?) ``", line) for line in lines[start + 2 : start + 22]]
    wanted = [[cell.replace("|", "\\|") for cell in row] for row in found.to_numpy().tolist()]
    same = sum(a == b for row, cells in zip(shown, wanted, strict=True) for a, b in zip(row, cells, strict=True))
    assert same >= 118, "120 cells; a near-tie may fall otherwise elsewhere"
