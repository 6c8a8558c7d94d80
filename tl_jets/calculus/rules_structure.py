"""Rules of shapes, indexing, joining, masks, writing, predicates and constants, which move numbers without arithmetic.

They act on the stacked tensor with every axis shifted by one. Constants (`where`, `masked_fill`, padding) enter c_0,
with zeros above. Predicates and sizes read c_0.

Example:
    >>> from tl_jets.calculus import Series
    >>> x = Series.line(torch.ones(2, 3), torch.ones(2, 3), order=1)
    >>> x.transpose(0, 1).coefficients.shape
    torch.Size([2, 3, 2])
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from tl_jets.calculus.series import RULES, Series, rule, writable

aten = torch.ops.aten


def axis(dim: int, ndim: int) -> int:
    """The index in the stacked tensor of axis `dim` of the series."""
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError(f"dim lies in [{-ndim}, {ndim - 1}]; got {dim}. Choose an axis of the tensor.")
    return dim % max(ndim, 1) + 1


def axes(dims: Sequence[int] | int | None, ndim: int) -> list[int]:
    """The indices of several axes; None or no axis means all."""
    if dims is None:
        return list(range(1, ndim + 1))
    dims = [dims] if isinstance(dims, int) else dims
    return [axis(dim, ndim) for dim in dims] or list(range(1, ndim + 1))


def align(series: Series, ndim: int) -> Tensor:
    """The coefficients, with axes of length 1 inserted after the first so that `ndim` axes follow it."""
    coefficients = series.coefficients
    missing = ndim - series.ndim
    if missing <= 0:
        return coefficients
    return coefficients.view(coefficients.shape[0], *(1,) * missing, *series.shape)


def value_of(x: Any) -> Any:
    """c_0 of a series, also inside lists; other values unchanged."""
    if isinstance(x, Series):
        return x.coefficients[0]
    return [value_of(item) for item in x] if isinstance(x, list | tuple) else x


def terms_of(*operands: Any) -> int:
    """The common number of coefficients of all series; raises ValueError if they differ."""
    counts = {operand.coefficients.shape[0] for operand in operands if isinstance(operand, Series)}
    if len(counts) != 1:
        raise ValueError(
            f"series that meet have one order; got orders {sorted(count - 1 for count in counts)}. "
            "Compute both with the same order."
        )
    return counts.pop()


def constant(value: Tensor, terms: int) -> Tensor:
    """Coefficients of a constant: value, 0, ..., 0."""
    coefficients = value.new_zeros((terms, *value.shape))
    coefficients[0] = value
    return coefficients


def lift(operand: Tensor, terms: int) -> Tensor:
    """Coefficients of a series, or of a plain tensor as a constant."""
    return operand.coefficients if isinstance(operand, Series) else constant(operand, terms)


# Operations that act on every coefficient alike. --------------------------------------------------------------------

_AXES = ("dim", "dims", "dim0", "dim1", "dim2", "dimension")
_ALIKE = [
    aten.transpose.int,
    aten.flip.default,
    aten.unfold.default,
    aten.diagonal.default,
    aten.tril.default,
    aten.triu.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.index_select.default,
    aten.neg.default,
]


def alike(operation: OpOverload) -> Callable[..., Any]:
    """The rule of an operation that acts on every coefficient alike: the axes that it names are shifted by one."""
    arguments = operation._schema.arguments[1:]
    named = [place for place, argument in enumerate(arguments) if argument.name in _AXES]
    defaults = [argument.default_value for argument in arguments[: max(named, default=-1) + 1]]

    def act(x: Series, *args: Any, **kwargs: Any) -> Series | list[Series]:
        given = [*args, *defaults[len(args) :]]
        for place in named:
            dims = given[place]
            given[place] = axis(dims, x.ndim) if isinstance(dims, int) else [axis(dim, x.ndim) for dim in dims]
        found = operation(x.coefficients, *given, **kwargs)
        return Series(found) if isinstance(found, Tensor) else [Series(part) for part in found]

    return act


RULES.update({operation: alike(operation) for operation in _ALIKE})


# Shape. -------------------------------------------------------------------------------------------------------------


def alias(x: Series) -> Tensor:
    """A new wrapper of the same storage."""
    return x.coefficients.view_as(x.coefficients)


def reshape(x: Series, size: Sequence[int]) -> Tensor:
    """Reshape, with a copy if needed."""
    return x.coefficients.reshape(x.order + 1, *size)


def spread(x: Series, dim: int, index: Tensor) -> tuple[int, Tensor]:
    """An axis and an index along it, for the stacked tensor."""
    return axis(dim, x.ndim), index.expand(x.order + 1, *index.shape)


# The coefficients of the result.
_SHAPED: dict[OpOverload, Callable[..., Tensor]] = {
    aten.alias.default: alias,
    aten.detach.default: alias,
    aten.lift_fresh.default: alias,
    aten.view.default: lambda x, size: x.coefficients.view(x.order + 1, *size),
    aten.reshape.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.permute.default: lambda x, dims: x.coefficients.permute(0, *(axis(dim, x.ndim) for dim in dims)),
    aten.unsqueeze.default: lambda x, dim: x.coefficients.unsqueeze(axis(dim, x.ndim + 1)),
    aten.squeeze.dims: lambda x, dims: x.coefficients.squeeze([axis(dim, x.ndim) for dim in dims] if x.ndim else []),
    aten.expand.default: lambda x, size, **_: align(x, len(size)).expand(x.order + 1, *size),
    aten.gather.default: lambda x, dim, index, **_: x.coefficients.gather(*spread(x, dim, index)),
}


def shaped(function: Callable[..., Tensor], x: Series, *args: Any, **kwargs: Any) -> Series:
    """A series of the coefficients that a function gives."""
    return Series(function(x, *args, **kwargs))


RULES.update({operation: partial(shaped, function) for operation, function in _SHAPED.items()})


@rule(aten.clone.default)
def clone(x: Series, *, memory_format: torch.memory_format | None = None) -> Series:
    """A copy in new storage."""
    if memory_format in (None, torch.preserve_format):
        return Series(x.coefficients.clone())
    return Series(x.coefficients.clone(memory_format=torch.contiguous_format))


@rule(aten.constant_pad_nd.default)
def pad(x: Series, pad: Sequence[int], value: float | int = 0) -> Series:
    """Pad with `value` in c_0 and zeros above."""
    padded = aten.constant_pad_nd(x.coefficients, pad, 0)
    if value != 0:
        inside = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        padded[0].masked_fill_(~aten.constant_pad_nd(inside, pad, False), value)
    return Series(padded)


@rule(aten._to_copy.default)
def to_copy(x: Series, **options: Any) -> Series | Tensor:
    """Convert dtype, device or layout; an integer or boolean dtype returns c_0 as a plain tensor."""
    dtype = options.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        return aten._to_copy(x.coefficients[0], **options)
    options.pop("memory_format", None)
    return Series(aten._to_copy(x.coefficients, **options))


# Indexing. ----------------------------------------------------------------------------------------------------------


@rule(aten.index.Tensor)
def index(x: Series, indices: Sequence[Tensor | None]) -> Series:
    """Index by lists and masks."""
    used = [place for place, one in enumerate(indices) if one is not None]
    if used[-1] - used[0] + 1 == len(used):
        return Series(aten.index(x.coefficients, [None, *indices]))
    # Non-adjacent index lists move their axes first, before the axis of orders: index each order separately.
    return Series(torch.stack([aten.index(coefficient, indices) for coefficient in x.coefficients]))


@rule(aten.scatter.src)
def scatter(
    x: Tensor, dim: int, index: Tensor, src: Tensor, operation: Callable[..., Tensor] = Tensor.scatter
) -> Series:
    """Scatter elements of `src`."""
    terms = terms_of(x, src)
    index = index.expand(terms, *index.shape)
    return Series(operation(lift(x, terms), axis(dim, x.ndim), index, lift(src, terms)))


RULES[aten.scatter_add.default] = partial(scatter, operation=Tensor.scatter_add)


@rule(aten.scatter.value)
def scatter_value(x: Series, dim: int, index: Tensor, value: float | int) -> Series:
    """Scatter a number into c_0, with zeros above."""
    out = x.coefficients.scatter(*spread(x, dim, index), 0)
    out[0].scatter_(dim, index, value)
    return Series(out)


# Joining. -----------------------------------------------------------------------------------------------------------


@rule(aten.cat.default)
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Series:
    """Concatenate along an axis; plain tensors are constants."""
    terms = terms_of(*tensors)
    # PyTorch allows an empty vector among tensors of any rank.
    joined = [tensor for tensor in tensors if tensor.shape != (0,)] or list(tensors)
    return Series(torch.cat([lift(tensor, terms) for tensor in joined], axis(dim, joined[0].ndim)))


@rule(aten.stack.default)
def stack(tensors: Sequence[Tensor], dim: int = 0) -> Series:
    """Stack along a new axis; plain tensors are constants."""
    terms = terms_of(*tensors)
    return Series(torch.stack([lift(tensor, terms) for tensor in tensors], axis(dim, tensors[0].ndim + 1)))


@rule(aten.where.self)
def where(condition: Tensor, a: Tensor, b: Tensor) -> Series:
    """Select elementwise; plain tensors and numbers are constants."""
    condition = value_of(condition)
    ndim = max(condition.ndim, a.ndim, b.ndim)
    if isinstance(a, Series) and isinstance(b, Series):
        terms_of(a, b)
        return Series(torch.where(condition, align(a, ndim), align(b, ndim)))
    first = torch.where(condition, value_of(a), value_of(b))
    if isinstance(a, Series):
        stacked = torch.where(condition, align(a, ndim), 0)
    else:
        assert isinstance(b, Series)
        stacked = torch.where(condition, 0, align(b, ndim))
    if stacked.shape[1:] != first.shape or stacked.dtype != first.dtype:
        stacked = stacked.expand(stacked.shape[0], *first.shape).to(first.dtype, copy=True)
    stacked[0] = first
    return Series(stacked)


@rule(aten.masked_fill.Scalar)
def masked_fill(x: Series, mask: Tensor, value: float | int) -> Series:
    """Put a number under the mask in c_0, with zeros above."""
    out = align(x, max(x.ndim, mask.ndim)).masked_fill(mask, 0)
    out[0].masked_fill_(mask, value)
    return Series(out)


# Predicates, piecewise constant functions and constants. ------------------------------------------------------------

_LOOKS_AT_VALUE = [
    *(
        getattr(getattr(aten, name), kind)
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind in ("Tensor", "Scalar")
    ),
    *(
        getattr(aten, name).default
        for name in (
            *("isnan", "isinf", "isposinf", "isneginf", "signbit", "sign", "sgn", "floor", "ceil", "round", "trunc"),
            *("argmax", "argmin", "any", "all", "equal", "allclose", "nonzero", "count_nonzero"),
            *("logical_not", "logical_and", "logical_or", "logical_xor"),
        )
    ),
    *(getattr(getattr(aten, name), kind) for name in ("any", "all") for kind in ("dim", "dims")),
    aten.round.decimals,
    aten.searchsorted.Tensor,
    aten.bucketize.Tensor,
    aten.count_nonzero.dim_IntList,
]
_MAKES_CONSTANT = [
    getattr(aten, name).default
    for name in (
        *("zeros_like", "ones_like", "empty_like", "full_like"),
        *("new_zeros", "new_ones", "new_empty", "new_full"),
    )
]


def look_at_value(operation: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Apply a predicate or piecewise constant function to c_0; the result is a plain tensor."""
    return operation(*value_of(args), **kwargs)


