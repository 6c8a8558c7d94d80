"""`tl-jets flow`: what it prints and writes is what flows and joint flows are; open effects are said to be open."""

from __future__ import annotations

import pytest
import torch
from commands import cells, numbers, run, tinydocs

import tl_jets as tj
from tl_jets.core.numerals import number, signed
from tl_jets.core.tokens import token_text, visible

COLUMNS = 100

PROMPT = "This function is available on Unix and"
ASKED = ("flow", "--prompt", PROMPT)
HEADS = ["L0H1", "L1H2", "L2H3"]


@torch.no_grad()
def difference(hooks) -> float:
    """The change of the clean run's best logit, less that of the vocabulary's mean, from the model alone."""
    clean = tinydocs()(PROMPT)[0, -1].double()
    answer = int(clean.argmax())
    with tinydocs().hooks(fwd_hooks=hooks):
        other = tinydocs()(PROMPT)[0, -1].double()
    return float((other - other.mean())[answer] - (clean - clean.mean())[answer])


def test_the_numbers_are_those_of_the_flow(capsys, network):
    data = numbers(capsys, *ASKED, "--ablate", "0_mlp", "1_attn", "--check", "2")
    hooks = tj.ablation_hooks(network, ["0_mlp", "1_attn"])
    found = tj.flow(network, PROMPT, hooks, by_position=True, check=2)
    assert data["command"] == "flow" and data["is_closed"] is True
    assert data["effect"] == pytest.approx(difference(hooks), rel=1e-3)
    assert [row["component"] for row in data["components"]] == found.labels
    assert [row["flow"] for row in data["components"]] == pytest.approx(
        found.flow.flatten().tolist(), rel=1e-4, abs=1e-5
    )
    for row in data["components"]:
        assert sum(at["flow"] for at in row["by_position"]) == pytest.approx(row["flow"], rel=1e-4, abs=1e-5)
        tokens = [visible(token_text(network.tokenizer, int(i))) for i in network.trace(PROMPT).tokens[0]]
        assert [at["token"] for at in row["by_position"]] == tokens
    # Flows from the intervention, and those to the final norm, add up to what the model did.
    for part in ("edit", "direct"):
        assert sum(row[part] for row in data["components"]) == pytest.approx(data["effect"], rel=0.011)
    assert data["check"]["mediators"] == len(data["check"]["rows"]) == 4
    assert data["check"]["spearman"] == pytest.approx(float(found.agreement()["spearman"].iloc[0]), abs=1e-6)


@torch.no_grad()
def model_readings(step):
    """Logit and probability of the answer with and without a step, by the model itself."""
    clean = tinydocs()(PROMPT)[0, -1].double()
    other = tinydocs().run_with_hooks(PROMPT, fwd_hooks=tj.ablation_hooks(tinydocs(), step))[0, -1].double()
    token = int(clean.argmax())
    return [(float(own[token]), float(own.softmax(-1)[token])) for own in (clean, other)]


@pytest.mark.parametrize(("columns", "step"), [("80", "0_mlp"), ("100", "2_attn")])
def test_what_is_printed_fits_a_screen(capsys, monkeypatch, network, columns, step):
    monkeypatch.setenv("COLUMNS", columns)
    text = run(capsys, *ASKED, "--ablate", step, "--check", "2", "--top", "5")
    lines = text.splitlines()
    assert max(map(len, lines)) <= int(columns) and len(lines) <= 45
    found, said = tj.flow(network, PROMPT, tj.ablation_hooks(network, step), check=2), " ".join(text.split())
    assert (
        f"moves by {float(found.effect):+.2f}" in said
        and "Closed: gap" in said
        and f"Path patching of {found.check['component'].nunique()} mediators" in said
    )
    clean, other = model_readings(step)
    assert (
        f"Its logit goes from {number(clean[0])} to {number(other[0])}, its probability from {clean[1]:.1%} to {other[1]:.1%}."
        in said
    )
    checked = found.check.set_index("component")
    largest = found.top(5)
    for row in largest.itertuples():
        edited = row.component == f"{step}_out"
        shown = cells(text, f"{row.component}{' (edited)' if edited else ''}", "The components")
        values = [
            f"{row.flow:+.2f}",
            *([] if float(found.cancellation) > 3 else [f"{row.share:+.0%}"]),
            f"{row.direct:+.2f}",
        ]
        if row.component in checked.index:
            values += [signed(checked.loc[row.component, end]) for end in ("restored", "moved")]
        assert shown[1 : len(values) + 1] == values
    assert cells(text, f"all {len(found.labels)}", "The components")[-1] == f"{float(found.effect):+.2f}"


