"""`tl-jets paths`: what it prints and writes is what the library's functions give."""

from __future__ import annotations

import pytest
from commands import cells, numbers, run, tinydocs

import tl_jets as tj
from tl_jets.cli.largest_paths import rank_correlation
from tl_jets.interventions.path_ablations import verdict
from tl_jets.paths import expansion

COLUMNS = 80

PROMPT = "This function is available on Unix and"
ASKED = ("paths", "--prompt", PROMPT)


@pytest.fixture(scope="module")
def trace(network):
    return network.trace(PROMPT)


def own_logit(token: int, position: int = -1) -> float:
    """The model's logit of a token beyond the mean of the vocabulary, by its own forward pass."""
    logits = tinydocs()(PROMPT)[0, position].double()
    return (logits[token] - logits.mean()).item()


def test_the_numbers_are_those_of_the_functions(capsys, network, trace):
    found = numbers(capsys, *ASKED, "--top", "7", "--ablate")
    expansion = tj.exponential_expansion(network, linearize="detached", top=7, rank="effect")
    paths = expansion(trace, positions=-1).statistics()
    assert [row["path"] for row in found["paths"]] == paths.labels
    for i, row in enumerate(found["paths"]):
        for name in ("effect", "norm", "cosine", "share"):
            assert row[name] == pytest.approx(float(getattr(paths, name)[i, 0, 0]), rel=1e-6, abs=1e-7)
        assert row["top"]["id"] == int(paths.top_ids[i, 0, 0])
    ablated = tj.path_ablation(network, trace, paths.labels)
    falls = [row["path_ablation"] for row in found["paths"]]
    assert falls == pytest.approx((-ablated.centered[:, 0, 0, 0]).tolist(), rel=1e-6)
    assert (found["n_paths"], found["is_exhaustive"], found["position"]) == (256, True, 7)
    # The sums: these, the others, and the model as it says itself.
    assert found["target"]["logit"] == pytest.approx(own_logit(found["answer"]["id"]), rel=1e-5)
    total = found["effect_of_shown"] + found["effect_of_rest"]
    assert total == pytest.approx(found["target"]["logit"], rel=1e-9)
    every = tj.exponential_expansion(network, linearize="detached")(trace, positions=-1).statistics()
    rest = sum(e for e, label in zip(every.effect[:, 0, 0].tolist(), every.labels, strict=True)
               if label not in paths.labels)  # fmt: skip
    assert found["effect_of_rest"] == pytest.approx(rest, rel=1e-4)


