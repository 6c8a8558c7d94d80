"""Rules of piecewise functions: relu, clamp, abs, largest and smallest, sorting.

They follow the branch that c_0 takes: the coefficients of the piece, or of the element, that PyTorch's function selects
at c_0. At a kink the convention is that of PyTorch's own derivatives. (Griewank & Walther 2008, *Evaluating
Derivatives*, ch. 14, on why a series knows nothing of the other branch.)

Cost: one operation on the stacked tensor.

Example:
    >>> from tl_jets.calculus import Series
    >>> torch.relu(Series.line(torch.tensor([-1.0, 2.0]), torch.ones(2), order=1)).coefficients
    tensor([[0., 2.],
            [0., 1.]])
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tl_jets.calculus.rules_structure import align, axes, axis, value_of, where
from tl_jets.calculus.series import Series
from tl_jets.calculus.table import rule

aten = torch.ops.aten
Number = float | int
Operand = Tensor | float | int
FindExtreme = Callable[..., Any]


def _on_branch(x: Series, moves: Tensor, value: Tensor) -> Series:
    """`value` in c_0; above it the coefficients of x where `moves`, 0 elsewhere."""
    out = torch.where(moves, align(x, value.ndim), 0)
    out[0] = value
    return Series(out)


@rule(aten.abs.default)
def absolute(x: Series) -> Series:
    """|x|; 0 is a constant."""
    return Series(x.coefficients * x.coefficients[0].sign())


@rule(aten.relu.default)
def relu(x: Series) -> Series:
    """max(x, 0); 0 is a constant."""
    value = x.coefficients[0]
    return _on_branch(x, value > 0, value.relu())


@rule(aten.leaky_relu.default)
def leaky_relu(x: Series, negative_slope: Number = 0.01) -> Series:
    """X, or negative_slope x where x <= 0."""
    return Series(torch.where(x.coefficients[0] > 0, x.coefficients, x.coefficients * negative_slope))


@rule(aten.hardtanh.default)
def hardtanh(x: Series, min_val: Number = -1, max_val: Number = 1) -> Series:
    """X between two numbers; constant at and beyond them."""
    value = x.coefficients[0]
    return _on_branch(x, (value > min_val) & (value < max_val), F.hardtanh(value, min_val, max_val))


@rule(aten.clamp.default, aten.clamp.Tensor)
def clamp(x: Tensor, min: Operand | None = None, max: Operand | None = None) -> Tensor:
    """X between two bounds; at a bound it still moves."""
    out = x if min is None else clamp_min(x, min)
    return out if max is None else clamp_max(out, max)


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def clamp_min(x: Tensor, min: Operand) -> Tensor:
    """max(x, bound)."""
    return _choose(x, min, ~(value_of(x) < value_of(min)))


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def clamp_max(x: Tensor, max: Operand) -> Tensor:
    """min(x, bound)."""
    return _choose(x, max, ~(value_of(x) > value_of(max)))


@rule(aten.maximum.default)
def maximum(a: Tensor, b: Tensor) -> Tensor:
    """The larger; the first on a tie."""
    return _choose(a, b, value_of(a) >= value_of(b))


@rule(aten.minimum.default)
def minimum(a: Tensor, b: Tensor) -> Tensor:
    """The smaller; the first on a tie."""
    return _choose(a, b, value_of(a) <= value_of(b))


def _choose(a: Tensor, b: Operand, first: Tensor) -> Series:
    if isinstance(b, Tensor):
        return where(first, a, b)
    assert isinstance(a, Series)
    out = torch.where(first, a.coefficients, 0)
    out[0].masked_fill_(~first, b)
    return Series(out)


@rule(aten.nan_to_num.default)
def nan_to_num(
    x: Series, nan: Number | None = None, posinf: Number | None = None, neginf: Number | None = None
) -> Series:
    """X, with numbers for NaN and infinities."""
    value = x.coefficients[0]
    return _on_branch(x, value.isfinite(), value.nan_to_num(nan, posinf, neginf))


@rule(aten.max.dim)
def max_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    """The largest along an axis, and where it is."""
    return _extreme(x, dim, keepdim, torch.max)


@rule(aten.min.dim)
def min_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    """The smallest along an axis, and where it is."""
    return _extreme(x, dim, keepdim, torch.min)


def _extreme(x: Series, dim: int, keepdim: bool, find: FindExtreme) -> tuple[Series, Tensor]:
    place = axis(dim, x.ndim)
    if x.ndim == 0:
        return Series(x.coefficients.clone()), torch.zeros((), dtype=torch.long, device=x.device)
    index = find(x.coefficients[0], place - 1, keepdim=True).indices
    values = x.coefficients.gather(place, index.expand(x.coefficients.shape[0], *index.shape))
    if keepdim:
        return Series(values), index
    return Series(values.squeeze(place)), index.squeeze(place - 1)


@rule(aten.amax.default)
def amax(x: Series, dim: Sequence[int] = (), keepdim: bool = False) -> Series:
    """The largest over axes; on a tie, one of them."""
    return _extreme_over(x, dim, keepdim, torch.max)


@rule(aten.amin.default)
def amin(x: Series, dim: Sequence[int] = (), keepdim: bool = False) -> Series:
    """The smallest over axes; on a tie, one of them."""
    return _extreme_over(x, dim, keepdim, torch.min)


@rule(aten.max.default)
def max_all(x: Series) -> Series:
    """The largest of all."""
    return _extreme_over(x, (), False, torch.max)


@rule(aten.min.default)
def min_all(x: Series) -> Series:
    """The smallest of all."""
    return _extreme_over(x, (), False, torch.min)


def _extreme_over(x: Series, dims: Sequence[int] | int, keepdim: bool, find: FindExtreme) -> Series:
    for place in sorted(axes(dims, x.ndim), reverse=True):
        x = _extreme(x, place - 1, keepdim, find)[0]
    return x


@rule(aten.topk.default)
def topk(x: Series, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Series, Tensor]:
    """The k largest or smallest by c_0, and where they are."""
    place = axis(dim, x.ndim)
    index = torch.topk(x.coefficients[0], k, place - 1, largest, sorted).indices
    return Series(x.coefficients.gather(place, index.expand(x.coefficients.shape[0], *index.shape))), index


@rule(aten.sort.default)
def sort(x: Series, dim: int = -1, descending: bool = False) -> tuple[Series, Tensor]:
    """In the order of c_0, and the order."""
    place = axis(dim, x.ndim)
    index = torch.sort(x.coefficients[0], place - 1, descending).indices
    return Series(x.coefficients.gather(place, index.expand(x.coefficients.shape[0], *index.shape))), index
