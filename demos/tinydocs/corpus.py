"""The text that tinydocs is trained on: the prose of the documentation of Python 3.11 and of PostgreSQL 15.

Two Debian packages, `python3.11-doc` and `postgresql-doc-15`, are downloaded with `apt-get download` (no root, any machine
with Debian 12's package lists) into a cache outside the repository, unpacked with `dpkg-deb -x`, and read with the standard
library's HTML parser. A page becomes a document, and a document is a list of paragraphs:

- running text only: what stands in `<p>`, `<li>` and `<dd>` of a page's body. Code blocks, tables' bare cells, signatures,
  headings, navigation, indexes, footnote marks and header-link marks are dropped; inline code stays;
- white space is collapsed, so a paragraph has no line break of its own; curly quotes become straight ones, which is what
  people type;
- at least `MIN_WORDS` words; a paragraph that has occurred before, on whichever page, is dropped.

A page is held out if a seeded hash of its name says so (`HELD_OUT` of them), so the split does not depend on the order of the
files, and no paragraph is on both sides.

Cost: 15 MB of download, and half a minute of one core.

Example::

    python demos/tinydocs/corpus.py --cache ~/.cache/tl-jets/tinydocs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tqdm import tqdm

CACHE = Path("~/.cache/tl-jets/tinydocs")
# The package, where its pages are, and its licence.
SOURCES = {
    "python3.11-doc": ("usr/share/doc/python3.11/html", "PSF License Version 2 (examples: Zero-Clause BSD)"),
    "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html", "PostgreSQL License"),
}
HELD_OUT = 0.05
SPLIT_SEED = 0
MIN_WORDS = 5

_NOT_PROSE = re.compile(
    r"(genindex|bookindex|contents|search|py-modindex|copyright|license|download|legalnotice|biblio)"
)
_BLOCK = re.compile(r"p|li|dd|dt|dl|ul|ol|div|section|table|thead|tbody|tr|td|th|blockquote|h[1-6]|pre|hr|body|main")
_PROSE = re.compile(r"p|li|dd")
_DROPPED_TAG = re.compile(r"head|script|style|pre|dt|nav|h[1-6]|form|sup|svg|math")
_DROPPED_CLASS = re.compile(
    r"headerlink|indexterm|navheader|navfooter|toc|toctree-wrapper|sphinxsidebar|related|footer|mobile-nav|admonition-title|"
    r"func_signature|column_definition|synopsis|cmdsynopsis|footnotes"
)
_VOID = re.compile(r"area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr")
_STRAIGHT = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u00ad": None, "\u200b": None})


@dataclass(frozen=True)
class Page:
    """A document: its name, whether it is held out, and its paragraphs."""

    name: str
    held_out: bool
    paragraphs: list[str]


class _Paragraphs(HTMLParser):
    """Collects the paragraphs of running text of one page in `found`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._open: list[tuple[str, bool]] = []  # the open elements, and whether all within is dropped
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if _BLOCK.fullmatch(tag):
            self._flush()
        if tag == "br":
            self._text.append(" ")
        if not _VOID.fullmatch(tag):
            classes = (dict(attrs).get("class") or "").split()
            dropped = _DROPPED_TAG.fullmatch(tag) or any(map(_DROPPED_CLASS.fullmatch, classes))
            self._open.append((tag, self._dropped or bool(dropped)))

    def handle_endtag(self, tag: str) -> None:
        if _BLOCK.fullmatch(tag):
            self._flush()
        if any(tag == name for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._text.append(data)

    @property
    def _dropped(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def _flush(self) -> None:
        text = " ".join("".join(self._text).translate(_STRAIGHT).split())
        self._text.clear()
        innermost = next((name for name, _ in reversed(self._open) if _BLOCK.fullmatch(name)), "")
        if _PROSE.fullmatch(innermost) and text.count(" ") + 1 >= MIN_WORDS:
            self.found.append(text)


def paragraphs(html: str) -> list[str]:
    """The paragraphs of running text of a Sphinx or DocBook page, in order."""
    start = html.find('role="main"')  # the body of a Sphinx page; DocBook pages have no sidebar
    parser = _Paragraphs()
    parser.feed(html if start < 0 else html[html.rfind("<", 0, start) :])
    parser.close()
    return parser.found


def fetch(cache: Path) -> dict[str, str]:
    """Download and unpack what is not in the cache yet; the version of every package.

    Raises:
        RuntimeError: There is no `apt-get`, it does not know a package, or the download failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package, (folder, _) in SOURCES.items():
        if not list(cache.glob(f"{package}_*.deb")):
            _call(["apt-get", "download", package], cache)
        archive = max(cache.glob(f"{package}_*.deb"))
        if not (cache / package / folder).is_dir():
            _call(["dpkg-deb", "-x", archive.name, package], cache)
        versions[package] = _call(["dpkg-deb", "-f", archive.name, "Version"], cache).strip()
    return versions


def pages(cache: Path) -> Iterator[Page]:
    """All pages of the unpacked packages, by name, without repeated paragraphs."""
    seen: set[str] = set()
    files = [(package, path) for package, (folder, _) in SOURCES.items() for path in _html(cache / package / folder)]
    for package, path in tqdm(files, desc="reading pages", unit="page"):
        name = f"{package}/{path.relative_to(cache / package / SOURCES[package][0]).as_posix()}"
        new = [text for text in paragraphs(path.read_text(encoding="utf-8")) if text not in seen]
        new = list(dict.fromkeys(new))
        seen.update(new)
        if new:
            yield Page(name, _is_held_out(name), new)


def load(cache: Path) -> tuple[list[Page], dict[str, object]]:
    """The corpus and its provenance, from the cache if it is there: versions, counts and the SHA256 of the text."""
    cache = cache.expanduser()
    text, facts = cache / "pages.jsonl", cache / "provenance.json"
    if not facts.is_file():
        versions = fetch(cache)
        corpus = list(pages(cache))
        text.write_text("".join(json.dumps(vars(page), ensure_ascii=False) + "\n" for page in corpus), encoding="utf-8")
        facts.write_text(json.dumps(_provenance(corpus, versions), indent=1), encoding="utf-8")
    with text.open(encoding="utf-8") as lines:
        return [Page(**json.loads(line)) for line in lines], json.loads(facts.read_text(encoding="utf-8"))


def _provenance(corpus: list[Page], versions: dict[str, str]) -> dict[str, object]:
    facts: dict[str, object] = {"versions": versions, "held_out": HELD_OUT, "split_seed": SPLIT_SEED}
    for part, held_out in (("training", False), ("held-out", True)):
        chosen = [page for page in corpus if page.held_out == held_out]
        text = "\n\n".join("\n".join(page.paragraphs) for page in chosen).encode()
        facts[part] = {
            "pages": len(chosen),
            "paragraphs": sum(len(page.paragraphs) for page in chosen),
            "bytes": len(text),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
    return facts


def _html(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.html") if not _NOT_PROSE.match(path.name))


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _call(command: list[str], folder: Path) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise RuntimeError(
            f"the corpus comes from Debian's packages {', '.join(SOURCES)}; `{' '.join(command)}` failed: {said}; "
            "on Debian 12 with package lists it works without root, or put the .deb files into the cache yourself"
        ) from error


def main() -> None:
    """Build the corpus in the cache and print its provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where packages and text are kept (default: %(default)s)"
    )
    print(json.dumps(load(parser.parse_args().cache)[1], indent=1))


if __name__ == "__main__":
    main()
