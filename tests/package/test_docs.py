"""The documentation: its code runs, its names and signatures are the library's, and its checker finds what is wrong.

The site itself is built and checked by `tox -e docs`.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import operator
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import tl_jets
import tl_jets.cli
import tl_jets.cli.texts
import tl_jets.studies

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "pages"
WITH_CODE = [
    page for page in sorted(PAGES.rglob("*.md")) if re.search(r"^```(python|pycon)$", page.read_text(), re.MULTILINE)
]
CHECKER = runpy.run_path(str(ROOT / "docs" / "check_site.py"))


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(PAGES)))
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    """Blocks of one page share their names; in `pycon` blocks, `...` stands for anything."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names: dict[str, object] = {}
    for kind, block in re.findall(r"^```(python|pycon)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(block, str(page), "exec"), names)
        else:
            example = doctest.DocTestParser().get_doctest(block, names, page.stem, str(page), 0)
            printed: list[str] = []
            runner.run(example, out=printed.append, clear_globs=False)
            names = example.globs
            assert not runner.failures, "".join(printed)


def test_the_guides_have_code():
    assert {page.stem for page in WITH_CODE} >= {
        "index",
        "start",
        "lenses",
        "expansions",
        "paths",
        "detached",
        "ngrams",
    }


def test_commands_of_the_pages_are_those_of_the_terminal():
    blocks = re.findall(
        r"^```bash\n(.*?)^```$", "\n".join(p.read_text() for p in PAGES.rglob("*.md")), re.DOTALL | re.MULTILINE
    )
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("tl-jets ")]
    assert len(commands) >= 4
    for command in commands:
        tl_jets.cli.parser().parse_args(shlex.split(command)[1:])
    assert {shlex.split(command)[1] for command in commands} == set(tl_jets.cli.texts.DESCRIPTIONS)


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in PAGES.glob("reference/*.md"))
    shown = set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    wanted = {
        name
        for package in ("tl_jets", "tl_jets.ngrams", "tl_jets.studies")
        for name in CHECKER["public_names"](package)
    }
    assert not wanted - shown, "add them to a page of docs/pages/reference"
    for name in shown:
        path, last = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(path), last) or importlib.util.find_spec(name), name


def test_the_checker_reads_the_public_names():
    read = CHECKER["public_names"]
    for package in (tl_jets, tl_jets.studies, tl_jets.views, tl_jets.views.figures):
        names = read(package.__name__)
        modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert names == [
            name for name in (f"{package.__name__}.{x}" for x in package.__all__) if name not in CHECKER["PACKAGES"]
        ]
        # `import tl_jets.x as x` would give the function: a module must not have its name.
        assert not {name.rsplit(".", 1)[1] for name in names} & modules
    assert {"tl_jets.jet_expand", "tl_jets.path_sums", "tl_jets.detached"} <= set(read("tl_jets"))
    assert read("tl_jets.nothing_here") == []
    ngrams = read("tl_jets.ngrams")  # what tl_jets has is documented there
    assert {f"tl_jets.ngrams.{name}" for name in ("Job", "sweep", "bigram_job", "trigram_job")} <= set(ngrams)
    assert ngrams == [f"tl_jets.ngrams.{x}" for x in tl_jets.ngrams.__all__ if x not in tl_jets._PLACE_OF]


GOOD = '<h1 id="tl_jets.calculus.jet">jet</h1><a href="b.html#there">b</a><a href="https://arxiv.org">paper</a><code>:math:</code>'