def test_components_stand_beside_their_ablation(capsys, network, trace):
    found = numbers(capsys, *ASKED)["components"]
    sums, zeroed = tj.path_sums(network, trace, positions=-1), tj.ablation_effect(network, trace)
    effects = dict(zip(sums.labels, sums.effect[:, 0, 0].tolist(), strict=True))
    falls = dict(zip(zeroed.labels, (-zeroed.centered[:, 0, 0, 0]).tolist(), strict=True))
    assert {row["component"] for row in found["rows"]} == set(effects)
    for row in found["rows"]:
        assert row["effect"] == pytest.approx(effects[row["component"]], rel=1e-6)
        assert row["zero_ablation"] == pytest.approx(falls[row["component"]], rel=1e-6)
    sizes = [abs(row["effect"]) for row in found["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert 0.5 < found["rank_correlation"] < 1


def test_the_table_shows_the_numbers(capsys):
    text = run(capsys, *ASKED, "--top", "4", "--ablate", "--explain")
    found = numbers(capsys, *ASKED, "--top", "4", "--ablate")
    assert max(map(len, text.splitlines())) <= 80
    assert "answer  ·is, what the model says after ·and (position 7)" in text
    assert "The 4 largest of 256 detached paths, by effect" in text
    for row in found["paths"]:
        if len(row["path"]) < 35:
            shown = [f"{row['effect']:+.2f}", f"{row['path_ablation']:+.2f}", row["verdict"], row["top"]["token"]]
            assert cells(text, row["path"]) == [*shown, row["path"]]
    # The README's first path.
    assert cells(text, "embed > 0_mlp > ln_final")[:3] == ["+1.91", "-4.41", "refuted"]
    first = found["components"]["rows"][0]
    row = cells(text, first["component"], "All detached paths through")
    assert row[2:4] == [f"{first['effect']:+.2f}", f"{first['zero_ablation']:+.2f}"]
    for entry in ("effect", "path", "fall", "fall, zeroed"):
        assert any(line.startswith(entry) for line in text.split("How to read this")[1].splitlines()), entry


def test_random_paths_are_the_control(capsys, network, trace):
    found = numbers(capsys, *ASKED, "--top", "5", "--ablate")
    shown = {row["path"]: row for row in found["paths"]}
    control = {row["path"]: row for row in found["control"]}
    assert len(control) == 5 and not shown.keys() & control.keys()
    least = min(abs(row["effect"]) for row in shown.values()) / 10
    every = tj.exponential_expansion(network, linearize="detached")(trace, positions=-1).statistics()
    effects = dict(zip(every.labels, every.effect[:, 0, 0].tolist(), strict=True))
    ablated = tj.path_ablation(network, trace, list(control))
    for i, (path, row) in enumerate(control.items()):
        assert abs(row["effect"]) > least and row["effect"] == pytest.approx(effects[path], rel=1e-5)
        assert row["path_ablation"] == pytest.approx(-float(ablated.centered[i, 0, 0, 0]), rel=1e-6)
    for kind, rows in (("shown", shown), ("random", control)):
        counts = found["ablation"][kind]
        assert counts["n"] == sum(counts[name] for name in ("confirmed", "partly", "refuted")) == 5
        assert counts["confirmed"] == sum(row["verdict"] == "confirmed" for row in rows.values())
    again = numbers(capsys, *ASKED, "--top", "5", "--ablate", "--seed", "1")
    assert {row["path"] for row in again["control"]} != control.keys()


def test_all_paths_are_evaluated_once(capsys, monkeypatch):
    runs, original = [], expansion.evaluate
    monkeypatch.setattr(expansion, "evaluate", lambda *given: (runs.append(1), original(*given))[1])
    assert len(numbers(capsys, *ASKED, "--top", "5", "--ablate")["control"]) == 5 == 5 * len(runs)


def test_a_target_and_a_position_of_ones_own(capsys, network, trace):
    found = numbers(capsys, *ASKED, "--target", "·the", "--position", "3", "--no-components", "--top", "12")
    (token,) = network.tokenizer(" the", add_special_tokens=False)["input_ids"]
    assert found["answer"]["id"] != token == found["target"]["id"]
    assert (found["position"], found["components"]) == (3, None)
    assert found["target"]["logit"] == pytest.approx(own_logit(token, 3), rel=1e-4)
    expansion = tj.exponential_expansion(network, linearize="detached", top=12, rank="effect", targets=[token])
    paths = expansion(trace, positions=3).statistics(targets=[token])
    assert [row["effect"] for row in found["paths"]] == pytest.approx(paths.effect[:, 0, 0].tolist(), rel=1e-6)
    assert "target  ·not, whose logit is explained" in run(capsys, *ASKED, "--target", "·not", "--no-components")


def test_filters_rank_and_granularity(capsys):
    options = (
        "--granularity",
        "head",
        "--through",
        "L1H2",
        "--avoiding",
        "mlp",
        "--sources",
        "embed",
        "--no-components",
    )
    found = numbers(capsys, *ASKED, *options, "--max-length", "2", "--rank", "length", "--top", "50")
    labels = [row["path"] for row in found["paths"]]
    assert found["n_paths"] == len(labels) == 1 + 12  # alone, with one of 4 heads before, or of 8 after
    assert all("L1H2" in label and "mlp" not in label and label.count(">") <= 3 for label in labels)
    norms = [row["norm"] for row in found["paths"]]
    assert norms == sorted(norms, reverse=True)


def test_jets_are_said_to_copy_the_answer(capsys, network, trace):
    options = ("--linearize", "jet", "--order", "1", "--center-scale", "match", "--top", "6")
    found = numbers(capsys, *ASKED, *options)
    expansion = tj.exponential_expansion(network, 1, center_scale="match", top=6, rank="effect")
    paths = expansion(trace, positions=-1).statistics()
    assert [row["effect"] for row in found["paths"]] == pytest.approx(paths.effect[:, 0, 0].tolist(), rel=1e-5)
    assert (found["linearize"], found["order"], found["components"]) == ("jet", 1, None)
    text = run(capsys, *ASKED, *options)
    copies = sum(row["is_answer"] for row in found["paths"])
    assert f"{copies} of 6 paths decode to the model's own answer" in text
    assert "other paths and the remainder" in text and "order-1 jet paths" in text


@pytest.mark.parametrize("filters", [("--max-length", "0"), ("--through", "0_attn"), ("--avoiding", "mlp")])
def test_what_filters_leave_out_is_not_called_other_paths(capsys, filters):
    text = run(capsys, *ASKED, *filters, "--top", "1", "--no-components")
    found = numbers(capsys, *ASKED, *filters, "--top", "1", "--no-components")
    (line,) = [line for line in text.splitlines() if " other paths" in line]
    assert f"{found['n_paths'] - 1:,} other paths and those filtered out" in line
    assert f"of {found['n_paths']} detached paths that the filters keep" in text
    assert "left out" not in run(capsys, *ASKED, "--top", "1", "--no-components")


def test_a_beam_says_what_it_is(capsys):
    options = ("--max-paths", "60", "--top", "3", "--ablate")
    text = run(capsys, *ASKED, *options)
    assert "(beam search)" in text and "no random paths to compare with: drawing them needs all 256 evaluated" in text
    found = numbers(capsys, *ASKED, *options)
    assert found["is_exhaustive"] is False and found["control"] == []


@pytest.mark.parametrize(
    ("effect", "fall", "said"),
    [(2, 1, "confirmed"), (2, 4, "confirmed"), (-2, -1.5, "confirmed"), (2, 0.9, "partly"), (2, 5, "partly"),
     (2, 0.19, "refuted"), (2, -2, "refuted"), (-1, 1, "refuted"), (0, 1, "refuted")],
)  # fmt: skip
def test_verdicts(effect, fall, said):
    assert verdict(float(effect), float(fall)) == said


def test_rank_correlations():
    assert rank_correlation([(1.0, 3.0), (2.0, 5.0), (3.0, 100.0)]) == pytest.approx(1)
    assert rank_correlation([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (4.0, 9.0)]) == pytest.approx(0.2)
    assert rank_correlation([(1.0, 3.0), (2.0, 5.0)]) is None
    assert rank_correlation([(1.0, 3.0), (1.0, 5.0), (1.0, 6.0)]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--through", "9_mlp"), "A filter must name steps, sources, or kinds of them; got '9_mlp'"),
        (("--through", "0_mlp", "--avoiding", "mlp"), "Filters must leave a path"),
        (("--linearize", "jet", "--max-paths", "9"), "At most max_paths = 9 paths are evaluated"),
        (("--target", "no such token"), "no single token reads 'no·such·token'"),
        (("--target", "id:99999"), r"a token's id must lie in 0..4095; got 'id:99999'"),
        (("--target", ""), "a token must not be empty"),
        (("--order", "2"), "these paths are detached: add --linearize jet"),
        (("--renormalize",), "these paths are detached: add --linearize jet"),
        (
            ("--sources", "attn"),
            "Paths start at sources: these must be named, or all that are biases ('bias'); got 'attn'",
        ),
        (("--position", "8"), r"--position must lie in -8..7 for this prompt; got 8"),
    ],
)
def test_what_is_refused(capsys, options, message):
    assert message in run(capsys, *ASKED, *options, status=2)


def test_a_page_holds_the_same(capsys, tmp_path):
    file = tmp_path / "paths.html"
    run(capsys, *ASKED, "--top", "3", "--ablate", "--html", str(file))
    page = file.read_text()
    for part in ("<!DOCTYPE html>", "embed &gt; 0_mlp &gt; ln_final", "refuted", "The control", "How to read this"):
        assert part in page
    assert "://" not in page
