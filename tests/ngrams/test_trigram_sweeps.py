"""Sweeps over heads and checkpoints that are saved as they go: interrupted, killed, divided, and resumed."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run, share_models

import tl_jets as tj
from tl_jets import studies
from tl_jets.ngrams import sweep, trigram_job
from tl_jets.ngrams.bigram_sweep import BigramSweep
from tl_jets.ngrams.tables import NgramTable
from tl_jets.ngrams.trigrams import TrigramSweep

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "pages" / "guides" / "ngrams.md"
FEW = (torch.arange(4096) < 300).double() / 300
OPTIONS = {"top_k": 30, "distance": 2, "rows": range(40, 400)}


@pytest.fixture(scope="module")
def network():
    return tj.ResidualNetwork(tj.load_tinydocs())


@pytest.fixture
def searched(monkeypatch):
    """The heads that are searched, in order."""
    heads: list[int] = []
    maps = TrigramSweep._maps

    def noted(self, head, *vectors):
        heads.append(head)
        return maps(self, head, *vectors)

    monkeypatch.setattr(TrigramSweep, "_maps", noted)
    return heads


def digests(tables):
    return {key: table.digest for key, table in tables.items()}


def names(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def test_every_head_is_saved_when_it_is_finished_and_never_searched_again(network, searched, tmp_path, monkeypatch):
    whole = digests(tj.jet_trigrams(network, 1, **OPTIONS))
    folder = tmp_path / "new" / "tables"
    searched.clear()
    table = TrigramSweep._table

    def stops(self, head, *best):
        if head == 2:
            raise InterruptedError
        return table(self, head, *best)

    with monkeypatch.context() as patch:
        patch.setattr(TrigramSweep, "_table", stops)
        with pytest.raises(InterruptedError):
            tj.jet_trigrams(network, 1, [3, 0, 2, 1], **OPTIONS, folder=folder)
    assert searched == [3, 0, 2] and names(folder) == ["L1H0.parquet", "L1H3.parquet"]
    (folder / ".L1H2.parquet.abc.tmp").write_bytes(b"half")
    searched.clear()
    resumed = tj.jet_trigrams(network, 1, [3, 0, 2, 1], **OPTIONS, folder=folder)
    assert searched == [2, 1] and list(resumed) == [3, 0, 2, 1] and digests(resumed) == whole
    assert names(folder) == [f"L1H{head}.parquet" for head in range(4)]
    searched.clear()
    assert digests(tj.jet_trigrams(network, 1, **OPTIONS, folder=folder)) == whole
    assert tj.jet_trigrams(network, 1, 2, **OPTIONS, folder=folder).digest == whole[2] and searched == []


def test_a_table_of_something_else_is_refused_and_kept(network, tmp_path):
    table = tj.jet_trigrams(network, 1, 3, **OPTIONS, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    assert NgramTable.load(file).digest == table.digest
    other = tj.load_tinydocs()
    next(other.parameters()).data[0, 0] += 1
    for model, options, message in (
        (network, OPTIONS | {"top_k": 31}, "top_k 30, not 31"),
        (network, OPTIONS | {"rows": None}, "not 'all'"),
        (other, OPTIONS, "fingerprint"),
    ):
        with pytest.raises(ValueError, match=message):
            tj.jet_trigrams(model, 1, [2, 3], **options, folder=tmp_path)
    shutil.copy(file, tmp_path / "L0H3.parquet")
    with pytest.raises(ValueError, match="path 'L1H3', not 'L0H3'"):
        tj.jet_trigrams(network, 0, 3, **OPTIONS, folder=tmp_path)
    assert NgramTable.load(file).digest == table.digest and len(names(tmp_path)) == 2


def test_jobs_of_heads_over_checkpoints(network, searched, tmp_path):
    later = tj.load_tinydocs()
    later.blocks[1].attn.W_O.data.mul_(1.5)

    def jobs(models):
        for step, model in models.items():
            for head in (0, 2):
                yield trigram_job(model, 1, head, **OPTIONS, name=f"{step} L1H{head}")

    models = {"1": network, "2": tj.ResidualNetwork(later)}
    first = sweep(jobs({"1": network}), tmp_path)
    assert searched == [0, 2]
    both = sweep(jobs(models), tmp_path)
    assert searched == [0, 2, 0, 2] and list(both) == ["1 L1H0", "1 L1H2", "2 L1H0", "2 L1H2"]
    assert digests(first).items() < digests(both).items()
    for name, table in both.items():
        alone = tj.jet_trigrams(models[name[0]], 1, int(name[-1]), **OPTIONS)
        assert alone.digest == table.digest and table.path == name[2:]
    assert trigram_job(network, 1, 3).name == "L1H3"
    assert trigram_job(network, 1, 3).settings["top_k"] == tj.jet_trigrams(network, 1, 3, rows=[7]).settings["top_k"]
    with pytest.raises(ValueError, match=r"head must be one of 0\.\.3"):
        trigram_job(network, 1, 4)


@pytest.mark.parametrize("unigram", [None, FEW], ids=["logprob", "joint"])
def test_tracking_goes_on_with_the_checkpoint_that_it_was_at(unigram, network, tmp_path, monkeypatch):
    later = tj.load_tinydocs()
    weight = later.blocks[1].mlp.W_out.data
    weight.copy_(weight.flip(0))
    models = {"step 1": network, "step 2": tj.ResidualNetwork(later)}
    options = {"paths": ["direct", "1_mlp"], "reference": "last", "n": 40, "unigram": unigram, "controls": 2}
    swept, run = [], BigramSweep.run

    def noted(self, labels, state):
        swept.extend(labels)
        return run(self, labels, state)

    def load(name):
        if name == dead:
            raise InterruptedError
        return models[name]

    monkeypatch.setattr(BigramSweep, "run", noted)
    dead = "step 2"
    with pytest.raises(InterruptedError):
        studies.track_by_path(load, list(models), **options, folder=tmp_path)
    assert names(tmp_path) == ["step 1"] and names(tmp_path / "step 1") == ["1_mlp.parquet", "direct.parquet"]
    dead, swept[:] = "", []
    found = studies.track_by_path(load, list(models), **options, folder=tmp_path)
    once = swept.count("direct")
    assert swept.count("1_mlp") >= once == 1  # rows that may have more are read again
    whole = studies.track_by_path(models, **options)
    for path, track in found.items():
        assert track.hit_ratio.equal(whole[path].hit_ratio) and (track.hit_ratio[0] < 1) == (path == "1_mlp")
        assert [table.digest for table in track.tables] == [table.digest for table in whole[path].tables]
    with pytest.raises(ValueError, match="names of files"):
        studies.track({"../a": network}, reference="last", n=5, folder=tmp_path)
    with pytest.raises(ValueError, match="give a reference"):
        studies.track(models, pairs=[(" more", " than")], folder=tmp_path)


VICTIM = """
import os, signal, sys, time
import torch
import tl_jets as tj
from tl_jets.ngrams.trigrams import TrigramSweep

