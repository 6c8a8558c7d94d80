"""The command line where its surroundings are odd: prompts that look like templates, terminals that do not know their width or
their encoding, closed streams, names that meet."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest

import tl_jets
from tl_jets import cli

TEMPLATE = "{{ data }} is {{ title }}"


def process(*arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The real process; `redirect` as a shell reads it."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "tl_jets", *arguments]
    return subprocess.run(command, capture_output=True, timeout=300, env={**os.environ, **environment})


def test_a_prompt_is_no_template(capsys, tmp_path):
    files = {kind: tmp_path / f"lens.{kind}" for kind in ("html", "json")}
    asked = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    commands.run(capsys, "lens", "--prompt", TEMPLATE, *asked)
    page, data = files["html"].read_text(encoding="utf-8"), json.loads(files["json"].read_text(encoding="utf-8"))
    (title,) = re.findall("<title>(.*?)</title>", page, re.DOTALL)
    (shown,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert html.unescape(title) == f"tl-jets lens: {TEMPLATE}"
    own = json.loads(shown)
    assert own == {key: data[key] for key in own} and {*data} - {*own} == {"command"} and data["prompt"] == TEMPLATE


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_standard_output_is_utf_8_where_it_is_a_file(capsys, monkeypatch, encoding):
    outputs = {}
    for kind in ("json", "html", "svg"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["lens", "--prompt", "The file", f"--{kind}", "-"]) == 0
        outputs[kind] = stream.buffer.getvalue().decode("utf-8")
    data = json.loads(outputs["json"])
    assert data["tokens"][0][-1] == "·file" and "·file" in outputs["svg"]
    assert "\\xb7" not in "".join(outputs.values())


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 40), ("40", 40), ("100", 100)])
@pytest.mark.parametrize("command", [["lens"], ["jacobian", "--svd", "0"]], ids=" ".join)
def test_tables_have_a_width(capsys, monkeypatch, command, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    lines = commands.run(capsys, *command, "--prompt", "The file is").splitlines()
    assert len(lines) > 15 and 0.7 * width < max(map(len, lines)) <= width


def test_a_closed_standard_output_is_no_error(tmp_path):
    file = tmp_path / "lens.json"
    done = process("lens", "--json", str(file), redirect=">&-")
    assert (done.returncode, done.stderr) == (0, b"") and json.loads(file.read_text(encoding="utf-8"))["model"]


def test_standard_output_that_is_closed_holds_no_file(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "__stdout__", None)
    assert cli.main(["lens", "--json", "-"]) == 2
    monkeypatch.setattr("tl_jets.cli.lens.iterative_jet_lens", lambda *given, **options: 1 / 0)
    assert cli.main(["lens"]) == 1
    refused, unexpected = capsys.readouterr().err.splitlines()
    assert refused == "tl-jets: --json - writes to standard output, which is closed; give a file"
    assert unexpected.startswith("tl-jets: unexpected ZeroDivisionError: division by zero")


@pytest.mark.parametrize("command", ["lens", "paths", "jacobian"])
@pytest.mark.parametrize(
    ("seed", "message"),
    [("-1", "must be a whole number, 0 or more; got '-1'"), (str(2**64), "must be 18,446,744,073,709,551,615 or less")],
)
def test_seeds_are_read_alike(capsys, command, seed, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, f"--seed={seed}"])
    assert exit_.value.code == 2 and f"argument --seed: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["lens"], ["paths", "--ablate", "--top", "2"], ["jacobian", "--svd", "1"]])
def test_every_seed_that_is_read_is_drawn_from(capsys, command):
    commands.run(capsys, *command, "--seed", str(2**64 - 1))


@pytest.mark.parametrize("end", ["", ".parquet", ".json"])
def test_no_file_takes_the_name_of_a_table(capsys, monkeypatch, tmp_path, end):
    monkeypatch.chdir(tmp_path)
    suffix, paths = end or ".parquet", ("--path", "direct", "--path", "1_mlp > 3_mlp", "--top-k", "2")
    asked = ("ngrams", *paths, "--save", f"z{end}")
    for file in (f"z.1_mlp-3_mlp{suffix}", f"{tmp_path}/z.direct{suffix}"):
        error = commands.run(capsys, *asked, "--json", file, status=2)
        assert f"--json {file!r} may be the name of a table: several are saved as z.PATH{suffix}" in error
    assert not list(tmp_path.iterdir())
    commands.run(capsys, *asked, "--json", "y.json", "--html", f"y.direct{suffix}")
    saved = {f"z.{path}{suffix}" for path in ("direct", "1_mlp-3_mlp")}
    assert {file.name for file in tmp_path.iterdir()} == {"y.json", f"y.direct{suffix}", *saved}
    assert {tl_jets.ngrams.NgramTable.load(tmp_path / name).path for name in saved} == {"direct", "1_mlp > 3_mlp"}


@pytest.mark.parametrize("start", [("-m", "tl_jets"), ("tl-jets",)], ids=" ".join)
@pytest.mark.parametrize("is_ignored", [False, True], ids=["", "ignored"])
def test_an_interrupt_during_imports_is_one_line(tmp_path, start, is_ignored):
    """The first library that is imported interrupts the process; it stands before the real one on the path."""
    interrupts = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\nraise SystemExit(7)\n"
    for name in ("torch", "jaxtyping", "numpy", "transformer_lens"):
        (tmp_path / f"{name}.py").write_text(interrupts)
    script = tmp_path / "tl-jets"
    script.write_text("import sys\nfrom tl_jets.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *(str(script) if part == "tl-jets" else part for part in start), "lens"]
    # A suite that a shell has put in the background ignores interrupts, and so would its children.
    handler = "SIG_IGN" if is_ignored else "SIG_DFL"
    start_with = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{handler}); os.execv(sys.argv[1], sys.argv[1:])"
    )
    trap = [sys.executable, "-S", "-E", "-c", start_with]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    done = subprocess.run([*trap, *command], capture_output=True, timeout=60, env=environment, cwd=root)
    expected = (7, b"") if is_ignored else (130, b"tl-jets: interrupted\n")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize(
    "options", [("lens", "--order"), ("lens", "--joint-order"), ("paths", "--order")], ids=" ".join
)
def test_an_order_has_a_limit(capsys, options):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*options, "1000000"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1
    assert f"argument {options[1]}: must be 1,000 or less; got '1000000'" in error
    with pytest.raises(ValueError, match="order must be at most 1000; got 1000000"):
        tl_jets.iterative_jet_lens(commands.tinydocs(), "The file", order=10**6)


@pytest.mark.parametrize("option", [["--order"], ["--all", "--joint-order"]], ids=["iterative", "joint"])
def test_an_order_at_which_the_series_overflows_is_refused(capsys, option):
    lens = ["lens", "--prompt", "The file", *option]
    error = commands.run(capsys, *lens, "500", status=2)
    most = int(re.search(r"order must be at most (\d+) for this input: at order \d+ the series overflows", error)[1])
    commands.run(capsys, *lens, str(most))
    error = commands.run(capsys, *lens, str(most + 1), status=2)
    assert f"at most {most} for this input" in error and "center_scale='match'" in error
