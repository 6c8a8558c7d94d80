"""A hook of MkDocs: formulas become MathML when the site is built, so that no page needs a script or a font for them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What `pymdownx.arithmatex` leaves of a formula.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
UNKNOWN = re.compile(r"<m[a-z]+>\\[a-zA-Z]+</m[a-z]+>")


def to_mathml(latex: str, *, display: bool) -> str:
    """One formula as MathML; what the converter does not know is an error, not text on the page.

    Raises:
        PluginError: A command that the converter does not know.
    """
    found = convert(" ".join(latex.split()), display="block" if display else "inline")
    unknown = UNKNOWN.search(found)
    if unknown:
        raise PluginError(f"Formulas must use commands that latex2mathml knows; {unknown.group()} is of {latex!r}.")
    return found


def on_page_content(html: str, **_: Any) -> str:
    """Replace the formulas of one page."""

    def replace(match: re.Match[str]) -> str:
        tag, latex = match.groups()
        return to_mathml(unescape(latex), display=tag == "div")

    return FORMULA.sub(replace, html)
