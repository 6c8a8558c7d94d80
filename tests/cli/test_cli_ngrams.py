"""`tl-jets ngrams`: what it prints, writes and saves is what the library's functions give."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import cells, numbers, run, tinydocs

import tl_jets as tj
from tl_jets.core.tokens import visible

COLUMNS = 80

PATHS = ["direct", "mlps", "0_mlp", "1_mlp", "2_mlp", "3_mlp"]


@pytest.fixture(scope="module")
def tables():
    return tj.ngrams.jet_bigrams_by_path(tinydocs(), PATHS, top_k=6)


def same(data, table):
    """Whether what was written is a table of the library, exactly."""
    assert (data["path"], data["fingerprint"], data["settings"]) == (table.path, table.fingerprint, table.settings)
    assert [row["ids"] for row in data["rows"]] == table.ids.tolist()
    assert [row["score"] for row in data["rows"]] == table.scores.tolist()
    for name, values in table.parts.items():
        assert [row[name] for row in data["rows"]] == values.tolist()
    assert [row["tokens"] for row in data["rows"]] == [
        [visible(table.names[t]) for t in ids] for ids in table.ids.tolist()
    ]


def test_without_options_all_paths_stand_side_by_side(capsys, tables):
    found = numbers(capsys, "ngrams", "--top-k", "6")
    assert list(found["tables"]) == PATHS
    for label, table in tables.items():
        same(found["tables"][label], table)
    text = run(capsys, "ngrams", "--top-k", "6")
    assert max(map(len, text.splitlines())) <= 80
    assert "the 6 best bi-grams of the whole vocabulary" in text
    frame = tj.ngrams.side_by_side(tables, 6)
    for label in PATHS:
        for cell in frame[label]:
            assert cell in text
    shown = [name for line in text.splitlines() if line.startswith("rank") for name in line.split()[1:]]
    assert shown == PATHS  # every path once, in as many tables as the width needs


def test_one_path_is_shown_with_its_scores(capsys):
    text = run(capsys, "ngrams", "--path", "1_mlp > 3_mlp", "--top-k", "4")
    table = tj.jet_bigrams(tinydocs(), ["1_mlp", "3_mlp"], top_k=4)
    for i, ids in enumerate(table.ids.tolist()):
        score = float(table.scores[i])
        row = cells(text, str(i), "1_mlp > 3_mlp")
        assert row[1:3] == [visible(table.names[token]) for token in ids]
        assert float(row[3]) == pytest.approx(score, rel=0.1, abs=0.006) and row[4] == f"{math.exp(score):.1%}"
    wide = run(capsys, "ngrams", "--path", "direct", "--path", "mlps", "--top-k", "2", "--scores")
    head = next(line for line in wide.splitlines() if line.startswith("rank"))
    assert head.split() == ["rank", "direct", "score", "mlps", "score"]


def test_the_row_of_a_token(capsys):
    (victor,) = tinydocs().tokenizer(" Victor", add_special_tokens=False)["input_ids"]
    found = numbers(
        capsys, "ngrams", "--token", "Victor", "--token", f"id:{victor - 1}", "--path", "mlps", "--top-k", "3"
    )
    table = tj.jet_bigrams(tinydocs(), "mlps", per="row", rows=[victor, victor - 1], top_k=3)
    same(found["tables"]["mlps"], table)
    text = run(capsys, "ngrams", "--token", "\u00b7Victor", "--path", "mlps", "--top-k", "3")
    assert "mlps after \u00b7Victor" in text
    assert cells(text, "0", "mlps after")[1:3] == ["\u00b7Victor", "\u00b7Stinner"]


def test_a_row_for_every_token(capsys):
    text = run(capsys, "ngrams", "--path", "direct", "--per", "row", "--score", "logit", "--top-k", "2")
    table = tj.jet_bigrams(tinydocs(), "direct", per="row", score="logit", top_k=2)
    assert f"{len(table) - 20:,} more: --json, --save" in text and "probability" not in text
    assert float(cells(text, "19", "direct")[3]) == pytest.approx(float(table.scores[19]), rel=0.01)


def test_skip_trigrams(capsys):
    options = ("ngrams", "--trigrams", "1", "--head", "0", "--head", "2", "--distance", "3", "--normalize", "pair")
    found = numbers(capsys, *options, "--top-k", "4")
    tables = tj.jet_trigrams(tinydocs(), 1, [0, 2], top_k=4, distance=3, normalize="pair")
    assert list(found["tables"]) == ["L1H0", "L1H2"] and found["ngram"] == "skip-trigram"
    for head, table in tables.items():
        same(found["tables"][f"L1H{head}"], table)
    text = run(capsys, *options, "--top-k", "4", "--explain")
    table = tables[2]
    row = cells(text, "0", "L1H2")
    assert row[1:4] == [visible(table.names[token]) for token in table.ids[0].tolist()]
    expected = [table.scores[0], table.parts["attention"][0], table.parts["log_prob"][0]]
    assert [float(x) for x in row[4:]] == pytest.approx([float(x) for x in expected], abs=0.006)
    assert "in a context of these two tokens" in text  # the legend is that of the option
    keys = numbers(capsys, "ngrams", "--trigrams", "0", "--head", "1", "--token", " the", "--top-k", "5")["tables"][
        "L0H1"
    ]
    (the,) = tinydocs().tokenizer(" the", add_special_tokens=False)["input_ids"]
    same(keys, tj.jet_trigrams(tinydocs(), 0, 1, top_k=5, rows=[the]))


def test_tables_are_saved(capsys, tmp_path, tables):
    file = tmp_path / "bigrams.parquet"
    text = run(capsys, "ngrams", "--top-k", "6", "--save", str(file))
    assert not file.exists()
    for label, table in tables.items():
        saved = tj.ngrams.NgramTable.load(tmp_path / f"bigrams.{label}.parquet")
        assert saved.digest == table.digest
    assert "bigrams.direct.parquet" in "".join(text.split())
    file.write_text("old")
    run(capsys, "ngrams", "--path", "1_mlp>3_mlp", "--top-k", "2", "--save", str(file))
    assert tj.ngrams.NgramTable.load(file).path == "1_mlp > 3_mlp"
    assert len(list(tmp_path.iterdir())) == 7  # nothing temporary is left


def test_of_the_processes_of_torchrun_the_first_saves(capsys, tmp_path):
    """They divide the rows, and every table is written once; the script says which process writes."""
    script = tmp_path / "logged.py"
    script.write_text(
        "import os, sys\n"
        "from tl_jets.cli import main\n"
        "from tl_jets.ngrams import bigram_sweep\n"
        "from tl_jets.ngrams.tables import NgramTable\n"
        "save, rank = NgramTable.save, os.environ['RANK']\n"
        "NgramTable.save = lambda table, file: (print('saved by', rank, file=sys.stderr), save(table, file))\n"
        "share = bigram_sweep.Processes.chunk_size\n"
        "bigram_sweep.Processes.chunk_size = lambda own, *given: (\n"
        "    print('divided by', own.size, file=sys.stderr), share(own, *given))[1]\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tj.__file__).parents[1])}
    command = ["ngrams", "--path", "direct", "--path", "mlps", "--top-k", "4", "--json", "-"]
    file = tmp_path / "bigrams.parquet"
    done = subprocess.run([*torchrun, *command, "--save", str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("saved by 0") == 2 and "saved by 1" not in done.stderr
    assert done.stderr.count("divided by 2") == 2
    alone = numbers(capsys, *command[:-2])["tables"]
    for label, found in json.loads(done.stdout)["tables"].items():
        assert [row["ids"] for row in found["rows"]] == [row["ids"] for row in alone[label]["rows"]]
        assert tj.ngrams.NgramTable.load(tmp_path / f"bigrams.{label}.parquet").ids.tolist() == [
            row["ids"] for row in found["rows"]
        ]


def test_a_key_without_a_triple_is_said_to_have_none(capsys):
    keys = ["id:300", "id:301"]
    tokens = [part for key in keys for part in ("--token", key)]
    text = run(capsys, "ngrams", "--trigrams", "0", "--head", "0", *tokens, "--top-k", "1")
    (best,) = tj.jet_trigrams(tinydocs(), 0, 0, top_k=1, rows=[300, 301]).ids[:, 0].tolist()
    assert f"none of these 1 tri-grams has id {601 - best} as token_1" in text and text.count("none of these") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--path", "1_attn"), "A path must be a function of one token"),
        (("--path", "3_mlp > 1_mlp"), "A path must pass its steps in the order of the network"),
        (("--path", "1_mlp >"), "got the step '' in '1_mlp >'"),
        (("--trigrams", "4"), "layer must be one of 0..3; got 4"),
        (("--trigrams", "0", "--head", "9"), "head must be one of 0..3"),
        (("--trigrams", "0", "--distance", "100000"), "distance"),
        (("--head", "1"), "--head is an option of skip-trigrams: give --trigrams LAYER"),
        (("--trigrams", "0", "--per", "row"), "--per is an option of bi-grams"),
        (("--token", "the", "--per", "global"), "--token shows rows of single tokens"),
        (("--token", "no such token"), "no single token reads"),
        (("--save", "-"), "--save writes Parquet to a file, not to standard output"),
        (("--save", "/nowhere/a.parquet"), "there is no directory '/nowhere'"),
    ],
)
def test_what_is_refused(capsys, options, message):
    assert message in run(capsys, "ngrams", *options, status=2)


def test_a_device_is_not_replaced_by_a_file(capsys, monkeypatch):
    def save(*arguments):
        raise AssertionError("a table was written")

    monkeypatch.setattr(tj.ngrams.NgramTable, "save", save)
    assert "no regular file" in run(capsys, "ngrams", "--path", "direct", "--save", "/dev/null", status=2)


def test_a_page_holds_the_same(capsys, tmp_path, tables):
    file = tmp_path / "ngrams.html"
    run(capsys, "ngrams", "--top-k", "6", "--html", str(file))
    page = file.read_text()
    for label, table in tables.items():
        assert f"{label}: {len(table)} n-grams" in page
    assert "\u00b7Stinner" in page and "src=" not in page and "href=" not in page
    run(capsys, "ngrams", "--trigrams", "1", "--head", "0", "--top-k", "5", "--html", str(file))
    assert "A(key | query)" in file.read_text()
