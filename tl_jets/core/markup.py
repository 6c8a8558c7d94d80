"""Small safe HTML. All text goes through `text` or `token`, so that no name can become markup.

A cell carries only the strength of its color, a number in -1..1; style sheet (`views/templates/view.css`) maps it to
orange above zero and blue below (distinguishable with all common kinds of color blindness), on light and dark grounds,
with a text contrast of at least 4.5 to 1. Values that only rise from zero are blue.

Example:
    >>> token("</script>")
    '<bdi>&lt;/script&gt;</bdi>'
    >>> cell(token(" the"), diverging(1.5, scale=3.0), hover="logit 1.5")
    '<td style="--v:0.5" class="above" title="logit 1.5"><bdi>·the</bdi></td>'
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tl_jets.core.tokens import visible


def text(value: Any) -> str:
    """Any value as escaped text of an element or quoted attribute."""
    return html.escape(str(value), quote=True)


def token(value: Any) -> str:
    """A token with visible spaces and line breaks, isolated in its own text direction; None is padding."""
    return f"<bdi>{text(visible(None if value is None else str(value)))}</bdi>"


def largest(values: Iterable[float]) -> float:
    """The largest finite absolute value, as the scale of colors; 1 if none is above 0."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


def diverging(value: float | None, scale: float) -> str:
    """Attributes that color `value / scale` around zero; empty for a missing number."""
    if value is None or math.isnan(value):
        return ""
    return f' style="--v:{min(abs(value) / scale, 1.0):.3g}" class="{"below" if value < 0 else "above"}"'


def rising(share: float | None) -> str:
    """Attributes that color a share in 0..1 with one hue, none at 0."""
    if share is None or math.isnan(share):
        return ""
    return f' style="--v:{min(max(share, 0.0), 1.0):.3g}" class="rising"'


def cell(inner: str, color: str = "", *, hover: str = "", tag: str = "td") -> str:
    """A table cell around safe markup `inner`, with a color from `diverging` or `rising` and a plain hover text."""
    title = f' title="{text(hover)}"' if hover else ""
    return f"<{tag}{color}{title}>{inner}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """A table in a scrolling box, from markup of column heads and rows of `cell`s; the first cell heads its row."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    above = f"<p>{caption}</p>" if caption else ""
    return f'{above}<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def row_head(inner: str, hover: str = "") -> str:
    """The head cell of a row or column."""
    title = f' title="{text(hover)}"' if hover else ""
    return f'<th scope="row"{title}>{inner}</th>'