torch.set_num_threads(1)
network = tj.ResidualNetwork(tj.load_tinydocs())
maps = TrigramSweep._maps
for line in sys.stdin:  # imports take longer than the sweep: every run is a fork, killed after a while
    folder, seconds = line.rsplit(" ", 1)
    child = os.fork()
    if child == 0:
        log = os.open(folder + ".log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

        def noted(self, head, *vectors):
            os.write(log, f"{head} ".encode())
            return maps(self, head, *vectors)

        TrigramSweep._maps = noted
        tj.jet_trigrams(network, 1, top_k=50, folder=folder, progress=False)
        os._exit(0)
    if float(seconds) > 0:
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_sweep_over_heads_killed_at_any_moment_resumes_to_the_same_tables(tmp_path):
    script, folder = tmp_path / "victim.py", tmp_path / "killed"
    script.write_text(VICTIM)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=pipe, stdout=pipe, env=environment, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(folder, seconds):
            """The exit code, and the heads that were begun although their tables were there."""
            done = {int(file.stem[-1]) for file in folder.glob("L1H?.parquet")}
            process.stdin.write(f"{folder} {seconds}\n")
            process.stdin.flush()
            code = int(process.stdout.readline())
            log = folder.with_suffix(".log")
            begun = [int(head) for head in log.read_text().split()] if log.exists() else []
            assert not done & set(begun) and len(begun) <= 4 - len(done)
            return code, len(begun)

        assert run(tmp_path / "whole", 0) == (0, 4)
        began = time.monotonic()
        assert run(tmp_path / "again", 0) == (0, 4)
        duration = time.monotonic() - began
        choose = random.Random(0)
        kills = heads = 0
        for _ in range(30):
            code, begun = run(folder, choose.uniform(0.1, 0.7) * duration)
            kills, heads = kills + (code == -signal.SIGKILL), heads + begun
            if kills == 6 or (code == 0 and kills >= 2):
                break
            if code == 0:  # done too soon: a loaded machine is slow by fits and starts
                shutil.rmtree(folder)
                kills, heads, duration = 0, 0, 0.7 * duration
        assert kills >= 2
        code, begun = run(folder, 0)
        assert code == 0 and heads + begun <= 4 + kills  # a kill loses one head at most
        process.stdin.close()
    assert names(folder) == names(tmp_path / "whole") == [f"L1H{head}.parquet" for head in range(4)]
    for name in names(folder):
        whole, resumed = (NgramTable.load(tmp_path / part / name) for part in ("whole", "killed"))
        assert whole.ids.tolist() == resumed.ids.tolist() and whole.digest == resumed.digest


def test_the_script_of_the_guide_goes_on_where_one_process_stopped(network, tmp_path):
    (script,) = re.findall(r"^```py\n# (\w+\.py)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    folder = tmp_path / "tables"
    torch.set_num_threads(1)
    alone = tj.jet_trigrams(network, 2, [1, 3], folder=folder)
    there = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    (tmp_path / script[0]).write_text(script[1].replace("range(4)", "[2]"))
    (command,) = re.findall(rf"^torchrun (.* {script[0]})$", GUIDE.read_text(), re.MULTILINE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", *command.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(launch, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert names(folder) == sorted(f"{path}.parquet" for i in range(4) for path in (f"{i}_mlp", f"L2H{i}"))
    assert {file: file.stat().st_mtime_ns for file in there} == there
    assert NgramTable.load(folder / "L2H3.parquet").digest == alone[3].digest
    table, divided = tj.jet_trigrams(network, 2, 0), NgramTable.load(folder / "L2H0.parquet")
    assert torch.equal(table.ids, divided.ids) and table.header == divided.header
    torch.testing.assert_close(table.scores, divided.scores, atol=1e-12, rtol=1e-12)


def test_the_command_keeps_a_folder_and_goes_on_from_it(network, searched, capsys, tmp_path, monkeypatch):
    share_models(monkeypatch)
    folder = tmp_path / "heads"
    options = ("ngrams", "--trigrams", "1", "--top-k", "5")
    run(capsys, *options, "--head", "2", "--save", f"{folder}/")
    assert names(folder) == ["L1H2.parquet"] and searched == [2]
    text = "".join(run(capsys, *options, "--save", str(folder)).split())
    assert searched == [2, 0, 1, 3] and all(f"L1H{head}.parquet" in text for head in range(4))
    for head, table in tj.jet_trigrams(network, 1, top_k=5).items():
        assert NgramTable.load(folder / f"L1H{head}.parquet").digest == table.digest
    run(capsys, "ngrams", "--path", "1_mlp > 3_mlp", "--save", str(folder))
    assert "1_mlp > 3_mlp.parquet" in names(folder) and len(names(folder)) == 5
    for more, message in (
        (("--top-k", "6", "--save", str(folder)), "top_k 5, not 6"),
        (("--save", f"{folder}/L1H2.parquet/"), "it is no directory"),
        (("--save", f"{tmp_path}/no/heads/"), "there is no directory"),
        (("--save", str(folder), "--json", f"{folder}/L1H0.parquet"), "may be the name of a table"),
    ):
        assert message in run(capsys, *options, *more, status=2)
