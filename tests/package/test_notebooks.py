"""The demo notebooks run, keep their checks, and what is stored of them is what a reader should get."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
import transformers
import zoo
from nbclient.exceptions import CellExecutionError
from notebooks import MODEL_LINE, ROOT, code, read, run, with_model
from transformer_lens.model_bridge import TransformerBridge

import tl_jets

NOTEBOOKS = sorted((ROOT / "demos").glob("*.ipynb"))
MAX_BYTES = 300_000
OTHER_MODEL = '# model = TransformerBridge.boot_transformers("gpt2")'
BADGE = "https://colab.research.google.com/github/tl-jets/tl-jets/blob/main/demos/{}.ipynb"


def shown(cell: nbformat.NotebookNode) -> list[str | list[str]]:
    """What a cell prints, without its numbers, whose last digits depend on the machine, and the kinds of what it shows."""
    texts = [re.sub(r"[-+]?\d[\d.,e+-]*", "#", x.text) for x in cell.outputs if x.get("name") == "stdout"]
    return ["".join(texts), *(_kinds(output.data) for output in cell.outputs if "data" in output)]


def _kinds(data: dict[str, str]) -> list[str]:
    """The kinds of an output; a view of circuitsvis has 1.4 MB of script, which is not stored."""
    is_script = 'sandbox="allow-scripts"' in data.get("text/html", "")
    return sorted(data.keys() - {"text/html"} if is_script else data)


def tiny_gpt2() -> TransformerBridge:
    """A random GPT-2 (layer norms, biases, learned positions) with the tokenizer of the embedded model."""
    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=24, n_layer=3, n_head=2, n_inner=40, attn_implementation="eager"
    )
    model = transformers.GPT2LMHeadModel(config)
    model.config.architectures = ["GPT2LMHeadModel"]
    zoo.randomize(model, 0)
    tokenizer = tl_jets.load_tinydocs().tokenizer
    return TransformerBridge.boot_transformers("tiny-gpt2", hf_model=model.eval(), tokenizer=tokenizer, device="cpu")


def test_there_are_notebooks():
    assert {
        "Circuitsvis",
        "Detached_Jacobian",
        "Findings",
        "Flow",
        "Jet_Lens",
        "Jet_Ngrams",
        "Jet_Paths",
        "Jets_with_Patching",
    } == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert path.stat().st_size <= MAX_BYTES
    first, cells = notebook.cells[0], code(notebook)
    assert first.cell_type == "markdown" and first.source.startswith("# ") and BADGE.format(path.stem) in first.source
    assert '"google.colab" in sys.modules' in cells[0].source and "%pip install" in cells[0].source
    # One line decides about the model, and another model is one line away.
    loading = [line for cell in cells for line in cell.source.splitlines() if re.match(r"#? ?model = ", line)]
    assert loading == [MODEL_LINE, OTHER_MODEL]
    # Run from top to bottom, without a warning, on no particular machine.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    stored = json.dumps(outputs)
    assert not re.search(r"https?://(unpkg|cdn)", stored), "what is shown asks no network: tj.to_circuitsvis"
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/|[A-Z]:\\\\\\\\|Warning", stored)
    # It ends in checks.
    headings = [line for cell in notebook.cells for line in cell.source.splitlines() if line.startswith("## ")]
    assert headings[-1] == "## Checks"
    start = next(i for i, cell in enumerate(notebook.cells) if "## Checks" in cell.source.splitlines())
    checks = "\n".join(cell.source for cell in notebook.cells[start:] if cell.cell_type == "code")
    assert len(re.findall(r"^\s*assert ", checks, re.MULTILINE)) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch):
    """Its checks are in the notebook itself; so is what it shows, which must be there again."""
    stored, found = code(read(path)), code(run(read(path), monkeypatch))
    for before, after in zip(stored, found, strict=True):
        assert shown(before) == shown(after), before.source


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_it_is_not_about_the_embedded_model_alone(name, monkeypatch):
    """Another architecture, with random weights: every cell runs and every check holds."""
    notebook = read(ROOT / "demos" / f"{name}.ipynb")
    run(with_model(notebook, "__import__('test_notebooks').tiny_gpt2()"), monkeypatch)


# A one-percent error in what the notebook is about, which no self-check of the library sees.
NORM_JET = """
import dataclasses, tl_jets.lenses.iterative as broken
own = broken.norm_jet
def norm_jet(*args):
    found = own(*args)
    return dataclasses.replace(found, beta=1.01 * found.beta)
broken.norm_jet = norm_jet
"""
EFFECTS = """
from tl_jets.core.attribution import LogitAttribution
own = LogitAttribution.effects
LogitAttribution.effects = lambda attribution, parts: 1.01 * own(attribution, parts)
"""
STEERED = """
from tl_jets.interventions.steering import _Steering
own = _Steering._map
_Steering._map = lambda steering, positions: 1.01 * own(steering, positions)
"""
FLOWS = """
import dataclasses, tl_jets.flows.sweep as broken
own = broken._Sweep.result
broken._Sweep.result = lambda sweep: dataclasses.replace(found := own(sweep), flow=1.01 * found.flow)
"""
SHARES = """
import tl_jets.flows.joint as broken
own = broken._Doses.gradients
broken._Doses.gradients = lambda *args: own(*args).roll(1, 0)
"""
CHECKS = """
import tl_jets.flows.sweep as broken
own = broken.path_patched
def path_patched(*args):
    found = own(*args)
    found.check.restored *= 1.01
    return found
broken.path_patched = path_patched
"""
TRIGRAMS = """
from tl_jets.ngrams.join import HeadMaps
own = HeadMaps.exact
def exact(*args):
    attention, log_prob = own(*args)
    return 1.01 * attention, log_prob
HeadMaps.exact = exact
"""


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Circuitsvis", EFFECTS),
        ("Detached_Jacobian", STEERED),
        ("Findings", EFFECTS),
        ("Flow", FLOWS),
        ("Flow", SHARES),
        ("Flow", CHECKS),
        ("Jet_Lens", NORM_JET),
        ("Jet_Ngrams", TRIGRAMS),
        ("Jet_Paths", EFFECTS),
        ("Jets_with_Patching", EFFECTS),
    ],
)
def test_the_checks_can_fail(name, error, monkeypatch):
    notebook = read(ROOT / "demos" / f"{name}.ipynb")
    code(notebook)[0].source += error
    with pytest.raises(CellExecutionError, match="AssertionError") as found:
        run(notebook, monkeypatch)
    assert code(notebook)[-1].source in str(found.value), "it runs as far as the checks"
