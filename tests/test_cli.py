"""The command line: what it prints for a real model, and one line on standard error for everything it refuses."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

import tl_jets
import tl_jets.cli as cli
from tl_jets import ResidualNetwork, iterative_jet_lens, joint_jet_lens
from tl_jets.tokens import token_text, visible
from tl_jets.views import lens_data, lens_page

ROOT = Path(__file__).parents[1]
PROMPT = "Once upon a time, there was a little girl named Lily. She"

pytestmark = pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")


@pytest.fixture
def stories(monkeypatch):
    """The command's loader, with the model loaded once for all tests."""
    load = cli.load_model
    monkeypatch.setattr(cli, "load_model", lambda name: zoo.load_stories("bridge") if name == "stories" else load(name))
    return zoo.load_stories("bridge")


def run(capsys, monkeypatch, *options: str, columns: int = 120) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["lens", "--model", "stories", "--prompt", PROMPT, *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def row(lines: list[str], label: str, section: str) -> tuple[str, str]:
    """The row of a label, and the line below it, in a table found by its title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(section))
    index = next(i for i in range(start, len(lines)) if lines[i].split()[:1] == [label])
    return lines[index], lines[index + 1]


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


@pytest.mark.parametrize("columns", [80, 120])
def test_lens_prints_what_the_lenses_say(capsys, monkeypatch, stories, columns):
    lines = run(capsys, monkeypatch, "--order", "2", columns=columns)
    assert max(map(len, lines)) <= columns
    net = ResidualNetwork(stories, "block")
    trace = net.trace(PROMPT)
    lens, joint = iterative_jet_lens(net, trace, order=2, top_k=3), joint_jet_lens(net, trace, top_k=3)
    text = lambda token: visible(token_text(stories.tokenizer, int(token)))  # noqa: E731
    assert any(line.startswith(f"answer  {text(lens.model_top_ids[0, -1])},") for line in lines)
    for i, label in enumerate(lens.labels):
        answers, scores = row(lines, label, "Iterative jet lens")
        assert scores.split()[0] == number(float(lens.rho[i, 0, -1]))
        found = re.split(r"\s{2,}", answers.strip())[1:]
        for k in range(3):
            first, *others = (text(token) for token in lens.top_ids[i, k, 0, -1])
            first = f"[{first}]" if lens.borrowed[i, k, 0, -1] else first
            assert found[k].split(" ") == [first, *others]
            kl, control = lens.kl[i, k, 0, -1], lens.control.kl[i, k, 0, -1]
            if min(kl, control) > 0.006:
                assert f"{number(float(kl))} ({number(float(control))})" in scores
        own = " -own" if lens.alpha[i, 1, 0, -1] < 0 else ""
        assert f"{float(lens.borrowed_share[i, 1, 0, -1]):.0%}{own}" in scores
        assert scores.count("-own") == int((lens.alpha[i, 1:, 0, -1] < 0).sum())
    for i, label in enumerate(joint.labels):
        cells = row(lines, label, "Joint jet lens")[0].split()
        assert cells[1] == f"{float(joint.weights[i, 0, -1]):.3f}"
        assert cells[-1] == text(joint.center_top_tokens(3).indices[i, 0, -1, -1])
    total, scores = row(lines, "sum", "Joint jet lens")
    assert text(joint.top_ids[0, -1, 0]) in total
    assert f"KL {number(float(joint.kl[0, -1]))} ({number(float(joint.control.kl[0, -1]))})" in scores
    averages = row(lines, "joint", "Averages")[0]
    mean, control = joint.measures.mean(), joint.control.mean()
    for name in ("remainder_norm", "cosine", "centered_cosine", "kl"):
        assert f"{number(float(mean[name]))} ({number(float(control[name]))})" in averages
    assert f"{100 * float(mean['top1_agreement']):.0f} ({100 * float(control['top1_agreement']):.0f})" in averages
    for entry in ("order k", "[token]", "borrowed", "KL (control)", "rho", "joint", "remainder"):
        assert any(line.startswith(entry) for line in lines), entry


def test_options(capsys, monkeypatch, stories):
    options = ("--granularity", "head", "--order", "0", "--position", "3", "--center-scale", "match", "--top-k", "1")
    lines = run(capsys, monkeypatch, *options, "--joint-order", "1", "--objective", "l2")
    assert any("position 3" in line for line in lines)
    assert any("center_scale=match" in line for line in lines)
    assert any(line.startswith("Joint jet lens, order 1") and "(l2, gap" in line for line in lines)
    hidden = next(line for line in lines if re.match(r"\d+ others", line))
    shown = [line for line in lines if re.match(r"(L\dH\d|\d_mlp|\d_attn_bias|embed)", line)]
    labels = ResidualNetwork(stories, "head").components
    assert int(hidden.split()[0]) + len(shown) == len(labels) == 51  # one embedding, 5 x (8 heads, bias, MLP)
    # The logit lens borrows nothing: the legend explains no bracket.
    assert not any(line.startswith("[token]") for line in lines)


def test_orders_that_the_terminal_has_no_room_for_are_named(capsys, monkeypatch, stories):
    lines = run(capsys, monkeypatch, "--order", "7", columns=80)
    assert any("orders 3 to 7 need a wider terminal, --html or --json" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_options_without_a_command_are_those_of_lens(capsys, stories):
    assert cli.main(["--model", "stories", "--prompt", PROMPT, "--top-k", "1"]) == 0
    assert "Iterative jet lens" in capsys.readouterr().out


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out.startswith(f"tl-jets {tl_jets.__version__}")


REFUSED = [
    (["--model", "/nowhere"], r"a local model must be a directory with a config.json; got '/nowhere'"),
    (["--model", "no/such/model"], "a local model must be a directory"),
    (["--model", "no-such-model"], "cannot load model 'no-such-model': it is no local directory, and the hub"),
    (["--prompt", ""], "the prompt must not be empty"),
    (["--prompt", "a dog " * 600], "must fit the context of 512 tokens"),
    (["--order", "-1"], "an order must be 0 or more; got -1"),
    (["--joint-order", "-2"], "an order must be 0 or more; got -2"),
    (["--position", "99"], r"--position must lie in -\d+\.\.\d+ for this prompt; got 99"),
    (["--top-k", "0"], "--top-k must be 1 or more; got 0"),
    (["--top-k", "513"], "between 1 and d_vocab = 512, got 513"),
    (["--html", "/nowhere/page.html"], "cannot write '/nowhere/page.html': there is no directory '/nowhere'"),
    (["--json", "/"], "cannot write '/': it is a directory"),
]


@pytest.mark.usefixtures("stories")
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_input_is_one_line_and_status_2(capsys, options, message):
    defaults = {"--model": "stories", "--prompt": PROMPT} | dict(zip(options[::2], options[1::2], strict=True))
    assert cli.main(["lens", *(word for pair in defaults.items() for word in pair)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)
    assert captured.err.startswith("tl-jets: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read"], "invalid choice: 'read'"),
        (["lens", "--model", "x", "--prompt", "y", "--order", "one"], "--order: invalid int value: 'one'"),
        (["lens", "--model", "x", "--prompt", "y", "--center-scale", "half"], "invalid choice: 'half'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "--help" in error


def test_a_model_of_ones_own_needs_a_prompt(capsys):
    assert cli.main(["lens", "--model", "x"]) == 2
    assert capsys.readouterr().err == "tl-jets: a --model of your own needs a --prompt\n"


def test_files_hold_what_is_printed(capsys, monkeypatch, stories, tmp_path):
    paths = {kind: tmp_path / f"lens.{kind}" for kind in ("html", "json", "svg")}
    lines = run(capsys, monkeypatch, *(word for kind, path in paths.items() for word in (f"--{kind}", str(path))))
    trace = ResidualNetwork(stories, "block").trace(PROMPT)
    data = json.loads(paths["json"].read_text())
    assert data == lens_data(
        iterative_jet_lens(stories, trace, order=1, top_k=3),
        joint_jet_lens(stories, trace, top_k=3),
        model="stories",
        prompt=PROMPT,
    )
    assert paths["html"].read_text() == lens_page(data | {"shown": trace.tokens.shape[1] - 1})
    picture = paths["svg"].read_text()
    assert picture.startswith("<svg") and "final_post" in picture and any("final_post" in line for line in lines)
    assert "@font-face" not in picture and "cdn" not in picture


def test_a_damaged_model_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text((zoo.STORIES / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 99)
    assert cli.main(["lens", "--model", str(tmp_path), "--prompt", "hi"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"tl-jets: cannot load model '{tmp_path}'") and captured.err.count("\n") == 1


def test_as_a_module():
    """The real process, loader and all: nothing on standard error, and the tables on standard output."""
    command = [sys.executable, "-m", "tl_jets", "lens", "--model", str(zoo.STORIES), "--prompt", "The dog"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stderr == ""
    for part in ("Iterative jet lens", "Joint jet lens", "Averages", "How to read this"):
        assert part in done.stdout


def words(picture: str) -> list[str]:
    """What stands in an SVG, in order."""
    return " ".join(html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)).split()


def test_without_arguments_it_reads_the_embedded_model(tmp_path):
    command = [sys.executable, "-m", "tl_jets", "--svg", str(tmp_path / "lens.svg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    # The README's picture is this one, up to rounding.
    found, shown = (words(file.read_text()) for file in (tmp_path / "lens.svg", ROOT / "demos" / "lens.svg"))
    number = re.compile(r"[\d.]+")
    assert [number.sub("#", word) for word in found] == [number.sub("#", word) for word in shown]
    values = [[float(x) for word in text for x in re.findall(r"\d+\.\d+", word)] for text in (found, shown)]
    assert len(values[0]) > 30 and values[0] == pytest.approx(values[1], rel=0.02, abs=0.011)
    assert done.stderr == ""
    assert cli.EMBEDDED_PROMPT in done.stdout and "3_block_out" in done.stdout
