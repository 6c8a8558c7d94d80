"""Sandboxed frames for circuitsvis' elements: its own script, no network, tokens that are neither HTML nor script."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from circuitsvis.utils.render import render_local
from torch import Tensor

from tl_jets.core.tokens import token_names
from tl_jets.views.pages import View

# Nothing but the frame's own text: no request, no frame, no form.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:"
WORD_JOINER = "\u2060"


def inert_names(tokenizer: Any, ids: list[Tensor]) -> dict[int, str]:
    """Texts of ids, inert."""
    return {token: inert(name) for token, name in token_names(tokenizer, ids).items()}


def inert(text: str) -> str:
    """Text that is the same on the screen, and neither HTML, nor an entity, nor the end of a script.

    A word joiner, which has no width, follows every `<` and `&`: HTML then reads them as themselves. circuitsvis shows
    tokens as HTML in some places and as text in others, so that escaping would be seen.
    """
    return "".join(letter + WORD_JOINER if letter in "<&" else letter for letter in text)


def framed(title: str, element: str, props: Mapping[str, Any], height: int) -> View:
    """A circuitsvis element in a sandboxed frame without network."""
    drawn = render_local(element, **{name: _plain(value) for name, value in props.items()})
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = f'<!doctype html><html><head><meta charset="utf-8">{policy}</head><body>{drawn}</body></html>'
    style = f"width:100%;height:{int(height)}px;border:0;resize:vertical;overflow:auto;background:white"
    frame = f'<iframe sandbox="allow-scripts" title="{html.escape(title)}" style="{style}" srcdoc="{html.escape(page)}"></iframe>'
    return View(title, frame)


def _plain(value: Any) -> Any:
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else value
