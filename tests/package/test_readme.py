"""The README's Python runs, in the order in which it stands there; its files are there, and it has two screens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformer_lens.model_bridge import TransformerBridge

import tl_jets

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch):
    """As they stand but for the model, which is not on this machine: the embedded one takes its place."""
    monkeypatch.chdir(tmp_path)  # some write files
    model = tl_jets.load_tinydocs()
    monkeypatch.setattr(TransformerBridge, "boot_transformers", {"gpt2": model}.__getitem__)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    trace = names["network"].trace(names["prompt"])
    centered = trace.logits[0].max(-1).values - trace.logits[0].mean(-1)
    assert names["parts"].effects.sum(0)[0, :, 0].tolist() == pytest.approx(centered.tolist(), rel=1e-3, abs=1e-3)
    flow = names["flow"]
    assert bool(flow.closed.all()) and float(flow.edit.sum()) == pytest.approx(float(flow.effect), rel=0.011)


def test_files_and_tools_that_it_names_are_there():
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!http)(\S+?)\)", README)]
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)
    table = README[README.index("| question | tool |") : README.index("[Which tool when]")]
    tools = re.findall(r"`(\w+)(?:\(.*?\))?`", table)
    assert len(tools) > 20 and set(tools) <= set(tl_jets.__all__)


def test_it_has_two_screens():
    assert len(README.split()) <= 1200
