"""Sweeps over two real processes (torchrun, gloo) against the same sweeps in one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import sharded
import torch

import tl_jets as tj
from tl_jets.core import processes
from tl_jets.core.processes import Processes
from tl_jets.ngrams.jobs import State
from tl_jets.ngrams.tables import NgramTable

TESTS = Path(__file__).parents[1]


@contextmanager
def launch(folder, what):
    """`sharded.py` in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS / 'helpers'}"}
    command += [str(TESTS / "helpers" / "sharded.py"), str(folder), what]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()  # torchrun ends its processes with it


@pytest.fixture(scope="module")
def one_thread():
    """As the processes have it: bits of a product depend on the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A sweep of two processes of which one was killed: the folder, and what torchrun said of it."""
    folder = tmp_path_factory.mktemp("killed")
    state = folder / "sweep" / "0_mlp.parquet.state"
    with launch(folder, "killed") as process:
        deadline = time.monotonic() + 300
        while rows_of(state) < 300:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        os.kill(int((folder / "pid.1").read_text()), signal.SIGKILL)
        process.communicate(timeout=300)  # gloo alone would wait for half an hour
        return folder, process.returncode


def rows_of(state):
    """How many rows a state is of; atomic replacement makes it whole at any moment."""
    return State(state, sharded.job(False).header).load()[0]


@pytest.fixture(scope="module")
def together(tmp_path_factory, interrupted):
    """What two processes gave: the folder of tables, and their reports. They go on from the killed sweep's state, too."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "resumed").mkdir()
    for file in (interrupted[0] / "sweep").glob("*.state"):
        shutil.copy(file, folder / "resumed")
    with launch(folder, "everything") as process:
        output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return folder, [json.loads((folder / f"report.{rank}").read_text()) for rank in (0, 1)]


def test_both_processes_return_the_tables_of_one(together, one_thread):
    folder, _ = together
    for name, table in (sharded.tables(False) | sharded.trigrams(False)).items():
        first, second = (NgramTable.load(folder / f"{name}.{rank}") for rank in (0, 1))
        assert first.digest == second.digest, name
        assert torch.equal(first.ids, table.ids), name
        assert first.header == table.header, name
        torch.testing.assert_close(first.scores, table.scores, atol=1e-12, rtol=1e-12)
        tolerance = 1e-6 if table.settings.get("per") == "row" else 1e-12  # sums in float32
        for part, values in table.parts.items():
            torch.testing.assert_close(first.parts[part], values, atol=tolerance, rtol=tolerance)


def test_log_normalizers(together, one_thread):
    _, reports = together
    exact = sharded.normalizers(False)
    for report in reports:
        torch.testing.assert_close(
            torch.tensor(report["normalizers"], dtype=torch.float64), exact, atol=1e-5, rtol=1e-6
        )


def test_both_processes_return_the_lens_of_one(together, one_thread):
    whole = sharded.lens(False)
    for rank in (0, 1):
        found = tj.load(together[0] / f"lens.{rank}")
        assert found.labels == whole.labels and torch.equal(found.tokens, whole.tokens)
        for name in ("top_ids", "target_ranks", "alpha", "full_values"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_processes_of_a_smaller_group_need_no_others(together, one_thread):
    _, reports = together
    assert reports[1]["group"] == tj.jet_bigrams(sharded.model(), top_k=5).digest


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("options", ["processes 0 and 1 have top_k 3 and 4"] * 2),
        ("model", ["processes 0 and 1 have model '"] * 2),
        ("rows", ["processes 0 and 1 have rows {'count': 2,"] * 2),
        ("a head", ["processes 0 and 1 have heads [0] and [1]"] * 2),
        (
            "a path on one",
            ["RuntimeError: Every process", "ValueError: A path must be a function of one token"],
        ),
        ("a row", ["this failed: 1 (ValueError: no stream at token 81)", "ValueError: no stream at token 81"]),
        ("prompts", ["processes 0 and 1 have prompts '"] * 2),
        ("options of a lens", ["have options \"{'top_k': 3}\" and \"{'top_k': 4}\""] * 2),
        ("a file on one", ["processes 0 and 1 have saves False and True"] * 2),
        ("a file", ["FileNotFoundError: ", "this failed: 0 (FileNotFoundError: "]),
    ],
)
def test_a_process_that_fails_ends_all_with_its_message(together, name, messages):
    _, reports = together
    for report, message in zip(reports, messages, strict=True):
        said, n_read = report["refusals"][name]
        assert message in said
        assert n_read < 400  # of its 550: nobody goes on


def test_a_killed_process_ends_the_others_and_any_number_goes_on(interrupted, together, one_thread, tmp_path):
    folder, code = interrupted
    assert code != 0
    left = [file.name for file in (folder / "sweep").iterdir()]
    assert [name for name in left if not name.endswith(".tmp")] == ["0_mlp.parquet.state"]  # it may have been writing
    whole = sharded.finish(tmp_path, False)["0_mlp"]
    assert [report["resumed"]["0_mlp"] for report in together[1]] == [whole.digest] * 2
    rows = rows_of(folder / "sweep" / "0_mlp.parquet.state")
    sharded.Slow.seen.clear()
    alone = sharded.finish(folder / "sweep", False)["0_mlp"]
    assert alone.digest == whole.digest
    assert sharded.Slow.seen - set(range(5)) == set(
        range(rows, 1100)
    )  # nothing again; the first five are the self-check
    assert [file.name for file in (folder / "sweep").iterdir()] == ["0_mlp.parquet"]


def test_nothing_is_divided_without_a_group(as_users_run_it):
    assert Processes.of(False).size == 1
    with pytest.raises(ValueError, match="init_process_group"):
        tj.jet_bigrams(sharded.model(), distributed=True)
    with pytest.raises(TypeError, match="process group that this process is in; got 3"):
        Processes.of(3)  # type: ignore[arg-type]


def test_chunks_are_as_many_for_every_process():
    for rows, size, largest in [(50257, 2, 1024), (50257, 8, 8192), (1100, 3, 1024), (61, 2, 1024), (1, 4, 8)]:
        chunk = Processes(0, size, None).chunk_size(rows, largest)
        assert 1 <= chunk <= largest
        most = max(len(range(rank * chunk, rows, size * chunk)) for rank in range(size))
        assert most * chunk <= rows / size + 16 * most
    assert Processes().chunk_size(50257, 1024) == 1024
    assert Processes(0, 2, None).pace(4, 0.5) == 4 * 2 * processes.PERIOD
    assert Processes().pace(1, 1e-6) == 1
