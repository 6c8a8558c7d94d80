"""A path names an input-to-output function by its source and the steps it passes through, in order.

Example:
    >>> path = Path("embed").then("0_attn").then("3_mlp")
    >>> print(path)
    embed > 0_attn > 3_mlp
    >>> Path.parse("embed > 0_attn > 3_mlp") == path
    True
"""

from __future__ import annotations

from dataclasses import dataclass

from tl_jets.core.protocol import DECODER_STEP

ARROW = " > "


@dataclass(frozen=True)
class Path:
    """A source and the steps that a path passes through.

    Attributes:
        source: Start of the path: `embed`, a write, a stream, or the name of a function.
        steps: The steps in order; ends with `ln_final` once decoded.
    """

    source: str
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ARROW.join((self.source, *self.steps))

    def then(self, step: str) -> Path:
        """The path that continues through `step`."""
        return Path(self.source, (*self.steps, step))

    @property
    def length(self) -> int:
        """Number of writes on the path: its steps without the decoder."""
        return sum(not step.startswith(DECODER_STEP) for step in self.steps)

    @classmethod
    def parse(cls, text: str) -> Path:
        """The path that prints as `text`."""
        source, *steps = text.split(ARROW)
        return cls(source, tuple(steps))
