"""Paths and centers: the symbolic side of an expansion. Nothing here evaluates a model.

A **path** names an input-to-output function: a source and the steps that it passes through, in order, printed as
``embed > 0_attn > 3_mlp``. A **center** is a function of the input at which a stage is expanded: a label of the
trace (`Label`), a function of the trace (`Function`), or a term of an earlier expansion (`Term`), which is how
expansions compose.

Example:
    >>> path = Path("embed").then("0_attn").then("3_mlp")
    >>> print(path)
    embed > 0_attn > 3_mlp
    >>> Path.parse("embed > 0_attn > 3_mlp") == path
    True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from tl_jets.core.protocol import DECODER_STEP
from tl_jets.core.trace import Trace

if TYPE_CHECKING:
    from tl_jets.jets.expand import Expansion

ARROW = " > "


@dataclass(frozen=True)
class Path:
    """A source and the steps that a path passes through.

    Attributes:
        source: Where the path starts: `embed`, a write, a stream, or the name of a function.
        steps: The steps that it passes through, in order; `ln_final` where it has been decoded.
    """

    source: str
    steps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ARROW.join((self.source, *self.steps))

    def then(self, step: str) -> Path:
        """The path that continues through `step`."""
        return Path(self.source, (*self.steps, step))

    @property
    def n_writes(self) -> int:
        """How many writes the path passes through: its steps, the decoder apart."""
        return sum(not step.startswith(DECODER_STEP) for step in self.steps)

    @classmethod
    def parse(cls, text: str) -> Path:
        """The path that prints as `text`."""
        source, *steps = text.split(ARROW)
        return cls(source, tuple(steps))


@runtime_checkable
class Center(Protocol):
    """A function of the input, with a path that names it."""

    @property
    def path(self) -> Path:
        """What the center is called."""
        ...

    def evaluate(self, trace: Trace) -> Tensor:
        """Its value on one input, [batch, pos, d_model]."""
        ...


@dataclass(frozen=True)
class Label:
    """A stream, write, source or edit of the trace, as a center."""

    name: str

    @property
    def path(self) -> Path:
        """The label itself."""
        return Path(self.name)

    def evaluate(self, trace: Trace) -> Tensor:
        """The labelled tensor [batch, pos, d_model]."""
        return trace[self.name]


@dataclass(frozen=True)
class Function:
    """Any function of the trace that returns [batch, pos, d_model], as a center."""

    name: str
    function: Callable[[Trace], Tensor]

    @property
    def path(self) -> Path:
        """The function's name."""
        return Path(self.name)

    def evaluate(self, trace: Trace) -> Tensor:
        """The function's value [batch, pos, d_model].

        Raises:
            ValueError: It is not a tensor of the streams' shape.
        """
        value, like = self.function(trace), trace[trace.network.streams[0]]
        if not isinstance(value, Tensor) or value.shape != like.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"A center function must return a tensor [batch, pos, d_model] = {tuple(like.shape)}; {self.name} "
                f"returned {found}."
            )
        if value.dtype != like.dtype or value.device != like.device:
            raise ValueError(
                f"A center must have the streams' dtype and device, {like.dtype} on {like.device}; {self.name} "
                f"returned {value.dtype} on {value.device}. Move it with .to(...)."
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"A center must be finite; {self.name} returned NaN or infinity.")
        return value


@dataclass(frozen=True, eq=False)
class Term:
    """A term of an expansion: w_i J^k gamma(x_i)(h), or what the identity carries of a center.

    Attributes:
        path: What the term is called.
        expansion: The expansion that it is a term of.
    """

    path: Path
    expansion: Expansion

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Term({str(self)!r})"

    def evaluate(self, trace: Trace) -> Tensor:
        """The term on one input [batch, pos, d_model]."""
        return self.expansion.evaluate(trace)[str(self.path)]
