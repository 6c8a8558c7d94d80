"""Tokens that a vocabulary may hold and a page or a figure must survive."""

from __future__ import annotations

HOSTILE = [
    "</script><script>window.brokenOut = 1</script>",
    '<img src=x onerror="window.brokenOut = 1">',
    '" onmouseover="window.brokenOut = 1',
    "'",
    "\\",
    "`${1}`",
    "&lt;",
    "{{ title }}",
    "$\\frac{1$",  # a broken formula
    "a\nb\r\tc",
    "\u2028",
    "\u202eabc",  # right to left from here on
    "\u05d0\u05d1",
    "\ufffd",  # half of a character, as byte tokens are
    "<0x0A>",
    " ",
    "",
]


class HostileTokenizer:
    """Decodes every id as one of them."""

    def decode(self, ids):
        return "".join(HOSTILE[int(token) % len(HOSTILE)] for token in ids)