@pytest.mark.parametrize(("acts", "count"), [(["--ablate", "0_mlp"], 2), (["--joint", "0_mlp", "--controls", "0"], 1)])
def test_no_forward_pass_is_made_for_the_readings(capsys, monkeypatch, network, acts, count):
    """Two whole passes, clean and ablated, the third of an ablation ends at the last hooked block; a joint flow replays."""
    passes, forward = [], type(network.view).forward
    monkeypatch.setattr(
        type(network.view), "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    )
    data = numbers(capsys, *ASKED, *acts)
    assert len(passes) == count
    for own, name in enumerate(("logit", "probability")):
        assert data["readings"][name] == pytest.approx([values[own] for values in model_readings("0_mlp")], abs=1e-4)


def test_an_open_effect_is_said_and_no_flow_is_shown(capsys, network):
    text = run(capsys, *ASKED, "--ablate", "0_mlp", "--nodes", "1")
    with pytest.warns(UserWarning, match="stay open"):
        found = tj.flow(network, PROMPT, tj.ablation_hooks(network, "0_mlp"), nodes=1)
    assert not bool(found.closed)
    assert "OPEN: gap" in text and "explain nothing" in text and "The components" not in text
    assert numbers(capsys, *ASKED, "--ablate", "0_mlp", "--nodes", "1")["is_closed"] is False


def test_the_first_position_can_be_left_as_it_is(capsys, network):
    length = network.trace(PROMPT).tokens.shape[1]
    hooks = tj.ablation_hooks(network, "0_mlp", positions=list(range(1, length)))
    kept, whole = (numbers(capsys, *ASKED, "--ablate", "0_mlp", *more) for more in (["--keep-bos"], []))
    assert kept["effect"] == pytest.approx(difference(hooks), rel=1e-3)
    assert kept["components"][0]["by_position"][0]["flow"] == 0 != whole["components"][0]["by_position"][0]["flow"]


@torch.no_grad()
def test_another_prompt_and_a_logit_difference(capsys, network):
    corrupted = "This function is available on Windows and"
    asked = ("--corrupted", corrupted, "--target", " Windows", "--against", " the")
    data = numbers(capsys, *ASKED, *asked, "--granularity", "head")
    ids = [data["target"]["id"], data["against"]["id"]]
    values = [tinydocs()(prompt)[0, -1, ids].double() for prompt in (PROMPT, corrupted)]
    change = float((values[1] - values[0])[0] - (values[1] - values[0])[1])
    assert data["effect"] == pytest.approx(change, rel=1e-3) and data["measure"] == "logit difference"
    labels = [row["component"] for row in data["components"]]
    assert labels[0] == "embed" and any(label.startswith("L3H") for label in labels)
    assert "the prompt 'This function is available on Windows and'" in run(capsys, *ASKED, *asked)


def test_a_cancelling_effect_shows_no_shares(capsys, network):
    """Of ablations on both sides of the limit, only the one whose direct parts cancel is said to, and loses its shares."""
    said = {}
    for step in network.steps[:-1]:
        options = [*ASKED, "--ablate", step.label]
        data = numbers(capsys, *options)
        direct = [row["direct"] for row in data["components"]]
        index = sum(map(abs, direct)) / abs(sum(direct))
        assert data["cancellation"] == pytest.approx(index, rel=1e-6)
        if bool(index > 3) in said or not data["is_closed"]:
            continue
        text = run(capsys, *options)
        assert ("parts cancel" in text) == (index > 3) and (" share " in text.split("How to read")[0]) == (index <= 3)
        said[bool(index > 3)] = step.label
    assert len(said) == 2


@torch.no_grad()
def test_the_divergence_of_the_whole_prediction(capsys):
    data = numbers(capsys, *ASKED, "--ablate", "0_mlp", "--measure", "kl")
    clean = tinydocs()(PROMPT)[0, -1].double().log_softmax(-1)
    with tinydocs().hooks(fwd_hooks=tj.ablation_hooks(tinydocs(), "0_mlp")):
        other = tinydocs()(PROMPT)[0, -1].double().log_softmax(-1)
    assert data["effect"] == pytest.approx(float((clean.exp() * (clean - other)).sum()), rel=1e-3)
    assert data["unit"] == "nats" and data["target"] is None


def test_a_mean_ablation_reads_its_reference(capsys, network, tmp_path):
    file = tmp_path / "reference.txt"
    file.write_text("A list of names\nThe file is opened in\n")
    data = numbers(capsys, *ASKED, "--ablate", "0_mlp", "--mode", "mean", "--reference", str(file))
    hooks = tj.ablation_hooks(network, "0_mlp", mode="mean", reference=["A list of names", "The file is opened in"])
    assert data["effect"] == pytest.approx(difference(hooks), rel=1e-3)


def test_joint_flow_divides_the_effect(capsys, network):
    data = numbers(capsys, *ASKED, "--joint", *HEADS, "--controls", "2")
    found = tj.joint_flow(network, PROMPT, HEADS, controls=2)
    assert data["effect"] == pytest.approx(difference(tj.ablation_hooks(network, HEADS)), rel=1e-3)
    assert sum(row["share"] for row in data["components"]) == pytest.approx(data["effect"], rel=1e-3)
    for row, head in zip(data["components"], HEADS, strict=True):
        assert row["component"] == head
        assert row["single"] == pytest.approx(difference(tj.ablation_hooks(network, head)), rel=1e-2, abs=1e-4)
    assert [row["effect"] for row in data["controls"]] == pytest.approx(found.control.flatten().tolist(), abs=1e-5)
    text = run(capsys, *ASKED, "--joint", *HEADS, "--controls", "0")
    assert "No random sets to compare with" in text and "Closed: gap" in text
    assert cells(text, "sum", "Components ablated together")[1] == f"{float(found.effect):+.2f}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of --ablate, --corrupted and --joint says what is done to the model; got none"),
        (["--ablate", "0_mlp", "--joint", "L0H1"], "got --ablate and --joint"),
        (["--joint", "L0H1", "--check", "3"], "--check goes with --ablate or --corrupted, not with --joint"),
        (["--corrupted", PROMPT, "--keep-bos"], "--keep-bos goes with --ablate or --joint"),
        (["--ablate", "0_mlp", "--mode", "mean"], "need --reference FILE"),
        (["--ablate", "9_mlp"], "9_mlp"),
        (["--corrupted", "Too short"], "the same numbers of prompts and tokens"),
        (["--ablate", "0_mlp", "--against", "id:4", "--measure", "kl"], "measure='kl'"),
    ],
)
def test_bad_requests_are_one_line(capsys, options, message):
    assert message in run(capsys, *ASKED, *options, status=2)


def test_a_page_holds_components_and_positions(capsys, tmp_path):
    file = tmp_path / "page.html"
    run(capsys, *ASKED, "--ablate", "0_mlp", "--check", "1", "--html", str(file))
    page, _ = file.read_text().split("</main>")  # the rest is the script that draws
    assert "Path patching, one component at a time" in page and "://" not in page and "Unix" in page
    assert page.count('<div class="explorer">') == 1 and '"flow"' in page
