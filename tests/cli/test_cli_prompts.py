"""`tl-jets lens --prompts FILE`: the numbers are those of the functions; lines that are wrong are named."""

from __future__ import annotations

import json
from statistics import median

import pytest
import torch
from commands import ANSWERS, PROMPTS, cells, numbers, run, tinydocs

import tl_jets as tj

COLUMNS = 100


@pytest.fixture
def answered(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    path.write_text("\n".join(lines))
    return str(path)


def test_numbers_are_those_of_every_prompt(capsys, file):
    data = numbers(capsys, "lens", "--prompts", file, "--order", "0")
    assert data["command"] == "lens" and data["prompts"] == file
    net = tj.ResidualNetwork(tinydocs())
    single = [tj.iterative_jet_lens(net, prompt, order=0, positions=-1) for prompt in PROMPTS]
    for i, (found, one) in enumerate(zip(data["by_prompt"], single, strict=True)):
        answer = int(one.model_top_ids)
        assert found["prompt"] == PROMPTS[i] and found["answer"]["id"] == found["model_says"]["id"] == answer
        assert found["leads_from"] == {"0": one.labels[int(one.first_leads())]}
    ranks = [
        tj.iterative_jet_lens(net, p, order=0, positions=-1, targets=int(one.model_top_ids)).target_ranks.flatten()
        for p, one in zip(PROMPTS, single, strict=True)
    ]
    rows = [row for row in data["trajectories"] if row["target"] == "<answer>"]
    assert [row["rank_median"] for row in rows] == torch.stack(ranks).median(0).values.tolist()
    effects = [tj.joint_jet_lens(net, p, linearize="detached", positions=-1).effects.flatten() for p in PROMPTS]
    means = torch.stack(effects).mean(0).tolist()
    assert [row["effect"] for row in data["components"]] == pytest.approx(means, abs=1e-5)


def test_answers_of_the_file_and_what_is_shown(capsys, answered):
    data = numbers(capsys, "lens", "--prompts", answered, "--position", "-1")
    net = tj.ResidualNetwork(tinydocs())
    ids = [found["answer"]["id"] for found in data["by_prompt"]]
    assert ids[2] == 317 and [found["answer"]["token"] for found in data["by_prompt"]][:2] == ["·Windows", "·raised"]
    lens = tj.answer_lens(net, PROMPTS, ids, order=1)
    table = lens.trajectories()
    assert [row["rank_median"] for row in data["trajectories"]] == table.rank_median.tolist()
    text = run(capsys, "lens", "--prompts", answered)
    assert text.startswith("Order 1 says nothing") and "answers  of the file" in text
    nowhere = [row["leads_from"]["0"] for row in data["by_prompt"]].count(None)
    assert f"In {nowhere} of 7 prompts the answer leads nowhere" in " ".join(text.split())
    row = cells(text, "1_pre", "The answer's rank by layer")
    own, other = (
        table.query(f"layer == '1_pre' and order == 0 and target == '{t}'").iloc[0] for t in lens.target_names
    )
    assert row[1:4] == [
        f"{own.rank_median:,.0f} ({other.rank_median:,.0f})",
        f"{own.rank_low:,.0f}..{own.rank_high:,.0f}",
        f"{own.leads:.0%}",
    ]
    assert len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) <= 100
    whole = run(capsys, "lens", "--prompts", answered, "--all")
    assert "Every prompt" in whole and "How to read this" in whole and "Every prompt" not in text


def test_files_are_written(capsys, file, tmp_path):
    page, picture = tmp_path / "lens.html", tmp_path / "lens.svg"
    run(capsys, "lens", "--prompts", file, "--order", "0", "--html", str(page), "--svg", str(picture))
    assert "Every prompt" in page.read_text() and "rank by layer" in picture.read_text().replace("&#160;", " ")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "", "must hold at least one prompt; it is empty"),
        ("p.txt", "one\n\ntwo\n", "must hold a prompt in every line; line 2 has none"),
        ("p.txt", "one\n \t", "line 2 has none"),
        ("p.jsonl", '{"prompt": "a"}\nb\n', "line 2 is 'b'"),
        ("p.jsonl", '{"prompt": "a"}\n\n', "line 2 is ''"),
        ("p.jsonl", '{"prompt": "a", "target": "b"}', "line 1 is "),
        ("p.jsonl", '["a"]', "line 1 is "),
        ("p.jsonl", '{"prompt": 3}', "prompt of line 1 is 3"),
        ("p.jsonl", '{"prompt": "a", "answer": ""}', "answer of line 1 is ''"),
        (
            "p.jsonl",
            '{"prompt": "a", "answer": " the"}\n{"prompt": "b"}',
            "of every prompt or of none; line 2 has none",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "answer": " the"}\n{"prompt": "b", "answer": "two of them"}',
            "the answer of line 2 of",
        ),
        ("p.jsonl", '{"prompt": "a", "answer": " the"}\n{"prompt": "b", "answer": " the"}', "all 2 are"),
    ],
)
def test_wrong_lines_are_named(capsys, tmp_path, name, content, said):
    path = tmp_path / name
    path.write_text(content)
    assert said in run(capsys, "lens", "--prompts", str(path), status=2)


def test_other_refusals(capsys, file, tmp_path):
    path = tmp_path / "bytes.txt"
    path.write_bytes(b"one\n\xff\n")
    for arguments, said in (
        (["--prompts", str(path)], "must be UTF-8; it is not at byte 4"),
        (["--prompts", str(tmp_path / "none")], "cannot read"),
        (["--prompts", file, "--prompt", "x"], "--prompt is of a single prompt"),
        (["--prompts", file, "--target", " is"], "--target is of a single prompt"),
        (["--prompts", file, "--position", "4"], "line 3 of"),
    ):
        assert said in run(capsys, "lens", *arguments, status=2)


def test_lines_may_end_in_two_characters(capsys, tmp_path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\r\n".join(PROMPTS).encode())
    data = numbers(capsys, "lens", "--prompts", str(path), "--order", "0")
    assert [found["prompt"] for found in data["by_prompt"]] == PROMPTS
    assert median(row["rank_median"] for row in data["trajectories"]) >= 0
