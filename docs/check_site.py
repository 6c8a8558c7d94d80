"""Check the built site: every public name is documented, links resolve, and no page asks the network for anything.

    python docs/check_site.py [SITE]

Standard library only, and nothing of tl_jets is imported: public names are read from the `__all__` of its sources.
"""

from __future__ import annotations

import ast
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
# Packages whose `__all__` must be in the reference; one that is not there yet is passed over.
PACKAGES = (
    "tl_jets",
    "tl_jets.interventions",
    "tl_jets.ngrams",
    "tl_jets.paths",
    "tl_jets.studies",
    "tl_jets.views",
    "tl_jets.views.figures",
)
# What a browser fetches without being asked.
FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
FETCHED_RELATIONS = {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
CODE = ("code", "pre", "script", "style")
# Markup of docstrings and formulas that should have become something else.
LEFT_OVER = re.compile(r"\.\. math::|:math:|={4,}  =|\\[()\[\]]|^>>> |```", re.MULTILINE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """A page: anchors that it has, links that one may click, what is fetched, and its text outside of code."""

    def __init__(self, html: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag points to."""
        self._code += tag in CODE
        found = {name: value or "" for name, value in attrs}
        self.ids.update(found[name] for name in ("id", "name") if name in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in FETCHED and FETCHED[tag] in found:
            self.fetched.append(found[FETCHED[tag]])
        if tag == "link" and FETCHED_RELATIONS.intersection(found.get("rel", "").split()):
            self.fetched.append(found.get("href", ""))

    def handle_endtag(self, tag: str) -> None:
        """Note the end of code."""
        self._code -= tag in CODE

    def handle_data(self, data: str) -> None:
        """Collect the text."""
        self.text += "" if self._code else data


def public_names(package: str, root: Path = ROOT) -> list[str]:
    """The names in the `__all__` of a package, `tl_jets.flow`, but for `PACKAGES` and what the package above takes from it."""
    names: list[str] = []
    for node in source(package, root):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets):
            names = ast.literal_eval(node.value)
    above = (node for statement in source(package.rpartition(".")[0], root) for node in ast.walk(statement))
    for node in above:
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            names = [name for name in names if name not in [alias.name for alias in node.names]]
    return [name for name in (f"{package}.{name}" for name in names) if name not in PACKAGES]


def loaded_names(root: Path = ROOT) -> list[str]:
    """The names that `tl_jets` loads from its rooms, classes of results too, which are not in its `__all__`."""
    found = (node for statement in source("tl_jets", root) for node in ast.walk(statement))
    imports = [
        node for node in found if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tl_jets.")
    ]
    return [f"tl_jets.{alias.name}" for node in imports for alias in node.names]


def source(package: str, root: Path = ROOT) -> list[ast.stmt]:
    """The statements of a package's `__init__`; none if there is no such package."""
    file = root / package.replace(".", "/") / "__init__.py"
    return ast.parse(file.read_text(encoding="utf-8")).body if package and file.exists() else []


def is_external(address: str) -> bool:
    """Whether an address leaves the site."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https")


def problems(site: Path, names: list[str]) -> list[str]:
    """What is wrong with a site, one sentence each; an empty list if nothing is."""
    found = []
    pages = {file.resolve(): Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    anchors = set().union(*(page.ids for page in pages.values())) if pages else set()
    found += [f"{name} is public and not in the reference." for name in names if name not in anchors]
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        found += [f"{where} fetches {address} from the network." for address in page.fetched if is_external(address)]
        found += [f"{where} shows the markup {left!r}." for left in sorted(set(LEFT_OVER.findall(page.text)))]
        if file.name == "404.html":  # its links are absolute, as it is served at any depth
            continue
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{where} links to {link}, which is not there.")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{where} links to {link}, which has no such anchor.")
    styles = {file: file.read_text(encoding="utf-8") for file in [*pages, *site.rglob("*.css")]}
    found += [f"{file.name} has a style from the network." for file, text in styles.items() if IN_STYLE.search(text)]
    return found if pages else [f"{site} has no pages. Build it: mkdocs build -f docs/mkdocs.yml."]


def main() -> int:
    """Print what is wrong; the exit status is 1 if something is."""
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "site"
    names = sorted({*loaded_names(), *(name for package in PACKAGES for name in public_names(package))})
    found = problems(site, names)
    print("\n".join(found) if found else f"{site}: {len(names)} public names, all there; nothing external.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
