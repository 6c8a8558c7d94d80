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
from tl_jets.calculus.series import RULES, Series, rule

aten = torch.ops.aten
Number = float | int


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


@rule(aten.rrelu_with_noise.default)
def rrelu(
    x: Series, noise: Any, lower: Number = 0.125, upper: Number = 1 / 3, training: bool = False, generator: Any = None
) -> Tensor:
    """Compute x, or the mean slope times x where x <= 0; training mode, which is random, raises."""
    if training:
        raise NotImplementedError("rrelu in training mode is random. Call eval() on the module that holds it.")
    return F.leaky_relu(x, (lower + upper) / 2)


@rule(aten.hardtanh.default)
def hardtanh(x: Series, min_val: Number = -1, max_val: Number = 1) -> Series:
    """Clip x to two numbers; constant at and beyond them."""
    value = x.coefficients[0]
    return _on_branch(x, (value > min_val) & (value < max_val), F.hardtanh(value, min_val, max_val))


# Which pairs give the first operand: also on a tie, and for the last two where the other is NaN.
_TAKES_FIRST: dict[OpOverload, Callable[[Tensor, Tensor], Tensor]] = {
    aten.maximum.default: lambda a, b: a >= b,
    aten.minimum.default: lambda a, b: a <= b,
    aten.fmax.default: lambda a, b: (a >= b) | b.isnan(),
    aten.fmin.default: lambda a, b: (a <= b) | b.isnan(),
}


def choose(takes_first: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Series:
    """One of two operands, elementwise, by c_0."""
    return where(takes_first(value_of(a), value_of(b)), a, b)


RULES.update({operation: partial(choose, takes_first) for operation, takes_first in _TAKES_FIRST.items()})


@rule(aten.nan_to_num.default)
def nan_to_num(
    x: Series, nan: Number | None = None, posinf: Number | None = None, neginf: Number | None = None
) -> Series:
    """Replace NaN and infinities by constants."""
    value = x.coefficients[0]
    return _on_branch(x, value.isfinite(), value.nan_to_num(nan, posinf, neginf))


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


def pick_over(operation: OpOverload, x: Series, dims: Sequence[int] = (), keepdim: bool = False) -> Series:
    """The largest or smallest element over axes, or all; one of them on a tie."""
    places = sorted(axes(dims, x.ndim), reverse=True)
    for place in places:
        x = pick(operation, x, place - 1, keepdim)[0]
    return x if places else Series(x.coefficients.clone())


def pick_of_all(operation: OpOverload, x: Series) -> Series:
    """Select among all elements by c_0."""
    return pick(operation, x.flatten(), 0)[0]  # type: ignore[arg-type]


_PICKS = [
    aten.max.dim,
    aten.min.dim,
    aten.cummax.default,
    aten.cummin.default,
    aten.kthvalue.default,
    aten.mode.default,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
]
RULES.update({operation: partial(pick, operation) for operation in _PICKS})
_PICKS_IN_WINDOW = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
    aten.fractional_max_pool2d.default: 2,
}
RULES.update({operation: partial(pick_in_window, operation, count) for operation, count in _PICKS_IN_WINDOW.items()})
RULES.update({operation: partial(pick_over, aten.max.dim) for operation in (aten.amax.default, aten.max.default)})
RULES.update({operation: partial(pick_over, aten.min.dim) for operation in (aten.amin.default, aten.min.default)})
RULES[aten.median.default] = partial(pick_of_all, aten.median.dim)
RULES[aten.nanmedian.default] = partial(pick_of_all, aten.nanmedian.dim)
