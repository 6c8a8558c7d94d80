r"""Docstrings as the site shows them: the few reStructuredText forms in them become Markdown.

Three are in use: ``.. math::`` blocks, the role ``:math:`x```, and simple tables (rows of ``====``). Doctests become code blocks.
In prose, `<x, y>` is an inner product and no HTML tag, and `[batch][pos]` a shape and no link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

RULE = re.compile(r"=+(?:  +=+)+$")
ROLE = re.compile(r":math:`([^`]+)`")
TAG = re.compile(r"<(?=[a-zA-Z/])")
CODE = re.compile(r"(`+[^`]*`+)")


def to_markdown(text: str) -> str:
    """A docstring with formulas and tables in Markdown's forms; doctests and indented blocks stay as they are."""
    lines, found = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        indent, body = line[: len(line) - len(line.lstrip())], line.strip()
        if body == ".. math::":
            block = _indented(lines, indent)
            found += [f"{indent}\\[", *(f"{indent}{part}" for part in block), f"{indent}\\]", ""]
        elif RULE.match(body):
            found += [*(f"{indent}{row}" for row in _table(body, lines)), ""]
        elif body.startswith(">>> "):
            session = [line, *_until_blank(lines)]
            found += [f"{indent}```pycon", *session, f"{indent}```", ""]
        else:
            found.append(_prose(line))
    return "\n".join(found)


def _indented(lines: list[str], indent: str) -> list[str]:
    """Take the block that is indented further than `indent` off the lines; blank lines around it are dropped."""
    block: list[str] = []
    while lines and (not lines[0].strip() or lines[0].startswith(indent + "    ")):
        block.append(lines.pop(0).strip())
    return [part for part in block if part]


def _until_blank(lines: list[str]) -> list[str]:
    """Take the rest of a paragraph off the lines."""
    block: list[str] = []
    while lines and lines[0].strip():
        block.append(lines.pop(0))
    return block


def _table(rule: str, lines: list[str]) -> list[str]:
    """Take a simple table off the lines, up to its third rule: heading, rule, rows, rule."""
    columns = [match.span() for match in re.finditer("=+", rule)]
    starts = [start for start, _ in columns]
    ends: list[int | None] = [*starts[1:], None]
    rows, rules = [], 1
    while rules < 3:
        indented = lines.pop(0)
        line = indented[len(indented) - len(indented.lstrip()) :] if RULE.match(indented.strip()) else indented
        if RULE.match(line.strip()):
            rules += 1
            if rules == 2:
                rows.append("|" + " --- |" * len(starts))
            continue
        cells = [_cell(line[start:end]) for start, end in zip(starts, ends, strict=True)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(text: str) -> str:
    parts = CODE.split(_prose(text.strip()))
    return "".join(part if i % 2 else re.sub(r"(?<!\\)\|", r"\\|", part) for i, part in enumerate(parts))


def _prose(line: str) -> str:
    line = ROLE.sub(r"\\(\1\\)", line)
    return "".join(
        part if i % 2 else TAG.sub("&lt;", part).replace("][", "]&#91;") for i, part in enumerate(CODE.split(line))
    )


class MarkdownDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
