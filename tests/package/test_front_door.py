"""The front door: what `import tl_jets` gives, and that it loads nothing that is not used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import tl_jets


def in_a_fresh_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_public_name_is_there_and_listed():
    for name in tl_jets.__all__:
        assert getattr(tl_jets, name) is not None
    assert set(tl_jets.__all__) <= set(dir(tl_jets))
    assert list(tl_jets.__all__) == sorted(tl_jets.__all__)


def test_type_checkers_and_python_find_each_name_in_the_same_place():
    source = ast.parse(Path(tl_jets.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom) and node.module != "tl_jets"]
    assert {node.module: tuple(alias.name for alias in node.names) for node in imports} == tl_jets._PLACES


def test_an_unknown_name_is_refused():
    code = "import tl_jets\ntry: tl_jets.nothing\nexcept AttributeError as error: print(error)"
    assert "tl_jets has no attribute 'nothing'" in in_a_fresh_process(code)


def test_importing_loads_neither_torch_nor_any_room():
    code = "import sys, tl_jets; print([m for m in sys.modules if m == 'torch' or m.startswith('tl_jets.')])"
    assert in_a_fresh_process(code).strip() == "[]"


def test_a_deep_import_knows_the_models_of_transformer_lens():
    code = (
        "from tl_jets.pretrained import load_tinydocs; from tl_jets.core.network import ResidualNetwork; "
        "print(ResidualNetwork(load_tinydocs()).granularity)"
    )
    assert in_a_fresh_process(code).strip().endswith("sublayer")


def test_a_lens_is_drawn_as_a_lens_though_nobody_imported_the_views():
    code = (
        "import tl_jets as tj; lens = tj.iterative_jet_lens(tj.load_tinydocs(), 'If the file', order=0); "
        "print('0_pre' in lens._repr_html_(), 'more rows' in lens._repr_html_())"
    )
    assert in_a_fresh_process(code).split()[-2:] == ["True", "False"]