def make_constant(operation: OpOverload, x: Series, *args: Any, **kwargs: Any) -> Series | Tensor:
    """Return `zeros_like(x)` and the like as a series, so that series can be written into it; plain if not floating point."""
    value = operation(x.coefficients[0], *args, **kwargs)
    return Series(constant(value, x.coefficients.shape[0])) if value.is_floating_point() else value


RULES.update({operation: partial(look_at_value, operation) for operation in _LOOKS_AT_VALUE})
RULES.update({operation: partial(make_constant, operation) for operation in _MAKES_CONSTANT})


# Writing into a series: `x[...] = y`, `copy_`, `fill_`. ----------------------------------------------------------------
# A plain value is written to c_0, with zeros above. Other in-place operations copy their result back (`series.py`).


@rule(aten.copy_.default, aten.fill_.Tensor)
def copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Series:
    """Overwrite x with `source`; a plain source is a constant."""
    target = writable(x, "copy_")
    if isinstance(source, Series):
        terms_of(target, source)
        target.coefficients.copy_(align(source, x.ndim), non_blocking)
    else:
        target.coefficients[0].copy_(source, non_blocking)
        target.coefficients[1:].zero_()
    return target


@rule(aten.copy.default, aten.fill.Tensor)
def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Series:
    """`source`, broadcast to the shape of x."""
    terms = terms_of(x, source)
    return copy_(Series(lift(x, terms).clone()), source, non_blocking)


@rule(aten.fill.Scalar)
def fill(x: Series, value: float | int) -> Series:
    """A constant number in the shape of x."""
    out = torch.zeros_like(x.coefficients)
    out[0].fill_(value)
    return Series(out)


@rule(aten.index_put_.default, aten._index_put_impl_.default)
def index_put_(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Series:
    """Write or add `values` at index lists and masks."""
    target = writable(x, "index_put_")
    terms = terms_of(target, values)
    # Write each order separately: index lists may move axes, and the axis of orders must stay first.
    for order in range(terms):
        if isinstance(values, Series):
            aten.index_put_(target.coefficients[order], indices, values.coefficients[order], accumulate)
        elif order == 0:
            aten.index_put_(target.coefficients[0], indices, values, accumulate)
        elif not accumulate:
            aten.index_put_(target.coefficients[order], indices, torch.zeros_like(values), False)
    return target


@rule(aten.index_put.default)
def index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Series:
    """A copy of x with `values` at index lists and masks."""
    terms = terms_of(x, values)
    return index_put_(Series(lift(x, terms).clone()), indices, values, accumulate)
