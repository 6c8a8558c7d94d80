"""`tl-jets paths --prompts FILE`: what stands there of many prompts is what the functions give of each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ANSWERS, PROMPTS, cells, numbers, run, tinydocs

import tl_jets as tj
from tl_jets.interventions.path_ablations import verdict

COLUMNS = 100

TOP = 5


def singles(network, answers=None):
    """Every prompt alone: its largest paths, their falls, sums, zero ablations and lengths."""
    found = []
    expansion = {"linearize": "detached", "top": TOP, "rank": "effect"}
    for i, prompt in enumerate(PROMPTS):
        targets = None if answers is None else answers[i]
        paths = tj.exponential_expansion(network, targets=targets, **expansion)(prompt, positions=-1)
        paths = paths.statistics(targets=targets)
        falls = tj.path_ablation(network, prompt, [p for p in paths.labels if p != "ln_final_bias"], targets=targets)
        options = {"positions": -1, "targets": targets}
        sums, lengths = tj.path_sums(network, prompt, **options), tj.path_lengths(network, prompt, **options)
        found.append((paths, falls, sums, tj.ablation_effect(network, prompt, targets=targets), lengths))
    return found


def test_every_prompt_is_as_alone(capsys, file, network):
    data = numbers(capsys, "paths", "--prompts", file, "--top", str(TOP), "--ablate")
    assert data["command"] == "paths" and data["prompts"] == file and len(data["by_prompt"]) == len(PROMPTS)
    known = singles(network)
    held, falls_of = [], []
    for record, prompt, (paths, falls, sums, _, _) in zip(data["by_prompt"], PROMPTS, known, strict=True):
        assert record["prompt"] == prompt and record["target"]["id"] == int(sums.target_ids)
        assert [path["path"] for path in record["paths"]] == paths.labels
        assert [path["effect"] for path in record["paths"]] == pytest.approx(paths.effect.flatten().tolist(), rel=1e-6)
        own = dict(zip(falls.labels, (-falls.centered).flatten().tolist(), strict=True))
        assert {p["path"]: p["path_ablation"] for p in record["paths"] if "verdict" in p} == pytest.approx(
            own, rel=1e-5
        )
        logits = tinydocs()(prompt)[0, -1].detach().double()
        held.append(float(paths.effect.sum() / (logits[int(sums.target_ids)] - logits.mean())))
        falls_of.append(
            [(float(e), own[p]) for p, e in zip(paths.labels, paths.effect.flatten(), strict=True) if p in own]
        )
    assert data["overall"]["held"]["median"] == pytest.approx(statistics.median(held), rel=1e-5)
    confirmed = [[verdict(*pair) == "confirmed" for pair in pairs] for pairs in falls_of]
    shown = data["overall"]["ablation"]["shown"]
    assert shown["confirmed"] == pytest.approx(sum(map(sum, confirmed)) / sum(map(len, confirmed)))
    # By chance: every effect with every fall of its prompt.
    chance = [sum(verdict(e, f) == "confirmed" for e, _ in pairs for _, f in pairs) / len(pairs) for pairs in falls_of]
    assert shown["by_chance"] == pytest.approx(sum(chance) / shown["n"])
    assert data["overall"]["ablation"]["random"]["n"] > 0


def test_paths_are_counted_over_prompts(capsys, file, network):
    data = numbers(capsys, "paths", "--prompts", file, "--top", str(TOP), "--no-components")
    assert data["components"] is None
    effects = {}
    for paths, *_ in singles(network):
        for label, effect in zip(paths.labels, paths.effect.flatten().tolist(), strict=True):
            effects.setdefault(label, []).append(effect)
    assert {row["path"]: row["prompts"] for row in data["paths"]} == {path: len(own) for path, own in effects.items()}
    counts = [row["prompts"] for row in data["paths"]]
    assert counts == sorted(counts, reverse=True) and counts[0] > 1
    for row in data["paths"]:
        own = effects[row["path"]]
        assert row["effect"] == pytest.approx(statistics.mean(own), rel=1e-6)
        assert row["effect_median"] == pytest.approx(statistics.median(own), rel=1e-6)
        assert row["raises"] == sum(effect > 0 for effect in own) / len(own)


def test_sums_are_over_the_answers_of_the_file(capsys, tmp_path, network):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in zip(PROMPTS, ANSWERS, strict=True)))
    data = numbers(capsys, "paths", "--prompts", str(path), "--top", str(TOP))
    ids = [record["target"]["id"] for record in data["by_prompt"]]
    assert ids[2] == 317 and data["by_prompt"][0]["target"]["token"] == "·Windows"
    known = singles(network, ids)
    rows = {row["component"]: row for row in data["components"]}
    assert set(rows) == set(known[0][2].labels)
    for label, row in rows.items():
        effects = [float(sums.effect[sums.labels.index(label), 0, 0]) for _, _, sums, _, _ in known]
        falls = [-float(zeroed.centered[zeroed.labels.index(label), 0, 0, 0]) for *_, zeroed, _ in known]
        assert row["effect"] == pytest.approx(statistics.mean(effects), rel=1e-4, abs=1e-6)
        assert row["effect_median"] == pytest.approx(statistics.median(effects), rel=1e-4, abs=1e-6)
        assert row["zero_ablation"] == pytest.approx(statistics.mean(falls), rel=1e-4, abs=1e-5)
        assert row["effect_low"] < row["effect"] < row["effect_high"]
    index = statistics.median(float(lengths.cancellation) for *_, lengths in known)
    assert data["cancellation_by_length"]["median"] == pytest.approx(index, rel=1e-4)


def test_what_is_shown_fits_a_screen(capsys, file, tmp_path):
    page = tmp_path / "paths.html"
    asked = ("paths", "--prompts", file, "--top", str(TOP), "--ablate")
    text, _ = run(capsys, *asked), run(capsys, *asked, "--html", str(page))
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 100
    data = numbers(capsys, *asked)
    assert text.startswith(f"The 5 largest paths hold {data['overall']['held']['median']:.0%}")
    assert "with falls shuffled" in text and "random paths, " in text
    first = data["paths"][0]
    row = cells(text, first["path"], "Paths that most prompts have")
    assert row[0] == f"{first['prompts'] / 7:.0%}" and row[-1] == first["path"]
    assert all(title in page.read_text() and title not in text for title in ("Every prompt", "How to read this"))
    assert run(capsys, "paths", "--prompts", file, "--linearize", "jet", "--order", "0").count("order-0 jet paths") == 1


def test_refusals(capsys, file, tmp_path):
    for arguments, said in (
        (["--prompt", "x"], "--prompt is of a single prompt"),
        (["--target", " is"], "--target is of a single prompt"),
        (["--position", "4"], "line 3 of"),
    ):
        assert said in run(capsys, "paths", "--prompts", file, *arguments, status=2)


@pytest.mark.parametrize(
    "command", [("paths", "--top", "3", "--ablate"), ("lens", "--order", "0")], ids=["paths", "lens"]
)
def test_processes_of_torchrun_divide_the_prompts(capsys, file, command):
    """Two processes on the loopback device: the first prints what one process prints."""
    arguments = [*command, "--prompts", file]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tl_jets"]
    root = str(Path(tj.__file__).parents[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([*torchrun, *arguments, "--json", "-"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, alone = json.loads(done.stdout), numbers(capsys, *arguments)
    assert close(found, alone)


def close(found, wanted):
    """Equal, numbers up to rounding."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(close(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return found == (pytest.approx(wanted, rel=1e-4, abs=1e-5) if isinstance(wanted, float) else wanted)