@pytest.mark.parametrize(
    ("html", "message"),
    [
        (GOOD, None),
        (GOOD + '<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        (GOOD + '<link rel="stylesheet" href="//fonts.example/x.css">', "fetches //fonts.example/x.css"),
        (GOOD + '<img src="http://pictures.example/x.png">', "fetches http://pictures.example/x.png"),
        (GOOD + "<style>@import 'https://fonts.example/x.css'</style>", "has a style from the network"),
        (GOOD + '<a href="c.html">c</a>', "links to c.html, which is not there"),
        (GOOD + '<a href="b.html#nowhere">b</a>', "links to b.html#nowhere, which has no such anchor"),
        (GOOD + '<a href="#nowhere">b</a>', "links to #nowhere, which has no such anchor"),
        (GOOD + "<p>.. math::</p>", "shows the markup"),
        (GOOD + r"<p>\(x\)</p>", "shows the markup"),
        (
            GOOD.replace("tl_jets.calculus.jet", "tl_jets.jets"),
            "tl_jets.calculus.jet is public and not in the reference",
        ),
    ],
)
def test_the_checker_finds_what_is_wrong(html, message, tmp_path):
    (tmp_path / "a.html").write_text(html)
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1>')
    found = CHECKER["problems"](tmp_path, ["tl_jets.calculus.jet"])
    if message is None:
        assert found == []
    else:
        assert found and all(message in problem for problem in found)


def test_an_empty_site_is_no_good_site(tmp_path):
    assert "has no pages" in CHECKER["problems"](tmp_path, [])[0]


LLMS = (PAGES / "llms.txt").read_text()


def test_llms_txt_has_its_form():
    lines = LLMS.splitlines()
    assert lines[0] == "# tl-jets" and lines[2].startswith("> ")
    after = LLMS[LLMS.index("## ") :]
    assert all(re.match(r"## \w|- \[.+\]\(.+\): \S|$", line) for line in after.splitlines())


def test_llms_txt_links_to_every_page():
    linked = set(re.findall(r"\]\((\S+?)\.html\)", LLMS))
    pages = {str(page.relative_to(PAGES).with_suffix("")) for page in PAGES.rglob("*.md")}
    assert linked <= pages
    assert pages - linked == {"index", "reference/index"}


def test_signatures_of_llms_txt_are_the_librarys():
    """What is shown is there, in the same order, with the same default; what has no default is shown."""
    found = re.findall(r"^tj\.(\w+)(\(.*?\))  # ", LLMS, re.MULTILINE)
    assert len(found) >= 12
    for name, text in found:
        names: dict[str, object] = {"torch": torch}
        exec(f"def shown{text}: ...", names)
        shown = inspect.signature(names["shown"]).parameters  # type: ignore[arg-type]
        real = inspect.signature(getattr(tl_jets, name)).parameters
        assert list(shown) == [key for key in real if key in shown], name
        for key, parameter in real.items():
            assert key in shown or parameter.default is not parameter.empty, f"{name} needs {key}"
            if key in shown:
                assert (shown[key].kind, shown[key].default) == (parameter.kind, parameter.default), f"{name}: {key}"


def test_names_of_llms_txt_exist():
    results = set(re.findall(r"-> (?:a |an )?([A-Z]\w+)", LLMS)) - {"TransformerBridge"}
    assert len(results) >= 8 and all(hasattr(tl_jets, name) for name in results)
    assert set(re.findall(r"\btj\.(\w+)", LLMS)) <= set(tl_jets.__all__)
    for page in re.findall(r"\(reference/\w+\.html\): (.*)", LLMS):
        for name in page.split(", "):
            module = tl_jets.studies if name in tl_jets.studies.__all__ else tl_jets
            operator.attrgetter(name)(module)


def test_the_citation_names_both_papers():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        found["cff-version"] == "1.2.0"
        and found["title"].startswith("tl-jets")
        and found["authors"]
        and found["message"]
    )
    identifiers = [i["value"] for reference in found["references"] for i in reference.get("identifiers", ())]
    assert identifiers == ["arXiv:2410.06024", "arXiv:2505.24293"]
    assert all({"type", "title", "authors", "year", "url"} <= set(reference) for reference in found["references"])
    assert {author["family-names"] for author in found["references"][0]["authors"]} >= {"Chen", "Franceschi"}
    assert [author["family-names"] for author in found["references"][-1]["authors"]] == ["Golden"]


BENCHMARK = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "bench_costs.py"))


def test_the_cost_page_has_the_rows_of_its_benchmark():
    network = tl_jets.ResidualNetwork(tl_jets.load_tinydocs(), "block")
    rows = BENCHMARK["table"](BENCHMARK["medians"](BENCHMARK["work"](network, 4), 1))
    page = (PAGES / "costs.md").read_text().splitlines()
    start = page.index(next(line for line in page if line.startswith("The embedded model"))) + 2
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in page[start : start + len(rows)]]
    assert [[cell.strip() for cell in row.strip("|").split("|")][:2] for row in rows] == [row[:2] for row in shown]
    assert shown[0][2:] == [f"order {order}" for order in BENCHMARK["ORDERS"]]
    assert all(float(cell) > 0 for row in shown[2:] for cell in row[2:])


def test_the_benchmark_divides_by_the_forward_pass():
    found = {(BENCHMARK["FORWARD"], 0, ""): 2.0} | {("a", order, "uniform"): 2.0 + 2 * order for order in range(4)}
    assert BENCHMARK["table"](found)[2] == "| a | uniform | 1.0 | 2.0 | 3.0 | 4.0 |"


def test_files_that_pages_name_are_there():
    text = "\n".join(page.read_text() for page in PAGES.rglob("*.md"))
    named = {
        "tests": set(re.findall(r"`(test_\w+\.py)`", text)),
        "tests/benchmarks": set(re.findall(r"`(bench_\w+\.py)`", text)),
        "demos": set(re.findall(r"`demos/(\w+\.py)`", text)),
    }
    for folder, files in named.items():
        assert files and files <= {file.name for file in (ROOT / folder).rglob("*.py")}, folder
