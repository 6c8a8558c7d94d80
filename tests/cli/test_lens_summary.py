"""The first answer of `tl-jets lens`: one screen, with the lenses' own numbers and the verdict first."""

from __future__ import annotations

import commands
import pytest
import torch
import zoo

import tl_jets as tj
from tl_jets import cli
from tl_jets.cli.session import UsageError, read_layers
from tl_jets.core.numerals import number, signed
from tl_jets.core.tokens import token_text, visible

COLUMNS = 100
PROMPT = "Once upon a time, there was a little girl named Lily. She"
ASKED = ("lens", "--model", "stories", "--prompt", PROMPT)

pytestmark = pytest.mark.skipif(zoo.STORIES is None, reason="stories260K is not beside this checkout")


@pytest.fixture
def stories():
    return zoo.load_stories("bridge")


def test_the_first_answer_is_one_screen_of_the_lenses_own_numbers(capsys, stories):
    shown = commands.run(capsys, *ASKED)
    lines = shown.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    network = tj.ResidualNetwork(stories)
    draws = [tj.iterative_jet_lens(network, PROMPT, positions=-1, seed=seed) for seed in range(8)]
    lens, controls = draws[0], [own.control.kl for own in draws[1:]]
    verdict = lens.verdict(controls=controls)
    spoken = " ".join(verdict.lines)
    assert " ".join(shown.split()).startswith(spoken)
    middle = torch.stack([own.control.kl[:, :, 0, 0] for own in draws]).double().quantile(0.5, 0)
    for i, label in enumerate(lens.labels):
        found = commands.cells(shown, label, "What each layer says")
        assert found[1] == number(lens.rho[i, 0, 0])
        for k, column in enumerate((2, 4)):
            kl = float(lens.kl[i, k, 0, 0])
            own = i < len(lens.labels) - 1 and bool(verdict.own[i, k])
            assert found[column] == f"{number(kl)} ({number(middle[i, k])}){'*' if own else ''}"
    effects = tj.joint_jet_lens(network, PROMPT, positions=-1, linearize="detached").effects[:, 0, 0, 0]
    logits = stories(PROMPT)[0, -1].double()
    assert commands.cells(shown, f"all {len(effects)}")[1] == signed(logits.max() - logits.mean())
    assert commands.cells(shown, "3_mlp_out", "What components add")[1] == signed(effects[8])


def test_the_rest_is_shown_on_request(capsys, stories):
    plain = commands.run(capsys, *ASKED)
    averages, explained, every = (commands.run(capsys, *ASKED, f"--{more}") for more in ("averages", "explain", "all"))
    assert "Averages over" not in plain and "How to read this" not in plain
    assert "Averages over" in averages and "How to read this" not in averages
    assert "How to read this" in explained and "Averages over" not in explained
    for part in ("Iterative jet lens", "Joint jet lens", "Averages over", "How to read this"):
        assert part in every
    # The first answer's numbers do not depend on what else is computed.
    assert averages.startswith(plain.rstrip())


def test_layers_are_ranges(capsys, stories):
    shown = commands.run(capsys, *ASKED, "--layers", "1:3")
    labels = [line.split()[0] for line in shown.splitlines() if "_pre " in line and line[0].isdigit()]
    assert labels == ["1_pre", "2_pre"]
    assert read_layers(["20:30", "-1", "3_mid"], 30) == [*range(20, 30), -1, "3_mid"]
    assert read_layers(["28:"], 30) == [28, 29, 30] and read_layers([":-29"], 30) == [0, 1]
    assert read_layers(None, 30) is None
    with pytest.raises(UsageError, match=r"--layers 7:7 names no layer of 0\.\.30"):
        read_layers(["7:7"], 30)


def test_targets_have_their_contributions(capsys, stories):
    shown = commands.run(capsys, *ASKED, "--target", "was")
    token = stories.tokenizer("was", add_special_tokens=False)["input_ids"][0]
    assert f"What components add to the centered logit of {visible(token_text(stories.tokenizer, token))}" in shown
    logits = stories(PROMPT)[0, -1].double()
    assert commands.cells(shown, "all 12", "What components add")[1] == signed(logits[token] - logits.mean())
    assert "Targets: rank" in shown


def test_components_are_decoded_where_they_are_read(capsys, monkeypatch, stories):
    """The first answer decodes a few components at one position, the whole one all of them at that position alone."""
    rows = []
    original = tj.lenses.joint.top_tokens

    def counted(decoder, states, *arguments, **options):
        rows.append(states.shape[:-1].numel())
        return original(decoder, states, *arguments, **options)

    monkeypatch.setattr(tj.lenses.joint, "top_tokens", counted)
    assert cli.main([*ASKED]) == 0
    assert rows == [8]
    rows.clear()
    assert cli.main([*ASKED, "--all"]) == 0
    assert rows == [11]
    capsys.readouterr()
