"""`tl-jets explore`: the page is that of the view, its numbers those of the tools, and what cannot be done is refused."""

from __future__ import annotations

import json

import pytest

import tl_jets as tj
import tl_jets.cli

PROMPT = "This function is available on Unix and"


def explore(*options):
    return tl_jets.cli.main(["explore", "--prompt", PROMPT, *options])


def test_it_writes_a_page_and_its_numbers(tmp_path, capsys):
    page, numbers = tmp_path / "page.html", tmp_path / "page.json"
    asked = ("--ablate", "0_mlp", "--keep-bos", "--order", "2", "--html", str(page), "--json", str(numbers))
    assert explore(*asked) == 0
    shown = capsys.readouterr().out
    document, data = page.read_text(), json.loads(numbers.read_text())
    assert "page.ht" in shown and "0_mlp: " in shown
    assert data["command"] == "explore" and data["iterative"]["orders"] == [0, 1, 2] and data["prompt"] == PROMPT
    network = tj.ResidualNetwork(tj.load_tinydocs())
    hooks = tj.ablation_hooks(network, "0_mlp", positions=range(1, network.trace(PROMPT).tokens.shape[1]))
    found = tj.flow(network, PROMPT, hooks)
    (own,) = data["flow"]["effects"]
    assert own["effect"] == pytest.approx(float(found.effect), rel=1e-4) and own["closed"]
    lens = tj.iterative_jet_lens(network, PROMPT, order=2)
    assert data["iterative"]["measures"]["kl"][1][2][0] == pytest.approx(lens.kl[1, 2, 0].tolist(), rel=1e-4)
    assert document.startswith("<!DOCTYPE html>") and PROMPT in document


def test_without_a_file_it_writes_explore_html(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert explore("--bigrams", "none") == 0
    assert (tmp_path / "explore.html").stat().st_size > 400_000 and "explore.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--keep-bos",), "--keep-bos goes with --ablate"),
        (("--ablate", "9_mlp"), "9_mlp"),
        (("--bigrams", "1_attn"), "1_attn"),
    ],
)
def test_what_it_refuses(options, message, tmp_path, capsys):
    assert explore(*options, "--html", str(tmp_path / "x.html")) == 2
    assert message in capsys.readouterr().err
