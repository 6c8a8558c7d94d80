"""The command line: `tl-jets lens`, and what all commands share: files, errors, exit statuses, hostile tokens, help."""

from __future__ import annotations

import argparse
import html
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import commands
import pytest
import zoo
from commands import numbers, tinydocs

import tl_jets
from tl_jets import ResidualNetwork, cli, iterative_jet_lens, joint_jet_lens
from tl_jets.cli import session
from tl_jets.cli.arguments import EMBEDDED_PROMPT
from tl_jets.cli.report import plain
from tl_jets.core.tokens import token_text, visible
from tl_jets.views import lens_data, lens_page

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "pages" / "pictures" / "lens.svg"
PROMPT = "Once upon a time, there was a little girl named Lily. She"

pytestmark = pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")


@pytest.fixture
def stories():
    return zoo.load_stories("bridge")


def run(capsys, monkeypatch, *options: str, columns: int = 120) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["lens", "--model", "stories", "--prompt", PROMPT, "--all", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def row(lines: list[str], label: str, section: str, order: int = 0) -> list[str]:
    """The cells of the row of a label, or of one of its orders in the rows below, in a table found by its title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(section))
    index = next(i for i in range(start, len(lines)) if lines[i].split()[:1] == [label])
    return re.split(r"\s{2,}", lines[index + order].strip())


def number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


@pytest.mark.parametrize("columns", [80, 120])
def test_lens_prints_what_the_lenses_say(capsys, monkeypatch, stories, columns):
    lines = run(capsys, monkeypatch, "--order", "2", columns=columns)
    assert max(map(len, lines)) <= columns
    net = ResidualNetwork(stories)
    trace = net.trace(PROMPT)
    lens, joint = iterative_jet_lens(net, trace, order=2, top_k=3), joint_jet_lens(net, trace, top_k=3)
    text = lambda token: visible(token_text(stories.tokenizer, int(token)))  # noqa: E731
    assert any(line.startswith(f"answer  {text(lens.model_top_ids[0, -1])},") for line in lines)
    for i, label in enumerate(lens.labels):
        assert row(lines, label, "Iterative jet lens")[2] == number(float(lens.rho[i, 0, -1]))
        for k in range(3):
            cells = row(lines, label, "Iterative jet lens", k)
            first, *others = (text(token) for token in lens.top_ids[i, k, 0, -1])
            first = f"[{first}]" if lens.borrowed[i, k, 0, -1] else first
            assert cells[-1].split(" ") == [first, *others]
            kl, control = lens.kl[i, k, 0, -1], lens.control.kl[i, k, 0, -1]
            if min(kl, control) > 0.006:
                assert f"{number(float(kl))} ({number(float(control))})" in cells
            own = " -own" if lens.alpha[i, k, 0, -1] < 0 else ""
            assert k == 0 or f"{float(lens.borrowed_share[i, k, 0, -1]):.0%}{own}" in cells
    for i, label in enumerate(joint.labels):
        cells = row(lines, label, "Joint jet lens")
        assert cells[1] == f"{float(joint.weights[i, 0, -1]):.3f}"
        assert cells[-1].split(" ")[-1] == text(joint.center_top_tokens(3).indices[i, 0, -1, -1])
    assert text(joint.top_ids[0, -1, 0]) in row(lines, "sum", "Joint jet lens")[-1]
    kls = [number(float(each.kl[0, -1])) for each in (joint, joint.control, joint.uniform, joint.control_uniform)]
    assert "the sum: KL {} ({}); uniform weights: KL {} ({})".format(*kls) in lines
    averages = row(lines, "joint", "Averages")
    counted = joint.valid & (joint.tokens != 1)  # without BOS
    mean, control = (
        {name: float(values[counted].mean()) for name, values in own.items()} for own in (joint.measures, joint.control)
    )
    for name in ("remainder_norm", "cosine", "centered_cosine", "kl"):
        assert f"{number(mean[name])} ({number(control[name])})" in averages
    assert f"{100 * mean['top1_agreement']:.0f} ({100 * control['top1_agreement']:.0f})" in averages
    assert any(line.strip() == f"averages leave out 1 of {joint.tokens.shape[1]} positions: 1 BOS" for line in lines)
    for entry in ("order", "[token]", "borrowed", "KL (control)", "rho", "joint", "remainder"):
        assert any(line.startswith(f"{entry}  ") for line in lines), entry


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


def test_every_order_is_shown(capsys, monkeypatch, stories):
    lines = run(capsys, monkeypatch, "--order", "7", columns=80)
    assert [row(lines, "0_pre", "Iterative jet lens", k)[k == 0] for k in range(8)] == [str(k) for k in range(8)]
    assert max(map(len, lines)) <= 80


def test_options_without_a_command_are_those_of_lens(capsys, stories):
    assert cli.main(["--model", "stories", "--prompt", PROMPT, "--top-k", "1", "--all"]) == 0
    assert "Iterative jet lens" in capsys.readouterr().out


def test_a_prompt_with_and_without_bos(capsys, stories):
    asked = ("lens", "--model", "stories", "--prompt", PROMPT)
    default, without, with_bos = (
        numbers(capsys, *asked, *more) for more in ((), ("--no-prepend-bos",), ("--prepend-bos",))
    )
    assert default["tokens"] == with_bos["tokens"] == [["<s>", *without["tokens"][0]]]


def test_two_targets_of_one_text_have_a_column_each(capsys, monkeypatch, stories):
    monkeypatch.setattr(stories.tokenizer, "decode", lambda ids, **options: "x" * len(ids))
    lines = run(capsys, monkeypatch, "--target", "id:300", "--target", "id:301", "--order", "0")
    assert row(lines, "layer", "Targets")[2:] == ["x (id:300)", "x (id:301)"]


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
    (["--position", "99"], r"--position must lie in -\d+\.\.\d+ for this prompt; got 99"),
    (["--top-k", "513"], "between 1 and d_vocab = 512, got 513"),
    (["--html", "/nowhere/page.html"], "cannot write '/nowhere/page.html': there is no directory '/nowhere'"),
    (["--json", "/"], "cannot write '/': it is a directory"),
    (["--json", "-", "--html", "-"], "each output needs a file of its own; got '-' more than once"),
    (
        ["--json", "/tmp/a", "--html", "/tmp/../tmp/a"],
        "each output needs a file of its own; got '/tmp/.*a' more than once",
    ),
    (["--prompt", "a \udcff"], "the prompt must be UTF-8; got bytes that are not at character 2"),
    (["--linearize", "detached", "--order", "1"], "Detached terms take no order above 0"),
    (["--layers", "17"], "layers must be 0..5, stream labels"),
    (["--target", "tiger lily"], "no single token reads 'tiger·lily'"),
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
        (["lens", "--order", "one"], "--order: must be a whole number, 0 or more; got 'one'"),
        (["lens", "--order", "-1"], "--order: must be a whole number, 0 or more; got '-1'"),
        (["lens", "--joint-order", "-2"], "--joint-order: must be a whole number, 0 or more; got '-2'"),
        (["ngrams", "--top-k", "100000000"], "--top-k: must be 1,000,000 or less; got '100000000'"),
        (["lens", "--top-k", "0"], "--top-k: must be a whole number, 1 or more; got '0'"),
        (["paths", "--layers", "3"], "unrecognized arguments: --layers 3 (see tl-jets paths --help)"),
        (["ngrams", "--prompt", "a"], "unrecognized arguments: --prompt a (see tl-jets ngrams --help)"),
        (["jacobian", "--pos", "1"], "unrecognized arguments: --pos 1"),
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
    trace = ResidualNetwork(stories).trace(PROMPT)
    data = json.loads(paths["json"].read_text())
    assert list(data)[:2] == ["tl_jets", "command"] and data["command"] == "lens"
    answers = trace.logits.argmax(-1)[..., None]
    lenses = (
        iterative_jet_lens(stories, trace, order=1, top_k=3, targets=answers),
        joint_jet_lens(stories, trace, top_k=3),
    )
    shown = trace.tokens.shape[1] - 1
    assert {name: value for name, value in data.items() if name != "command"} == lens_data(
        *lenses, model="stories", prompt=PROMPT
    ) | {"shown": shown}
    document = paths["html"].read_text()
    assert lens_page(*lenses, model="stories", prompt=PROMPT, shown=shown).html in document
    for part in ("tl-jets lens", "Averages over the prompt&#x27;s positions", "How to read this"):
        assert part in document
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
    command = [sys.executable, "-m", "tl_jets", "lens", "--model", str(zoo.STORIES), "--prompt", "The dog", "--all"]
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
    # The picture of the README and of the guide is this one, up to rounding.
    found, shown = (words(file.read_text()) for file in (tmp_path / "lens.svg", PICTURE))
    number = re.compile(r"[\d.]+")
    assert [number.sub("#", word) for word in found] == [number.sub("#", word) for word in shown]
    values = [[float(x) for word in text for x in re.findall(r"\d+\.\d+", word)] for text in (found, shown)]
    assert len(values[0]) > 30 and values[0] == pytest.approx(values[1], rel=0.02, abs=0.011)
    assert done.stderr == ""
    assert EMBEDDED_PROMPT in done.stdout and "3_mlp_out" in done.stdout


# Lenses that are not the paper's


def test_the_detached_lens_shows_effects_and_no_rho(capsys, monkeypatch, stories):
    lines = run(capsys, monkeypatch, "--linearize", "detached", "--granularity", "sublayer")
    net = ResidualNetwork(stories, "sublayer")
    trace = net.trace(PROMPT)
    lens, joint = (f(net, trace, linearize="detached", top_k=3) for f in (iterative_jet_lens, joint_jet_lens))
    for i, label in enumerate(lens.labels):
        cells = row(lines, label, "Iterative jet lens")
        assert len(cells) == 4 and cells[1] == "-"  # no order, no rho
        if min(lens.kl[i, 0, 0, -1], lens.control.kl[i, 0, 0, -1]) > 0.006:
            assert f"{number(float(lens.kl[i, 0, 0, -1]))} ({number(float(lens.control.kl[i, 0, 0, -1]))})" in cells
    # Effects are the sizes that the sums of paths have with no write after: they sum to the model's own centered logit.
    logits = stories(PROMPT)[0, -1].double()
    answer = int(logits.argmax())
    data = numbers(capsys, "lens", "--model", "stories", "--prompt", PROMPT, "--linearize", "detached",
                   "--granularity", "sublayer")  # fmt: skip
    assert data["joint"]["linearize"] == data["iterative"]["linearize"] == "detached"
    assert data["joint"]["target_ids"][0][-1] == [answer]
    effects = {label: each[0][-1][0] for label, each in zip(joint.labels, data["joint"]["effects"], strict=True)}
    assert sum(effects.values()) == pytest.approx((logits[answer] - logits.mean()).item(), rel=1e-4)
    for label in joint.labels[:-1]:
        shown = float(row(lines, label, "Joint jet lens")[1])
        assert shown == pytest.approx(effects[label], rel=0.05, abs=6e-3)
    assert effects["ln_final_bias"] == 0 and not any("ln_final_bias" in line for line in lines)
    assert all(value is None for layer in data["iterative"]["rho"] for value in layer[0])
    legend = "\n".join(lines[lines.index("How to read this") :])
    assert "nothing is borrowed" in " ".join(legend.split()) and "[token]" not in legend


def test_the_detached_lens_shows_effects_on_targets(capsys, monkeypatch, stories):
    options = ("--linearize", "detached", "--target", "was", "--target", "id:300")
    lines = run(capsys, monkeypatch, *options)
    ids = [stories.tokenizer("was", add_special_tokens=False)["input_ids"][0], 300]
    logits = stories(PROMPT)[0, -1].double()
    shown = {label: [float(x) for x in row(lines, label, "Joint")[1:3]] for label in ("embed", "sum")}
    joint = joint_jet_lens(stories, PROMPT, linearize="detached", targets=ids)
    assert shown["embed"] == pytest.approx(joint.effects[0, 0, -1].tolist(), rel=0.05, abs=6e-3)
    assert shown["sum"] == pytest.approx((logits[ids] - logits.mean()).tolist(), rel=0.05, abs=6e-3)
    data = numbers(capsys, "lens", "--model", "stories", "--prompt", PROMPT, *options)["joint"]
    assert data["targets"][0][-1] == [visible(token_text(stories.tokenizer, token)) for token in ids]
    assert data["effects"][0][0][-1] == pytest.approx(joint.effects[0, 0, -1].tolist(), rel=1e-5)


def test_targets_are_followed_through_the_layers(capsys, monkeypatch, stories):
    options = ("--target", "was", "--target", "id:300", "--order", "1", "--layers", "-1", "--layers", "3_mid")
    lines = run(capsys, monkeypatch, *options)
    ids = [stories.tokenizer("was", add_special_tokens=False)["input_ids"][0], 300]
    lens = iterative_jet_lens(stories, PROMPT, order=1, layers=[-1, "3_mid"], targets=ids)
    assert lens.labels == ["final_post", "3_mid"]
    for i, label in enumerate(lens.labels):
        both = " ".join(cell for k in range(2) for cell in row(lines, label, "Targets", k))
        found = re.findall(r"([\d,]+) \(([-+][\d.e-]+)\)", both)
        expected = [(t, k) for k in range(2) for t in range(2)]
        assert [int(rank.replace(",", "")) for rank, _ in found] == [
            int(lens.target_ranks[i, k, 0, -1, t]) for t, k in expected
        ]
        assert [float(logit) for _, logit in found] == pytest.approx(
            [float(lens.target_logits[i, k, 0, -1, t]) for t, k in expected], rel=0.05, abs=6e-3
        )
    asked = ("lens", "--model", "stories", "--prompt", PROMPT, *options)
    data = numbers(capsys, *asked)["iterative"]
    assert data["target_ids"][0][-1] == ids
    assert data["target_ranks"] == plain(lens.target_ranks) and data["labels"] == lens.labels


def test_uniform_weights_without_embeddings(capsys, monkeypatch, stories):
    lines = run(capsys, monkeypatch, "--weights", "uniform", "--no-embeddings", "--seed", "3")
    joint = joint_jet_lens(stories, PROMPT, weights="uniform", embeddings=False, seed=3)
    assert not any(line.startswith("embed") for line in lines)
    assert {row(lines, label, "Joint")[1] for label in joint.labels} == {"0.100"}
    kl, control = float(joint.kl[0, -1]), float(joint.control.kl[0, -1])
    assert any(line.startswith(f"the sum: KL {number(kl)} ({number(control)});") for line in lines)


# Files and standard output


def test_a_dash_is_standard_output_and_nothing_else_stands_there(capsys, stories):
    asked = ("lens", "--model", "stories", "--prompt", PROMPT)
    assert numbers(capsys, *asked)["model"] == "stories"
    page = commands.run(capsys, *asked, "--html", "-")
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert commands.run(capsys, *asked, "--svg", "-").startswith("<svg")


def test_what_is_no_number_is_null():
    assert plain({"a": [float("nan"), 1.5, (float("inf"), 2)], 3: "x"}) == {"a": [None, 1.5, [None, 2]], "3": "x"}


def test_files_are_written_before_tables(capsys, monkeypatch, tmp_path, stories):
    """A reader that goes away after the first lines has its file all the same."""
    file = tmp_path / "lens.json"

    def broken(*parts):
        raise BrokenPipeError

    monkeypatch.setattr("tl_jets.cli.report.Terminal.print", broken)
    status = cli.main(["lens", "--model", "stories", "--prompt", PROMPT, "--json", str(file)])
    assert status == 141 and capsys.readouterr().err == ""
    assert json.loads(file.read_text())["model"] == "stories"


# Exit statuses


def test_an_unexpected_error_is_one_line_and_status_1(capsys, monkeypatch, stories):
    def fails(*arguments, **options):
        raise RuntimeError("the machine\nis on fire")

    monkeypatch.setattr("tl_jets.cli.jacobian.detached_jacobian", fails)
    asked = ["jacobian", "--model", "stories", "--prompt", PROMPT]
    error = commands.run(capsys, *asked, status=1)
    assert error == "tl-jets: unexpected RuntimeError: the machine is on fire (--traceback shows where)\n"
    with pytest.raises(RuntimeError):
        cli.main([*asked, "--traceback"])


def test_an_interrupt_is_status_130(capsys, monkeypatch, stories):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_jets.cli.lens.iterative_jet_lens", interrupted)
    assert commands.run(capsys, "lens", "--model", "stories", "--prompt", "a", status=130) == "tl-jets: interrupted\n"


def test_the_process_dies_quietly_of_a_closed_pipe_and_of_an_interrupt():
    command = [sys.executable, "-m", "tl_jets", "lens", "--model", str(zoo.STORIES), "--prompt", "The dog"]
    closed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    closed.stdout.close()
    assert (closed.wait(timeout=300), closed.stderr.read()) == (141, b"")
    lasting = (
        # A suite that a shell has put in the background ignores interrupts, and so do its children.
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tl_jets.cli import main, session; "
        "session.load_network = lambda *asked: (print('begun', flush=True), time.sleep(200)); sys.exit(main([]))"
    )
    begun = subprocess.Popen([sys.executable, "-c", lasting], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert begun.stdout.readline() == "begun\n"
    begun.send_signal(signal.SIGINT)
    out, error = begun.communicate(timeout=100)
    assert (begun.returncode, out, error) == (130, "", "tl-jets: interrupted\n")


# Tokens, as they are given and as they are shown


# Every token is an attack on a terminal or on a page.
HOSTILE = (
    "[bold]x[/bold]",
    "\x1b[31m",
    "</script><script>alert(1)</script>",
    "\u202eevil",
    ":smile:",
    "\r\n",
    "'\"",
    "",
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["lens", "--target", "id:1"],
        ["lens", "--linearize", "detached"],
        ["paths", "--ablate", "--target", "id:8"],
        ["ngrams"],
        ["ngrams", "--token", "id:2", "--path", "direct"],
        ["ngrams", "--trigrams", "0", "--head", "0"],
        ["jacobian", "--target", "id:4"],
        ["flow", "--ablate", "0_mlp", "--target", "id:8"],
        ["flow", "--joint", "L0H1", "L1H2", "--target", "id:4"],
    ],
    ids=" ".join,
)
def test_no_token_is_markup_or_moves_the_cursor(capsys, monkeypatch, tmp_path, arguments):
    decode = lambda ids, **options: "".join(HOSTILE[int(i) % len(HOSTILE)] for i in ids)  # noqa: E731
    monkeypatch.setattr(tinydocs().tokenizer, "decode", decode)
    page = tmp_path / "page.html"
    text = commands.run(capsys, *arguments, "--html", str(page))
    assert all(char == "\n" or char.isprintable() for char in text)
    assert any(shown in text for shown in ("[bold]x[/bold]", "\\x1b[31m", ":smile:", "\\u202eevil"))
    if arguments[0] == "paths":  # in a cell that is no Text
        assert "the centered logit of [bold]x[/bold]" in " ".join(text.split())
    written = page.read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", written) and "<script>alert" not in written


def test_a_prompt_moves_no_cursor(capsys, stories):
    text = commands.run(capsys, "lens", "--model", "stories", "--prompt", "a \x1b[31m [red]\n\u202e :smile:")
    assert r"prompt  a \x1b[31m [red]\n\u202e :smile:" in text


def test_tokens_are_found_as_they_are_shown(stories):
    for model in (stories, tinydocs()):
        network = ResidualNetwork(model)
        texts = [token_text(model.tokenizer, i) for i in range(network.decoder.d_vocab)]
        for token in range(0, len(texts), 41):
            if texts.count(texts[token]) > 1:
                with pytest.raises(session.UsageError, match="tokens read"):
                    session.read_token(network, texts[token])
            elif texts[token]:
                found = session.read_token(network, visible(texts[token]))
                assert texts[found] in (texts[token], visible(texts[token])), texts[token]
                assert session.read_token(network, texts[token]) == token


def test_a_text_is_looked_for_as_it_is_first():
    network = ResidualNetwork(tinydocs())
    texts = [token_text(network.tokenizer, i) for i in range(network.decoder.d_vocab)]
    both = next(text for text in texts if text.isalpha() and f" {text}" in texts)
    alone = next(text[1:] for text in texts if text[:1] == " " and text[1:].isalpha() and text[1:] not in texts)
    assert texts[session.read_token(network, both)] == both
    assert texts[session.read_token(network, f" {both}")] == f" {both}"
    assert texts[session.read_token(network, alone)] == f" {alone}"


# Help


COMMANDS = {name: parser for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)
            for name, parser in action.choices.items()}  # fmt: skip
BOS = ResidualNetwork.tokenize


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name):
    parser, text = COMMANDS[name], COMMANDS[name].format_help()
    assert "what the numbers mean:" in text and re.search("control", text)
    for action in parser._actions:
        assert action.help
        for option in action.option_strings:
            assert re.search(rf"^  (-h, |--prepend-bos, |--max-length N, )?{option}\b", text, re.MULTILINE), option
        if action.default not in (None, argparse.SUPPRESS) and action.nargs != 0:
            assert f"(default: {action.default})" in " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_are_commands(name):
    examples = re.findall(r"^  (tl-jets .*)$", COMMANDS[name].epilog, re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        words = shlex.split(example.split(" | ")[0], comments=True)
        assert words[1] == name
        assert cli.parser().parse_args(words[1:]).command == name


@pytest.mark.parametrize(
    ("name", "functions", "own"),
    [
        (
            "lens",
            (iterative_jet_lens, joint_jet_lens, tl_jets.over_prompts, BOS),
            {"joint_order", "no_embeddings", "all", "averages"},
        ),
        (
            "paths",
            (tl_jets.exponential_expansion, ResidualNetwork, tl_jets.over_prompts, BOS),
            {"ablate", "no_components", "seed"},
        ),
        (
            "flow",
            (tl_jets.flow, tl_jets.joint_flow, tl_jets.ablation_hooks, BOS),
            {"ablate", "corrupted", "joint", "keep_bos", "top"},
        ),
        ("ngrams", (tl_jets.jet_bigrams, tl_jets.jet_trigrams), {"trigrams", "token", "scores", "keep_all"}),
        ("jacobian", (tl_jets.detached_jacobian, BOS), {"targets", "svd", "top_k", "seed", "all"}),
        ("explore", (tl_jets.views.explorer, BOS), {"ablate", "keep_bos", "positions"}),
    ],
)
def test_options_are_called_as_the_arguments_of_the_functions(name, functions, own):
    known = {parameter for function in functions for parameter in inspect.signature(function).parameters}
    singular = {"target": "targets", "position": "positions"}
    of_all = {"help", "prompt", "html", "json", "svg", "explain", "traceback"}
    given = {action.dest for action in COMMANDS[name]._actions} - of_all
    if name == "paths":  # positions are an argument of the call
        given -= {"position"}
    assert {singular.get(option, option) for option in given} - own <= known


def test_the_top_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"tl-jets {name} " in text for name in COMMANDS) and "exit status: 0 fine; 2" in text
