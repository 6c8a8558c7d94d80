"""Rules of piecewise functions: relu, clamp, abs, extrema, sorting.

Each follows the branch that c_0 takes: the coefficients of the piece or element that PyTorch's function selects at c_0.
At a kink the convention is that of PyTorch's derivatives. (Griewank & Walther 2008, *Evaluating Derivatives*, ch. 14.)

Example:
    >>> from tl_jets.calculus import Series
    >>> torch.relu(Series.line(torch.tensor([-1.0, 2.0]), torch.ones(2), order=1)).coefficients
    tensor([[0., 2.],
            [0., 1.]])
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from tl_jets.calculus.rules_structure import align, axes, axis, value_of, where
from tl_jets.calculus.series import Series
from tl_jets.calculus.table import RULES, rule

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
    """|x|; constant where x is 0."""
    return Series(x.coefficients * x.coefficients[0].sign())


@rule(aten.relu.default)
def relu(x: Series) -> Series:
    """max(x, 0); constant where x is 0."""
    value = x.coefficients[0]
    return _on_branch(x, value > 0, value.relu())


@rule(aten.leaky_relu.default)
def leaky_relu(x: Series, negative_slope: Number = 0.01) -> Series:
    """Compute x, or negative_slope x where x <= 0."""
    return Series(torch.where(x.coefficients[0] > 0, x.coefficients, x.coefficients * negative_slope))


@rule(aten.rrelu_with_noise.default)
def rrelu(
    x: Series, noise: Any, lower: Number = 0.125, upper: Number = 1 / 3, training: bool = False, generator: Any = None
) -> Series:
    """Compute x, or the mean slope times x where x <= 0; training mode, which is random, raises."""
    if training:
        raise NotImplementedError("rrelu in training mode is random. Call eval() on the module that holds it.")
    return leaky_relu(x, (lower + upper) / 2)


@rule(aten.hardtanh.default)
def hardtanh(x: Series, min_val: Number = -1, max_val: Number = 1) -> Series:
    """Clip x to two numbers; constant at and beyond them."""
    value = x.coefficients[0]
    return _on_branch(x, (value > min_val) & (value < max_val), F.hardtanh(value, min_val, max_val))


@rule(aten.clamp.default, aten.clamp.Tensor)
def clamp(x: Tensor, min: Operand | None = None, max: Operand | None = None) -> Tensor:
    """Clip x to two bounds; at a bound it has the slope of x."""
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
    """The larger operand; the first on a tie."""
    return _choose(a, b, value_of(a) >= value_of(b))


@rule(aten.minimum.default)
def minimum(a: Tensor, b: Tensor) -> Tensor:
    """The smaller operand; the first on a tie."""
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
    """Replace NaN and infinities by constants."""
    value = x.coefficients[0]
    return _on_branch(x, value.isfinite(), value.nan_to_num(nan, posinf, neginf))


@rule(aten.max.dim)
def max_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    """The largest element along an axis, and its index."""
    return _extreme(x, dim, keepdim, torch.max)


@rule(aten.min.dim)
def min_dim(x: Series, dim: int, keepdim: bool = False) -> tuple[Series, Tensor]:
    """The smallest element along an axis, and its index."""
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
    """The largest element over axes; one of them on a tie."""
    return _extreme_over(x, dim, keepdim, torch.max)


@rule(aten.amin.default)
def amin(x: Series, dim: Sequence[int] = (), keepdim: bool = False) -> Series:
    """The smallest element over axes; one of them on a tie."""
    return _extreme_over(x, dim, keepdim, torch.min)


@rule(aten.max.default)
def max_all(x: Series) -> Series:
    """The largest element."""
    return _extreme_over(x, (), False, torch.max)


@rule(aten.min.default)
def min_all(x: Series) -> Series:
    """The smallest element."""
    return _extreme_over(x, (), False, torch.min)


def _extreme_over(x: Series, dims: Sequence[int] | int, keepdim: bool, find: FindExtreme) -> Series:
    places = sorted(axes(dims, x.ndim), reverse=True)
    for place in places:
        x = _extreme(x, place - 1, keepdim, find)[0]
    return x if places else Series(x.coefficients.clone())


@rule(aten.topk.default)
def topk(x: Series, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Series, Tensor]:
    """The k largest or smallest elements by c_0, and their indices."""
    place = axis(dim, x.ndim)
    index = torch.topk(x.coefficients[0], k, place - 1, largest, sorted).indices
    return Series(x.coefficients.gather(place, index.expand(x.coefficients.shape[0], *index.shape))), index


@rule(aten.sort.default, aten.sort.stable)
def sort(x: Series, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> tuple[Series, Tensor]:
    """The elements sorted by c_0, and their indices."""
    place = axis(dim, x.ndim)
    index = torch.sort(x.coefficients[0], stable=bool(stable), dim=place - 1, descending=descending).indices
    return Series(x.coefficients.gather(place, index.expand(x.coefficients.shape[0], *index.shape))), index


def pick(operation: OpOverload, x: Series, *args: Any, **kwargs: Any) -> tuple[Series, Tensor]:
    """Select by c_0 for an operation that returns (values, indices) along an axis."""
    dim = next((arg.name, i) for i, arg in enumerate(operation._schema.arguments) if arg.name == "dim")
    index = operation(x.coefficients[0], *args, **kwargs)[1]
    given = kwargs.get(dim[0], args[dim[1] - 1] if len(args) >= dim[1] else -1)
    place = axis(given, x.ndim)
    if x.ndim == 0:
        return Series(x.coefficients.clone()), index
    dropped = index.ndim < x.ndim
    full = index.unsqueeze(place - 1) if dropped else index
    values = x.coefficients.gather(place, full.expand(x.coefficients.shape[0], *full.shape))
    return Series(values.squeeze(place) if dropped else values), index


def pick_in_window(operation: OpOverload, axes_of_window: int, x: Series, *args: Any, **kwargs: Any) -> Any:
    """Select by c_0 for a pooling that returns (values, flat indices) over the last axes."""
    index = operation(x.coefficients[0], *args, **kwargs)[1]
    flat = x.coefficients.flatten(-axes_of_window)
    places = index.flatten(-axes_of_window)
    values = flat.gather(-1, places.expand(flat.shape[0], *places.shape))
    return Series(values.view(flat.shape[0], *index.shape)), index


@rule(aten.median.default)
def median(x: Series) -> Tensor:
    """The median of all elements."""
    return torch.median(x.flatten(), 0).values


@rule(aten.nanmedian.default)
def nanmedian(x: Series) -> Tensor:
    """The median of all elements, ignoring NaN."""
    return torch.nanmedian(x.flatten(), 0).values


_PICKS = [aten.cummax.default, aten.cummin.default, aten.kthvalue.default, aten.mode.default]
_PICKS += [aten.median.dim, aten.nanmedian.dim]
RULES.update({operation: partial(pick, operation) for operation in _PICKS})
_PICKS_IN_WINDOW = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.fractional_max_pool2d.default: 2,
}
RULES.update({operation: partial(pick_in_window, operation, count) for operation, count in _PICKS_IN_WINDOW.items()})
