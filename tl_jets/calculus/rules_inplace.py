"""Rules that write into a series: `x[...] = y`, `copy_`, `fill_`, masks and index lists.

PyTorch turns `x[:, :, h] = y` into a `copy_` or `fill_` on a view of x; views of a Series share its storage. A plain
value is written to c_0, with zeros above. Other in-place operations `op_` copy the result of `op` back
(`tl_jets.calculus.series`).

Example:
    >>> from tl_jets.calculus import Series
    >>> x = Series.line(torch.ones(3), torch.ones(3), order=1)
    >>> x[1] = 5.0
    >>> x.coefficients
    tensor([[1., 5., 1.],
            [1., 0., 1.]])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tl_jets.calculus.rules_structure import align, lift, terms_of
from tl_jets.calculus.series import Series, writable
from tl_jets.calculus.table import rule

aten = torch.ops.aten


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
