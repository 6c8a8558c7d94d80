"""demos/Flow.ipynb on SmolLM2: all its checks hold, its text says what comes out, and Hugging Face's own model agrees."""

from __future__ import annotations

import copy
import json
import re

import nbformat
import numpy as np
import pytest
import torch
from notebooks import ROOT, code, read, run, with_model

pytestmark = pytest.mark.real

SECTION = "## The same on SmolLM2-135M"
# What the cells found, for the comparisons below.
SHOW = """
import json
own = {"rows": rows, "heads": heads, "scores": scores, "answers": [model.to_string(j.target_ids.flatten()) for j in found_together]}
own |= {"story": story, "tokens": model.to_tokens(story[0]).tolist(), "repr": repr(found), "prompt": prompt, "ablated": ablated}
own |= {name: getattr(found_together[0], name).flatten().tolist() for name in ("share", "single", "gradient")}
own |= {"flow_tokens": model.to_tokens(prompt).tolist(), "effect": float(found.effect), "target": answer}
own |= {"top": found.top(1).component[0]}
own |= {"best": float(np.min(shuffled)), "spearman": agreement.spearman, "error": agreement.relative_error, "mediators": len(check)}
print(json.dumps(own))
"""


@pytest.fixture(scope="module")
def notebook():
    return read(ROOT / "demos" / "Flow.ipynb")


@pytest.fixture(scope="module")
def found(notebook, folder):
    """The notebook's own checks are asserts in its last cell."""
    own = with_model(copy.deepcopy(notebook), f"TransformerBridge.boot_transformers({str(folder)!r}, device='cpu')")
    own.cells.append(nbformat.v4.new_code_cell(SHOW))
    with pytest.MonkeyPatch.context() as patch:
        executed = run(own, patch)
    assert "all checks passed" in code(executed)[-2].outputs[-1].text
    return json.loads(code(executed)[-1].outputs[-1].text)


@pytest.fixture(scope="module")
def text(notebook):
    return next(cell.source for cell in notebook.cells if cell.source.startswith(SECTION))


def test_the_table_is_what_comes_out(text, found):
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ...")
    ]
    assert len(lines) == len(found["rows"]) == 3
    for line, row in zip(lines, found["rows"], strict=True):
        assert row["prompt"].strip() in line[0] and row["verdict"] == line[-1]
        wanted = [row[name] for name in ("together", "one by one", "gradient", "random, largest")]
        assert [float(cell) for cell in line[1:-1]] == pytest.approx(wanted, abs=0.0051)
        assert row["shares"] == pytest.approx(row["together"], rel=1e-3)


def test_the_sentences_are_what_comes_out(text, found):
    heads, numbers = (
        found["heads"],
        dict(zip(found["heads"], zip(found["share"], found["single"], strict=True), strict=True)),
    )
    assert f"Eight heads have a score above 0.4: {', '.join(heads)}." in text and len(heads) == 8
    assert sorted(found["scores"], key=found["scores"].get)[-9:][::-1][8] not in heads
    assert (
        found["answers"][0] == "rel"
        and "(`rel`)" in text
        and f"{-found['rows'][0]['together']:.2f} of the answer" in text
    )
    shares = re.findall(r"(L\d+H\d) ([-+]\d\.\d\d)", text)
    assert [head for head, _ in shares] == sorted(heads, key=lambda head: numbers[head][0])[:4]
    assert all(float(said) == pytest.approx(numbers[head][0], abs=0.0051) for head, said in shares)
    harmful = {head: alone for head, (_, alone) in numbers.items() if alone > 0.3}
    assert list(harmful) == ["L17H4", "L17H5"] and "({:+.2f}, {:+.2f})".format(*harmful.values()) in text
    said = f"`{found['ablated']}` moves the answer's logit (` Windows`) by {found['effect']:+.2f}; gap"
    assert said in text and f"{found['mediators']} mediators: Spearman {found['spearman']:.2f}" in text
    assert f"relative error {found['error']:.2f} (random orders:\n  {found['best']:.2f} at best)" in text
    gap, passes, sizes = re.search(
        r"gap ([\d.]+%) of the effect, ([\d.]+ passes).* add up to ([\d.]+) times", found["repr"]
    ).groups()
    assert f"gap {gap}, {passes}." in text and f"their sizes add up to {sizes} times the effect" in text
    assert found["top"] == f"{found['ablated']}_out"


def test_effects_and_shares_are_those_of_hugging_face(found, reference):
    """Heads are scaled in front of the output projection, at numpy's nodes along the dose of all."""
    heads, tokens = found["heads"], torch.tensor(found["tokens"])
    size = reference.hf.config.hidden_size // reference.hf.config.num_attention_heads
    answer = int(reference.run(tokens)[1][-1].argmax())

    def centered(doses):
        def scale(layer):
            def hook(module, args):
                kept = torch.ones_like(args[0])
                for dose, head in zip(doses, heads, strict=True):
                    if head.startswith(f"L{layer}H"):
                        place = slice(int(head.split("H")[1]) * size, (int(head.split("H")[1]) + 1) * size)
                        kept[..., place] = 1 - dose
                return (args[0] * kept,)

            return hook

        layers = sorted({int(head[1:].split("H")[0]) for head in heads})
        handles = [reference.layers[i].self_attn.o_proj.register_forward_pre_hook(scale(i)) for i in layers]
        try:
            logits = reference.hf(tokens).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()
        return logits[answer] - logits.mean()

    def slopes(dose):
        with torch.enable_grad():
            doses = torch.full((len(heads),), dose, requires_grad=True)
            return torch.autograd.grad(centered(doses), doses)[0].double().numpy()

    with torch.no_grad():
        clean = float(centered(torch.zeros(len(heads))))
        assert float(centered(torch.ones(len(heads)))) - clean == pytest.approx(found["rows"][0]["together"], abs=2e-3)
        alone = [float(centered(one)) - clean for one in torch.eye(len(heads))]
    places, weights = np.polynomial.legendre.leggauss(16)
    shares = sum(w / 2 * slopes((x + 1) / 2) for x, w in zip(places, weights, strict=True))
    assert found["single"] == pytest.approx(alone, abs=2e-3)
    assert found["gradient"] == pytest.approx(slopes(0.0).tolist(), abs=2e-3)
    assert found["share"] == pytest.approx(shares.tolist(), abs=0.02)


def test_the_flow_is_of_an_effect_of_hugging_face(found, reference):
    tokens, layer = torch.tensor(found["flow_tokens"]), int(found["ablated"].split("_")[0])

    def zero(module, args, out):
        return torch.cat([out[:, :1], torch.zeros_like(out[:, 1:])], 1)

    before, after = (reference.run(tokens, hooks)[1][-1] for hooks in ((), [(reference.layers[layer].mlp, zero)]))
    change = after - before
    assert int(before.argmax()) == found["target"]
    assert found["effect"] == pytest.approx(float(change[found["target"]] - change.mean()), abs=1e-3)
