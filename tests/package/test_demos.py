"""The demos run, and print what the guides say."""

from __future__ import annotations

import ast
import io
import math
import re
import runpy
import sys
import sysconfig
import tokenize
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo

import tl_jets

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "pages" / "guides"


def printed_by(demo: str, *arguments: str, monkeypatch, capsys) -> list[str]:
    monkeypatch.setattr(sys, "argv", [demo, *arguments])
    runpy.run_path(str(ROOT / "demos" / demo), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def plotted(demo: dict, found, file: Path):
    """The figure that a demo draws into a file."""
    from matplotlib.figure import Figure

    figures, draw = [], Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *given: (figures.append(figure), draw(figure, *given)))
        demo["plot"](found, file)
    assert "<svg" in file.read_text()
    return figures[0]


def modules(*names: str) -> list[Path]:
    return [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in names]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def test_the_guide_shows_the_paths_that_the_demo_prints(monkeypatch, capsys):
    printed = printed_by("top_paths.py", monkeypatch=monkeypatch, capsys=capsys)
    page = (GUIDES / "paths.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.endswith(" > ln_final` |")]
    assert len(rows) == 20
    for row in rows:
        path = row.split("`")[1]
        found = next(line for line in printed if f" {path} " in line)
        assert numbers(found) == pytest.approx(numbers(row), abs=0.011), path
    verdicts = [row.split("|")[4].strip() for row in rows]
    assert "these 20: 8 confirmed, 6 partly, 6 refuted" in " ".join(printed)
    assert [verdicts.count(kind) for kind in ("confirmed", "partly", "refuted")] == [8, 6, 6]
    assert "20 random paths: 5 confirmed, 7 partly, 8 refuted" in " ".join(printed)
    assert "falls shuffled: 5.5 confirmed, as many in 7.9% of shuffles" in " ".join(printed)


def test_chance_is_what_shuffled_falls_confirm():
    demo = runpy.run_path(str(ROOT / "demos" / "top_paths.py"))
    effects, falls = [1.0, 2.0, 3.0, -1.0, 0.5], [1.5, -1.0, 0.4, 6.0, 2.5]
    expected = sum(0.5 <= fall / effect <= 2 for effect in effects for fall in falls) / len(falls)
    counts = demo["confirmed_by_chance"](effects, falls, 4000)
    assert sum(counts) / len(counts) == pytest.approx(expected, abs=0.08) and len(set(counts)) > 2


def test_what_predicts_ablation_is_a_table_of_correlations(monkeypatch, capsys):
    demo = runpy.run_path(str(ROOT / "demos" / "what_predicts_ablation.py"))
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    found = demo["correlations"](network, demo["DOCS"][:2], [step.label for step in network.steps])
    assert len(found) == 6 and all(len(cells) == 4 and len(cells[0]) == 2 for cells in found.values())
    assert all(bool((cell.abs() <= 1).all()) for cells in found.values() for cell in cells)
    # The gradient, by what is lost when a hundredth of the write is taken away or added.
    trace = network.trace(demo["DOCS"][0])
    answer, steps = int(trace.logits[0, -1].argmax()), ["1_mlp", "L2H1"]

    def centered(name: str, change) -> float:
        with network.view.model.hooks([(name, change)]):
            logits = network.view.model(trace.tokens)[0, -1].double()
        return float((logits[answer] - logits.mean()).detach())

    def scaled(write, hook, by: float, head: int | None = None):
        write = write.clone()
        write[..., slice(None) if head is None else head, :] *= by
        return write

    sites = [("blocks.1.hook_mlp_out", None), ("blocks.2.attn.hook_z", 1)]
    for step, (name, head) in zip(steps, sites, strict=True):
        high, low = (centered(name, partial(scaled, by=by, head=head)) for by in (1.01, 0.99))
        (gradient,) = demo["gradient_times_write"](
            network.at("head"), network.at("head").trace(trace.tokens), [step], answer
        )
        assert float(gradient) == pytest.approx((high - low) / 0.02, rel=2e-3, abs=2e-3), step
    paths, weights = (found[name][1].mean() for name in ("all detached paths", "jet weights"))
    assert paths > weights, "path sums predict the KL of these two prompts better than jet weights"


@pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")
def test_the_table_of_borrowed_answers_is_what_the_demo_prints(monkeypatch, capsys):
    printed = printed_by("borrowed_answers.py", str(zoo.STORIES), monkeypatch=monkeypatch, capsys=capsys)
    rows = [line for line in (GUIDES / "lenses.md").read_text().splitlines() if re.match(r"\| `\d_pre` \|", line)]
    assert len(rows) == 5
    for row in rows:
        cells = [cell.strip().strip("`") for cell in row.strip("|").split("|")]
        found = next(line for line in printed if cells[0] in line)
        assert numbers(found) == pytest.approx(numbers(row), abs=0.021), cells[0]


def test_what_tl_jets_is_compared_with():
    """On the embedded model: nested differentiation is wrong from order 2 on, and descent ends above the optimum."""
    demo = runpy.run_path(str(ROOT / "demos" / "alternatives.py"))
    errors = demo["norm_errors"](points=10)
    assert all(ours < 1e-14 for _, ours in errors) and all(nested < 1e-14 for nested, _ in errors[:2])
    assert all(nested > 0.05 for nested, _ in errors[2:])
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    difference, *_ = demo["logit_lens"](network, demo["DOCS"])
    assert difference < 1e-4
    best, *others = demo["joint_losses"](network, demo["DOCS"]).values()
    assert all(best <= other + 1e-6 for other in others) and others[0] > 2 * best


def test_the_detached_map(monkeypatch, capsys):
    """Its checks are in the demo itself."""
    monkeypatch.setattr(sys, "argv", ["detached_map.py"])
    runpy.run_path(str(ROOT / "demos" / "detached_map.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"{table}. " in printed for table in range(1, 6))
    error = next(line for line in printed.splitlines() if "error" in line and "occurred" in line)
    assert "raised" in error and float(re.findall(r"[+-]\d+\.\d+", error)[0]) > 6


def test_the_guide_shows_the_bigrams_that_the_library_finds():
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    tables = tl_jets.ngrams.jet_bigrams_by_path(network, ["direct", "mlps"], top_k=20)
    tables |= tl_jets.ngrams.jet_bigrams_by_path(network, top_k=20)
    found = tl_jets.ngrams.side_by_side(tables, 20)
    lines = (GUIDES / "ngrams.md").read_text().splitlines()
    start = lines.index("| " + " | ".join(["rank (0: best)", *found.columns]) + " |")
    shown = [re.findall(r"`` (.*?) ``", line) for line in lines[start + 2 : start + 22]]
    wanted = [[cell.replace("|", "\\|") for cell in row] for row in found.to_numpy().tolist()]
    same = sum(a == b for row, cells in zip(shown, wanted, strict=True) for a, b in zip(row, cells, strict=True))
    assert same >= 118, "120 cells; a near-tie may fall otherwise elsewhere"


def test_the_model_learns_the_bigrams_of_its_text(monkeypatch, capsys, tmp_path):
    """From scratch to a hit ratio above that of shuffled bi-grams, in 80 steps of a very small model."""
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    demo = runpy.run_path(str(ROOT / "demos" / "bigram_dynamics.py"))
    recipe = demo["Recipe"](steps=80, batch=8, context=64, rate=1e-2, doublings=2, n_layers=1, d_model=32, d_mlp=64)
    assert recipe.looked_at == [0, 20, 40, 80]
    tokenizer = tl_jets.load_tinydocs().tokenizer
    text = demo["Text"].of(modules("datetime", "argparse", "ast", "inspect", "doctest", "tarfile", "typing"), tokenizer)
    found = demo["follow"](text, recipe, 100)
    assert list(found.tracks) == ["direct", "0_mlp", "mlps"] and found.steps == recipe.looked_at
    assert found.run.nats[0] == pytest.approx(math.log(4096), abs=0.05) and found.run.nats[-1] < 7.5
    direct = found.tracks["direct"]
    assert direct.hit_ratio[-1] > direct.hit_control[-1].max() and direct.hit_ratio[-1] > direct.hit_ratio[0] + 0.05
    assert abs(direct.hit_ratio[0] - direct.hit_control[0].mean()) < 0.05
    own = found.own_hits()
    assert own[-1][0] > own[-1][1] and own[-1][0] > own[0][0] + 0.1
    # The given bi-grams are what they are said to be.
    real = {
        tuple(row): int(count)
        for row, count in zip(found.counts.ids.tolist(), found.counts.parts["count"], strict=True)
    }
    frequent, control = (set(map(tuple, found.kinds["frequent" + x].tolist())) for x in ("", ", never in the text"))
    assert min(map(real.__getitem__, frequent)) >= 5 and not control & real.keys() and len(control) > 20
    assert found.margins("direct", "frequent")[-1] > 0.2 > abs(found.margins("direct", "frequent")[0])
    said = " ".join(found.conclusions())
    assert f"direct ({direct.hit_ratio[-1]:.2f})" in said
    assert f"frequent ones {found.margins('direct', 'frequent')[-1]:+.1f} nats" in said
    assert len(found.over_steps()) == 4 and len(found.of_kinds()) == 5
    hits, *scores = plotted(demo, found, tmp_path / "curves.svg").axes
    for own in ([hit for hit, _ in found.own_hits()], direct.hit_ratio.tolist(), direct.hit_control.mean(1).tolist()):
        assert any(list(line.get_ydata()) == pytest.approx(own) for line in hits.lines)
    for axis, kind in zip(scores, ("frequent", "rare but certain"), strict=True):
        for path in (*found.tracks, None):
            for wanted in (found.scores(path, kind), found.scores(path, kind + ", never in the text")):
                assert any(list(line.get_ydata()) == pytest.approx(wanted) for line in axis.lines)
    # A run is determined by its seed.
    again = demo["Training"](recipe, text, found.run.pairs, found.run.unigram, 100)
    for step, _ in again:
        if step == 20:
            break
    assert again.nats == found.run.nats[:2]


def test_what_the_model_itself_predicts_is_an_average_over_places(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    demo = runpy.run_path(str(ROOT / "demos" / "bigram_dynamics.py"))
    tokenizer = tl_jets.load_tinydocs().tokenizer
    text = demo["Text"].of(modules("heapq", "random", "statistics"), tokenizer)
    recipe = demo["Recipe"](steps=1, batch=4, context=16, n_layers=1, d_model=16, d_mlp=16)
    windows = demo["sample"](text, recipe)
    pairs = windows[0, :2][None]
    unigram = tl_jets.studies.unigram_probabilities(text.training, 4096)
    run = demo["Training"](recipe, text, pairs, unigram, 50)
    for step, model in run:
        logits = model(windows[:, :-1])
        where = windows[:, :-1] == pairs[0, 0]
        mean = logits.softmax(-1)[where][:, pairs[0, 1]].mean()
        assert run.own_scores[step].item() == pytest.approx(mean.log().item(), abs=1e-4)
        best = run.own[step].ids[0]
        where = windows[:, :-1] == best[0]
        expected = logits.softmax(-1)[where][:, best[1]].mean().log() + unigram[best[0]].log()
        assert run.own[step].scores[0].item() == pytest.approx(expected.item(), abs=1e-4)
        targets = demo["Text"].windows(text, 16, held_out=True)
    assert step == 1 and targets.shape[1] == 17


def test_fine_tuning_raises_the_bigrams_of_source(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    demo = runpy.run_path(str(ROOT / "demos" / "fine_tuned_bigrams.py"))
    found = demo["compare"](modules("ast", "argparse", "inspect", "typing"), n=300)
    sizes = [x.settings["total"] for x in (found.code, found.docs)]
    assert max(sizes) - min(sizes) < 0.01 * min(sizes) and min(sizes) > 10_000
    (rises, rises_shuffled), (falls, falls_shuffled) = (
        found.kinds(x) for x in (found.changed.rises, found.changed.falls)
    )
    assert rises.shape == falls.shape == (300, 3)
    code, docs = (Counter() for _ in range(2))
    for counts, table in ((code, found.code), (docs, found.docs)):
        counts.update(dict(zip(map(tuple, table.ids.tolist()), table.parts["count"].tolist(), strict=True)))
    firsts = [Counter(dict.fromkeys(range(4096), 0)) for _ in range(2)]
    for first, counts in zip(firsts, (code, docs), strict=True):
        for (token, _), number in counts.items():
            first[token] += number
    assert found.changed.first.tolist() == [token for token in range(4096) if min(x[token] for x in firsts) >= 10]
    for (one, two), kind in zip(found.changed.rises.ids.tolist(), rises.tolist(), strict=True):
        in_code, in_docs = (counts[one, two] / first[one] for counts, first in zip((code, docs), firsts, strict=True))
        assert kind == [in_code > in_docs, in_docs > in_code, in_code == in_docs == 0]
    lean = demo["lean"]
    assert (
        lean(rises).mean() > 0.1 + lean(rises_shuffled).mean()
        and lean(falls).mean() < lean(falls_shuffled).mean() - 0.1
    )
    assert demo["probabilities"](found.code, torch.tensor([[4095, 4095]])).tolist() == [0.0]
    first = found.movers(found.changed.rises)
    assert first["after"].astype(float).gt(first["before"].astype(float)).all() and len(first) == 20
    assert "leans to source" in found.conclusions()[0] and "leans to documentation" in found.conclusions()[1]
    assert found.summary()["lean"][0].startswith(f"{float(lean(rises).mean()):+.2f} (")
    shares, up, down = plotted(demo, found, tmp_path / "changes.svg").axes
    heights = [bar.get_height() for bar in shares.patches]
    wanted = [x.mean(0) for x in (rises, rises_shuffled, falls, falls_shuffled)]
    assert heights == pytest.approx(torch.cat(wanted).tolist())
    for axis, table in ((up, found.changed.rises), (down, found.changed.falls)):
        before, after, *_ = (list(line.get_xdata()) for line in axis.lines)
        assert before == pytest.approx(table.parts["before"][:20].exp().tolist(), abs=0.006)
        assert after == pytest.approx(table.parts["after"][:20].exp().tolist(), abs=0.006)
    # A list that follows neither text more than chance leans to neither.
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    by_chance = replace(found.changed.rises, ids=found.changed.rises.ids.clone())
    by_chance.ids[:, 1] = by_chance.ids[order, 1]
    neither = replace(found, changed=replace(found.changed, rises=by_chance))
    assert "leans to neither text" in neither.conclusions()[0]


def test_the_guide_says_of_each_mlp_what_its_ablation_says():
    demo = runpy.run_path(str(ROOT / "demos" / "ngram_studies.py"))
    network, page = tl_jets.ResidualNetwork(tl_jets.load_tinydocs()), (GUIDES / "ngrams.md").read_text()
    checks = [tl_jets.studies.ablation_check(network, f"{layer}_mlp") for layer in range(4)]
    found = demo["ablations"](checks).set_index("ablated")
    start = page.index("| MLP | own bi-grams |")
    for check, line in zip(checks, page[start:].splitlines()[2:6], strict=True):
        step, *values, verdict = [cell.strip() for cell in line.strip("|").split("|")]
        assert step == f"`{check.step}`"
        assert [numbers(value)[0] for value in values] == [numbers(x)[0] for x in found.loc[check.step]]
        assert f"(`{check.strongest_other}`)" in values[2]
        assert verdict.startswith("confirmed") == check.confirmed and ("not confirmed" in verdict) == (
            not check.confirmed
        )
        assert re.findall(r"`(.*?)`", verdict) == check.rivals
        assert ("costs more" in verdict) == ("costs more" in check.verdict)
        assert ("not told apart" in verdict) == ("not told apart" in check.verdict)
    difference = checks[2].summary().set_index("what").loc["own ablation - 0_mlp's"]
    mean, low, high = difference[["mean", "low", "high"]]
    assert f"(own less that: {mean:+.2f}, 95% interval [{low:+.2f}, {high:+.2f}])" in " ".join(page.split())


def test_source_without_docstrings_and_comments(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    demo = runpy.run_path(str(ROOT / "demos" / "fine_tuned_bigrams.py"))
    text = '#! first\n"""Doc\nof two lines."""  # noqa\nx = """kept # \n too"""  # gone\n\n\x0c\ndef f(a):  # one\n'
    text += '    "doc" \'of\' "parts"\n    # alone\n    y = "a # b"; return y\n\nf("kept")\n# last'
    kept = ['x = """kept #', ' too"""', "def f(a):", '    y = "a # b"; return y', 'f("kept")']
    assert demo["code_lines"](text) == kept
    # Python's own parser, of modules none of whose bodies are a docstring alone.
    texts = [file.read_text() for file in modules("heapq", "random", "textwrap", "tokenize", "datetime", "ast")]
    compared = 0
    for text in texts:
        lines = demo["code_lines"](text)
        tree = ast.parse(text)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
        try:
            found = ast.parse("\n".join(lines))
        except SyntaxError:
            continue
        compared += 1
        for node in (*ast.walk(found), *ast.walk(tree)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = " ".join(node.value.split())  # texts lose their empty lines, too
        assert ast.dump(found) == ast.dump(tree) and all(line.strip() for line in lines)
        comments = [
            x
            for x in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
            if x.type == tokenize.COMMENT
        ]
        assert not comments
    assert compared >= 3


def test_paths_are_compared_with_a_text(monkeypatch, capsys, tmp_path):
    """The demo of n-gram studies on a short text: its tables are what the studies find."""
    demo = runpy.run_path(str(ROOT / "demos" / "ngram_studies.py"))
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    texts = demo["paragraphs"](
        "Return the  number\nof bytes that were read.\n\nToo short.\n\n>>> a = 1 this is a line of code\n\n"
        "The server is not available on all of the platforms."
    )
    assert texts == [
        "Return the number of bytes that were read.",
        "The server is not available on all of the platforms.",
    ]
    counts = demo["count"](network, texts * 3)
    assert set(counts.parts["count"].tolist()) <= {3.0, 6.0} and counts.names[int(counts.ids[0, 0])]
    found = tl_jets.studies.compare_with_counts(network, counts, n=10, paths=["direct", "mlps"], progress=False)
    frame = found.summary()
    assert frame["path"].tolist() == ["direct", "mlps", "unigram (no model)"]
    assert frame["hit ratio"].tolist() == [f"{x:.2f}" for x in found.hit_ratio.tolist()]
    some = demo["docstrings"](modules("ast"))
    assert len(some) > 20 and all(x.count(" ") >= 4 for x in some)
    table = demo["rendered"](frame, "a title")
    assert table.row_count == 3 and [column.header for column in table.columns] == list(frame.columns)


def test_findings(monkeypatch, capsys, tmp_path):
    """Every question has its table; numbers are those of the functions on the same prompts."""
    prompts = ["This function is available on Unix and", "If the file does not exist, an error is", "A list of"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts))
    monkeypatch.syspath_prepend(str(ROOT / "demos"))
    asked = ("lenses", "paths", "ablations", "mediators", "directions", "--prompts", str(file))
    printed = printed_by("findings.py", *asked, monkeypatch=monkeypatch, capsys=capsys)
    net = tl_jets.ResidualNetwork(tl_jets.load_tinydocs())
    rows = {cells[1]: cells[2:-1] for line in printed if len(cells := [c.strip() for c in line.split("│")]) > 3}
    lens = tl_jets.iterative_jet_lens(net, prompts, order=1)
    kept = lens.valid & ~lens.sinks.mask
    excess = (lens.kl - lens.control.kl)[:, :, kept].mean(-1)
    for label in ("1_pre", "3_pre"):
        own = excess[lens.labels.index(label)]
        assert [numbers(cell)[0] for cell in rows[label][:2]] == pytest.approx(own.tolist(), abs=0.02)
    found = []
    for prompt in prompts:
        effects = tl_jets.exponential_expansion(net, linearize="detached", top=20, rank="effect")(prompt, positions=-1)
        logits = net.trace(prompt).logits[0, -1].detach().double()
        found.append(float(effects.statistics().effect.sum() / (logits.max() - logits.mean())))
    shown = rows["share of the logit that the 20 largest hold"][0]
    assert shown.split("%")[0] == f"{100 * sorted(found)[1]:.0f}"
    falls = [
        -tl_jets.ablation_effect(net, p, ablated_positions=range(1, len(net.trace(p).tokens[0]))).centered
        for p in prompts
    ]
    first = [
        -tl_jets.first_order_effects(net, p, ablated_positions=range(1, len(net.trace(p).tokens[0]))).effect
        for p in prompts
    ]
    ranks = [
        torch.stack([f.flatten(), e.flatten()]).argsort(1).argsort(1).double()
        for f, e in zip(first, falls, strict=True)
    ]
    mean = sum(float(torch.corrcoef(rank)[0, 1]) for rank in ranks) / len(ranks)
    assert numbers(rows["gradient x write (order 1)"][0])[0] == pytest.approx(mean, abs=0.006)
    assert {"flow", "relative error of J e + bias", "length of the change (control)"} <= set(rows)
