"""The front door: what `import tl_jets` gives, and that it loads nothing that is not used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import tl_jets
from tl_jets.calculus import norms
from tl_jets.cli import arguments
from tl_jets.core import protocol
from tl_jets.detached_map import composed_jacobian
from tl_jets.flows import targets
from tl_jets.interventions import hooks
from tl_jets.jets import expand
from tl_jets.ngrams import bigram_sweep, join, scoring
from tl_jets.paths import expansion


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


def test_a_name_of_other_tools_loads_its_own_module_only():
    code = "import sys, tl_jets as tj; tj.to_activation_cache; print('circuitsvis' in sys.modules)"
    assert in_a_fresh_process(code).split()[-1] == "False"
    assert [getattr(tl_jets.interop, name) for name in tl_jets.interop.__all__] == [
        getattr(tl_jets, name) for name in tl_jets.interop.__all__
    ]
    with pytest.raises(AttributeError, match="no attribute 'to_nothing'; its names are"):
        _ = tl_jets.interop.to_nothing


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


@pytest.mark.parametrize(
    "words", [["--help"], ["lens", "--help"], ["ngrams", "--top-k", "none"], ["lenz"], ["--version"]]
)
def test_help_and_mistyped_commands_need_no_torch(words):
    code = (
        f"import sys; from tl_jets.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'rich' in sys.modules)"
    )
    assert in_a_fresh_process(code).split()[-2:] == ["False", "False"]


def test_the_commands_choices_are_the_librarys():
    assert arguments.GRANULARITIES == protocol.GRANULARITIES
    assert arguments.CENTER_SCALES == norms.CENTER_SCALES
    assert arguments.OBJECTIVES == expand.OBJECTIVES
    assert get_args(bigram_sweep.Per) == arguments.PER
    assert tuple(arguments.SCORES) == tuple(scoring.SCORES)
    assert tuple(arguments.NORMALIZES) == tuple(join.NORMALIZES)
    assert arguments.LOGITS == composed_jacobian.LOGITS
    assert (get_args(hooks.Mode), get_args(targets.Measure)) == (arguments.MODES, arguments.FLOW_MEASURES)
    assert (arguments.MAX_ORDER, arguments.MAX_PATHS) == (norms.MAX_ORDER, expansion.MAX_PATHS)
