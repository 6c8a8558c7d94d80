"""Centers of expansions: labels of the trace, functions of it, and terms of earlier expansions.

A **center** is a function of the input, named by a path. A `Term` is one, so expansions compose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from tl_jets.core.path import Path
from tl_jets.core.trace import Trace


@runtime_checkable
class Evaluates(Protocol):
    """The part of an expansion that its terms need."""

    def evaluate(self, trace: Trace) -> Mapping[str, Tensor]:
        """The terms on one input, by path."""
        ...


@runtime_checkable
class Center(Protocol):
    """A function of the input, named by a path."""

    @property
    def path(self) -> Path:
        """The center's name."""
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
    """A term of an expansion: w_i J^k gamma(x_i)(h), or the identity term of a center.

    Attributes:
        path: The term's name.
        expansion: The expansion that contains it.
    """

    path: Path
    expansion: Evaluates

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Term({str(self)!r})"

    def evaluate(self, trace: Trace) -> Tensor:
        """The term on one input [batch, pos, d_model]."""
        return self.expansion.evaluate(trace)[str(self.path)]
