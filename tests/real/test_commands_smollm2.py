"""Each command without options on SmolLM2: one screen with a verdict and what to run next, and Hugging Face's numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tl_jets import cli
from tl_jets.cli import session

pytestmark = pytest.mark.real

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(autouse=True)
def _shared_model(network, monkeypatch, tmp_path):
    """One process, one model: the commands load that of the tier."""
    monkeypatch.setattr(session, "load_model", lambda name: network.view.model)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def answered(capsys, command: str, *options: str) -> tuple[str, dict]:
    """What a command prints, which fits a screen, and its numbers."""
    prompt = () if command == "ngrams" else ("--prompt", PROMPT)
    assert cli.main([command, "--model", "smollm2", *prompt, *options, "--json", "found.json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.rstrip().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100, shown.out
    heading = lines.index(f"tl-jets {command}")
    assert heading > 0, "a verdict in words comes first"
    assert "How to read this" not in shown.out and ": " in lines[-1], "what to run next comes last"
    return shown.out, json.loads(Path("found.json").read_text())


def beyond_mean(logits: torch.Tensor, token: int) -> float:
    return float(logits[token] - logits.mean())


def without(reference, tokens, module) -> torch.Tensor:
    """Logits at the end if a module writes zero."""

    def zero(_, __, out):
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    return reference.run(tokens, [(module, zero)])[1][-1]


def test_paths(capsys, trace, reference):
    text, found = answered(capsys, "paths")
    clean = reference.run(trace.tokens)[1][-1]
    answer, logit = found["target"]["id"], beyond_mean(clean, int(clean.argmax()))
    assert answer == int(clean.argmax()) and found["target"]["logit"] == pytest.approx(logit, abs=1e-3)
    assert text.startswith("The 20 largest of 1.15e18 paths give +2.0") and "--ablate" in text
    rows = {row["component"]: row for row in found["components"]["rows"]}
    for label, module in (("1_attn", reference.layers[1].self_attn), ("8_mlp", reference.layers[8].mlp)):
        fall = logit - beyond_mean(without(reference, trace.tokens, module), answer)
        assert rows[label]["zero_ablation"] == pytest.approx(fall, abs=2e-3)


def test_flow(capsys, trace, reference):
    text, found = answered(capsys, "flow", "--ablate", "8_mlp")
    clean = reference.run(trace.tokens)[1][-1]
    answer = int(clean.argmax())
    ablated = without(reference, trace.tokens, reference.layers[8].mlp)
    effect = beyond_mean(ablated, answer) - beyond_mean(clean, answer)
    assert found["effect"] == pytest.approx(effect, abs=2e-3) and found["is_closed"]
    assert sum(row["direct"] for row in found["components"]) == pytest.approx(effect, abs=2e-3)
    assert text.startswith(f"The centered logit of ·Paris moves by {effect:+.2f}") and "Its parts cancel" in text


def test_jacobian(capsys, trace, reference):
    text, found = answered(capsys, "jacobian")
    clean = reference.run(trace.tokens)[1][-1]
    total = sum(row["effect"] for row in found["tokens"]) + found["bias"]["effect"]
    assert total == pytest.approx(beyond_mean(clean, int(clean.argmax())), abs=2e-3)
    assert found["reconstruction_error"] < 1e-4 < 0.5 < found["ordinary_error"]
    norms = [row["norm"] for row in found["tokens"]]
    assert found["value"]["norm"] == pytest.approx(float(clean.norm()), rel=1e-4) and norms[0] == max(norms)
    assert "a linear map" in text and "<|im_start|> (position 0) gives most" in text


def test_explore(capsys, trace, reference):
    text, found = answered(capsys, "explore")
    streams, clean = reference.run(trace.tokens)
    lens, answer = found["iterative"], int(clean[-1].argmax())
    truth = clean.log_softmax(-1)
    for layer in (5, 20, 29):
        logits = reference.normed(streams[layer]) @ reference.W_U
        kl = (truth.exp() * (truth - logits.log_softmax(-1))).sum(-1)
        assert lens["measures"]["kl"][layer][0][0] == pytest.approx(kl.tolist(), rel=5e-3, abs=2e-3)
        rank = int((logits[-1] > logits[-1, answer]).sum())
        assert abs(lens["target_ranks"][layer][0][0][-1][0] - rank) <= 1 + rank // 100
    effects = [row[0][-1][0] for row in found["joint"]["effects"]]
    assert sum(effects) == pytest.approx(beyond_mean(clean[-1], answer), abs=0.02)  # a page rounds
    assert text.startswith("The answer ·Paris leads at the end only") and "29_mlp_out +3.29" in text
    assert os.path.getsize("explore.html") > 400_000


def test_ngrams(capsys, network, reference):
    """All MLPs after 4,096 first tokens."""
    text, found = answered(capsys, "ngrams")
    (table,) = found["tables"].values()
    assert list(found["tables"]) == ["mlps"] and len(table["rows"]) == 20
    firsts = torch.tensor([row["ids"][0] for row in table["rows"]])
    with torch.no_grad():
        x = reference.hf.model.embed_tokens(firsts)
        for layer in reference.layers:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    scores = (reference.normed(x.double()) @ reference.W_U).log_softmax(-1)
    for i, row in enumerate(table["rows"]):
        assert row["score"] == pytest.approx(float(scores[i, row["ids"][1]]), rel=1e-3, abs=1e-3)
    assert text.startswith("The 20 best bi-grams of mlps end in") and "--path all" in text
    assert table["settings"]["rows"]["count"] == 4096 and "after 4,096 first tokens" in text
    _, after = answered(capsys, "ngrams", "--token", " Paris")
    assert list(after["tables"]) == ["direct", "mlps"]
    (paris,) = reference.tokenizer(" Paris")["input_ids"]
    embedding = reference.hf.model.embed_tokens.weight[paris].detach().double()
    direct = (reference.normed(embedding) @ reference.W_U).log_softmax(-1)
    for row in after["tables"]["direct"]["rows"]:
        assert row["score"] == pytest.approx(float(direct[row["ids"][1]]), rel=1e-3, abs=1e-3)
