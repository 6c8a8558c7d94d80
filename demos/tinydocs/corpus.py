"""What tinydocs is trained on, the prose of documentation; and Python source, to fine-tune it on.

Debian packages are downloaded with `apt-get download` (no root, any machine with Debian 12's package lists) into a cache
outside the repository and unpacked with `dpkg-deb -x`. A file becomes a page, and a page is a list of paragraphs.

`DOCS`: the HTML pages of `python3.11-doc` and `postgresql-doc-15`, read with the standard library's HTML parser:

- running text only: what stands in `<p>`, `<li>` and `<dd>` of a page's body. Code blocks, tables' bare cells, signatures,
  headings, navigation, indexes, footnote marks and header-link marks are dropped; inline code stays;
- white space is collapsed, so a paragraph has no line break of its own; curly quotes become straight ones, which is what
  people type;
- at least `MIN_WORDS` words; a paragraph that has occurred before, on whichever page, is dropped.

`CODE`: the modules of Python 3.11's standard library (`libpython3.11-stdlib`, `libpython3.11-minimal`). A paragraph is a line
with its indentation; empty lines and trailing white space are dropped, and so are files that are tables of data.

A page is held out if a seeded hash of its name says so (`HELD_OUT` of them), so the split does not depend on the order of the
files, and no paragraph is on both sides.

Cost: 15 MB of download (code: 3 MB), and half a minute of one core.

Example::

    python demos/tinydocs/corpus.py --cache ~/.cache/tl-jets/tinydocs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from tqdm import tqdm

CACHE = Path("~/.cache/tl-jets/tinydocs")
HELD_OUT = 0.05
SPLIT_SEED = 0
MIN_WORDS = 5

_NOT_PROSE = re.compile(
    r"(.*/)?(genindex|bookindex|contents|search|py-modindex|copyright|license|download|legalnotice|biblio)"
)
_DATA = re.compile(
    r"encodings/|pydoc_data/|_sysconfigdata|lib2to3/tests/|turtledemo/|html/entities|config-|(.*/)?_?mime"
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


def lines(source: str) -> list[str]:
    """The lines of a module that are not empty."""
    return [line for line in map(str.rstrip, source.splitlines()) if line]


@dataclass(frozen=True)
class Corpus:
    """Where a corpus comes from, and how its files are read.

    Attributes:
        name: Of its files in the cache.
        sources: By Debian package: where its files are, and its licence.
        ending: Of the files' names.
        left_out: Files that are not read, by the beginning of their path within the package's folder.
        read: The paragraphs of a file.
        once: Whether a paragraph that has occurred before is dropped.
    """

    name: str
    sources: dict[str, tuple[str, str]]
    ending: str
    left_out: re.Pattern[str]
    read: Callable[[str], list[str]]
    once: bool

    def load(self, cache: Path) -> tuple[list[Page], dict[str, object]]:
        """The pages and their provenance, from the cache if they are there: versions, counts, the SHA256 of the text."""
        cache = cache.expanduser()
        text, facts = cache / f"{self.name}.jsonl", cache / f"{self.name}-provenance.json"
        if not facts.is_file():
            versions = self.fetch(cache)
            found = list(self.pages(cache))
            text.write_text(
                "".join(json.dumps(vars(page), ensure_ascii=False) + "\n" for page in found), encoding="utf-8"
            )
            facts.write_text(json.dumps(_provenance(found, versions), indent=1), encoding="utf-8")
        with text.open(encoding="utf-8") as rows:
            return [Page(**json.loads(row)) for row in rows], json.loads(facts.read_text(encoding="utf-8"))

    def fetch(self, cache: Path) -> dict[str, str]:
        """Download and unpack what is not in the cache yet; the version of every package.

        Raises:
            RuntimeError: There is no `apt-get`, it does not know a package, or the download failed.
        """
        cache.mkdir(parents=True, exist_ok=True)
        versions = {}
        for package, (folder, _) in self.sources.items():
            if not list(cache.glob(f"{package}_*.deb")):
                _call(["apt-get", "download", package], cache)
            archive = max(cache.glob(f"{package}_*.deb"))
            if not (cache / package / folder).is_dir():
                _call(["dpkg-deb", "-x", archive.name, package], cache)
            versions[package] = _call(["dpkg-deb", "-f", archive.name, "Version"], cache).strip()
        return versions

    def pages(self, cache: Path) -> Iterator[Page]:
        """All pages of the unpacked packages, by name."""
        seen: set[str] = set()
        files: list[tuple[str, Path]] = []
        for package, (folder, _) in self.sources.items():
            for path in sorted((cache / package / folder).rglob("*" + self.ending)):
                name = path.relative_to(cache / package / folder).as_posix()
                if path.is_file() and not self.left_out.match(name):
                    files.append((f"{package}/{name}", path))
        for name, path in tqdm(files, desc="reading pages", unit="page"):
            found = self.read(path.read_text(encoding="utf-8", errors="replace"))
            if self.once:
                found = [text for text in dict.fromkeys(found) if text not in seen]
                seen.update(found)
            if found:
                yield Page(name, _is_held_out(name), found)


DOCS = Corpus(
    name="pages",
    sources={
        "python3.11-doc": ("usr/share/doc/python3.11/html", "PSF License Version 2 (examples: Zero-Clause BSD)"),
        "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html", "PostgreSQL License"),
    },
    ending=".html",
    left_out=_NOT_PROSE,
    read=paragraphs,
    once=True,
)
CODE = Corpus(
    name="code",
    sources={
        "libpython3.11-stdlib": ("usr/lib/python3.11", "PSF License Version 2"),
        "libpython3.11-minimal": ("usr/lib/python3.11", "PSF License Version 2"),
    },
    ending=".py",
    left_out=_DATA,
    read=lines,
    once=False,
)


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


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(f"{SPLIT_SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _call(command: list[str], folder: Path) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise RuntimeError(
            f"the corpus comes from packages of Debian 12; `{' '.join(command)}` failed: {said}; with package lists it "
            "works without root, or put the .deb files into the cache yourself"
        ) from error


def main() -> None:
    """Build a corpus in the cache and print its provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="where packages and text are kept (default: %(default)s)"
    )
    parser.add_argument("--code", action="store_true", help="Python source, not documentation")
    options = parser.parse_args()
    print(json.dumps((CODE if options.code else DOCS).load(options.cache)[1], indent=1))


if __name__ == "__main__":
    main()
