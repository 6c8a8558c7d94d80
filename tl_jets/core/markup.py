"""HTML of our own, small and safe: tokens and numbers as text, cells colored around zero, what a pointer brings up.

Every text goes through `text` or `token`: nothing that a model, a tokenizer or a user calls something can become markup.

**Colors.** A cell carries its strength only, a number in -1..1; the style sheet (`templates/view.css`) makes a color of it, orange
above zero and blue below (told apart by every common kind of color blindness), on a light or a dark ground, with a contrast of
the text of at least 4.5 to 1 at every strength. What only rises from zero is blue.

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
    """Anything as text of an element or of a quoted attribute."""
    return html.escape(str(value), quote=True)


def token(value: Any) -> str:
    """A token with its spaces and line breaks shown, in its own direction; None is padding."""
    return f"<bdi>{text(visible(None if value is None else str(value)))}</bdi>"


def largest(values: Iterable[float]) -> float:
    """The largest finite size, for the scale of colors; 1 if there is none above 0."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


def diverging(value: float | None, scale: float) -> str:
    """The color of `value / scale` around zero, as attributes; none for a number that is missing."""
    if value is None or math.isnan(value):
        return ""
    return f' style="--v:{min(abs(value) / scale, 1.0):.3g}" class="{"below" if value < 0 else "above"}"'


def rising(share: float | None) -> str:
    """The color of a share in 0..1, as attributes: one hue, none at 0."""
    if share is None or math.isnan(share):
        return ""
    return f' style="--v:{min(max(share, 0.0), 1.0):.3g}" class="rising"'


def cell(inner: str, color: str = "", *, hover: str = "", tag: str = "td") -> str:
    """A cell that holds markup.

    Args:
        inner: Markup, already safe.
        color: What `diverging` or `rising` gave.
        hover: Plain text that a pointer brings up; lines are kept.
        tag: The element.
    """
    title = f' title="{text(hover)}"' if hover else ""
    return f"<{tag}{color}{title}>{inner}</{tag}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> str:
    """A table in a box that scrolls.

    Args:
        head: Markup of the column heads.
        rows: Cells as `cell` makes them, a row each; the first one is the head of its row.
        caption: Markup above it.
    """
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    above = f"<p>{caption}</p>" if caption else ""
    return f'{above}<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def row_head(inner: str, hover: str = "") -> str:
    """The head of a row, or of a column."""
    title = f' title="{text(hover)}"' if hover else ""
    return f'<th scope="row"{title}>{inner}</th>'
