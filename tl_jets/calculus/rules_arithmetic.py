"""Rules of arithmetic: sums, products, matrix products, quotients and reductions.

A product with a plain operand is one operation on the stacked tensor. The product of two series is the Cauchy product
(a b)_n = sum_i a_i b_{n-i} (Griewank & Walther 2008, table 13.1), at (k + 1)(k + 2) / 2 products. A plain term of a
sum changes c_0 only.

Example:
    >>> from tl_jets.calculus import Series
    >>> x = Series.line(torch.eye(2), torch.eye(2), order=2)
    >>> (x @ x).coefficients[:, 0, 0]
    tensor([1., 2., 1.])
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from tl_jets.calculus import recurrences
from tl_jets.calculus.rules_structure import align, axes, axis, terms_of, value_of
from tl_jets.calculus.series import RULES, Series, rule

aten = torch.ops.aten
Number = float | int
Operand = Tensor | float | int


def _coefficients(x: Series, other: Operand) -> Tensor:
    """Coefficients of x, ready to broadcast against `other`, in the dtype that PyTorch's promotion gives c_0."""
    if not isinstance(other, Tensor):
        return x.coefficients
    out = align(x, other.ndim)
    if other.dtype != x.dtype:
        out = out.to(torch.result_type(value_of(x), value_of(other)))
    return out


# Sums. --------------------------------------------------------------------------------------------------------------


@rule(aten.add.Tensor, aten.add.Scalar)
def add(a: Operand, b: Operand, alpha: Number = 1) -> Series:
    """Compute a + alpha b."""
    if isinstance(a, Series) and isinstance(b, Series):
        terms_of(a, b)
        return Series(torch.add(_coefficients(a, b), _coefficients(b, a), alpha=alpha))
    if isinstance(a, Series):
        return _add_constant(_coefficients(a, b), b, alpha)
    assert isinstance(b, Series)
    scaled = _coefficients(b, a) if alpha == 1 else _coefficients(b, a) * alpha
    return _add_constant(scaled, a, 1)


def _add_constant(coefficients: Tensor, b: Operand, alpha: Number) -> Series:
    """Add alpha b to c_0."""
    if isinstance(b, Tensor) and b.shape != coefficients.shape[1:]:
        shape = torch.broadcast_shapes(coefficients.shape[1:], b.shape)
        coefficients = coefficients.expand(coefficients.shape[0], *shape)
    out = coefficients.clone(memory_format=torch.contiguous_format)
    out[0].add_(b, alpha=alpha)
    return Series(out)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(a: Operand, b: Operand, alpha: Number = 1) -> Series:
    """Compute a - alpha b."""
    return add(a, b, -alpha)


# Products. ----------------------------------------------------------------------------------------------------------


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(a: Operand, b: Operand) -> Series:
    """Elementwise a * b."""
    if not isinstance(a, Series):
        a, b = b, a
    assert isinstance(a, Series)
    if not isinstance(b, Series):
        return Series(_coefficients(a, b) * b)
    terms_of(a, b)
    if a is b:
        return Series(recurrences.square(a.coefficients))
    return Series(recurrences.product(_coefficients(a, b), _coefficients(b, a)))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(a: Operand, b: Operand) -> Series:
    """Elementwise a / b."""
    if not isinstance(b, Series):
        assert isinstance(a, Series)
        return Series(_coefficients(a, b) / b)
    if not isinstance(a, Series):
        return Series(recurrences.reciprocal(_coefficients(b, a)) * a)
    terms_of(a, b)
    if a.shape == b.shape:
        return Series(recurrences.quotient(_coefficients(a, b), _coefficients(b, a)))
    return Series(recurrences.product(_coefficients(a, b), recurrences.reciprocal(_coefficients(b, a))))


# Matrix products. ---------------------------------------------------------------------------------------------------


@rule(aten.mm.default)
def mm(a: Tensor, b: Tensor) -> Series:
    """The product of two matrices."""
    if isinstance(a, Series) and isinstance(b, Series):
        terms_of(a, b)
        return Series(_bmm_series(a.coefficients.unsqueeze(1), b.coefficients.unsqueeze(1)).squeeze(1))
    if isinstance(a, Series):
        return Series(_rows_times(a.coefficients, b))
    assert isinstance(b, Series)
    return Series(torch.matmul(a, b.coefficients))


@rule(aten.bmm.default)
def bmm(a: Tensor, b: Tensor) -> Series:
    """The products of two batches of matrices."""
    if isinstance(a, Series) and isinstance(b, Series):
        terms_of(a, b)
        return Series(_bmm_series(a.coefficients, b.coefficients))
    if isinstance(a, Series):
        if b.shape[0] == 1:
            return Series(_rows_times(a.coefficients.squeeze(1), b[0]).unsqueeze(1))
        return Series(_each_order(a.coefficients, b.expand(a.coefficients.shape[0], *b.shape)))
    assert isinstance(b, Series)
    return Series(_each_order(a.expand(b.coefficients.shape[0], *a.shape), b.coefficients))


def _rows_times(a: Tensor, b: Tensor) -> Tensor:
    """[terms, n, m] @ [m, p] as one product of terms * n rows."""
    return torch.mm(a.reshape(-1, a.shape[-1]), b).view(*a.shape[:-1], b.shape[-1])


def _each_order(a: Tensor, b: Tensor) -> Tensor:
    """Batched product order by order, without copying the operand that all orders share."""
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for left, right, target in zip(a, b, out, strict=True):
        torch.bmm(left, right, out=target)
    return out


def _bmm_series(a: Tensor, b: Tensor) -> Tensor:
    """Cauchy product of batched matrices, accumulated in place."""
    out = a.new_empty((*a.shape[:-1], b.shape[-1]))
    for n in range(a.shape[0]):
        torch.bmm(a[0], b[n], out=out[n])
        for i in range(1, n + 1):
            out[n].baddbmm_(a[i], b[n - i])
    return out


@rule(aten.mv.default)
def mv(a: Tensor, b: Tensor) -> Series:
    """A matrix times a vector."""
    return Series(mm(a, b.unsqueeze(1)).coefficients.squeeze(-1))


def add_product(
    multiply: Callable[..., Tensor], x: Tensor, a: Tensor, b: Tensor, *, beta: Number = 1, alpha: Number = 1
) -> Tensor:
    """Compute beta x + alpha a b; beta = 0 ignores x, even NaN."""
    fresh = multiply(a, b)
    if not isinstance(fresh, Series):
        return add(x if beta == 1 else x * beta, fresh, alpha)
    if alpha != 1:
        fresh.coefficients.mul_(alpha)
    if beta != 0:
        if isinstance(x, Series):
            terms_of(fresh, x)
            fresh.coefficients.add_(align(x, fresh.ndim), alpha=beta)
        else:
            fresh.coefficients[0].add_(x, alpha=beta)
    return fresh


_ADDED_PRODUCTS = {
    aten.addmm.default: torch.mm,
    aten.baddbmm.default: torch.bmm,
    aten.addmv.default: torch.mv,
    aten.addbmm.default: lambda a, b: torch.bmm(a, b).sum(0),
}
RULES.update({operation: partial(add_product, multiply) for operation, multiply in _ADDED_PRODUCTS.items()})


@rule(aten._trilinear.default)
def trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Unsqueeze three tensors, multiply them and sum over `sumdim`."""
    for place in expand1:
        a = a.unsqueeze(place)
    for place in expand2:
        b = b.unsqueeze(place)
    for place in expand3:
        c = c.unsqueeze(place)
    return (a * b * c).sum(list(sumdim))


@rule(aten._cdist_forward.default)
def cdist(a: Tensor, b: Tensor, p: Number, compute_mode: int | None = None) -> Tensor:
    """Distances from all rows of a to all rows of b."""
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


@rule(aten._pdist_forward.default)
def pdist(x: Series, p: Number = 2) -> Tensor:
    """Distances from each row to the later ones."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)


# Reductions. --------------------------------------------------------------------------------------------------------


def reduced(
    function: Callable[..., Tensor],
    x: Series,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Series:
    """The sum or mean over some axes, or all."""
    if x.ndim == 0:
        return Series(x.coefficients.to(dtype or x.dtype, copy=True))
    return Series(function(x.coefficients, axes(dim, x.ndim), keepdim, dtype=dtype))


RULES.update({operation: partial(reduced, torch.sum) for operation in (aten.sum.default, aten.sum.dim_IntList)})
RULES.update({operation: partial(reduced, torch.mean) for operation in (aten.mean.default, aten.mean.dim)})


@rule(aten.cumsum.default)
def cumsum(x: Series, dim: int, *, dtype: torch.dtype | None = None) -> Series:
    """Running sums along an axis."""
    if x.ndim == 0:
        return Series(x.coefficients.to(dtype or x.dtype, copy=True))
    return Series(x.coefficients.cumsum(axis(dim, x.ndim), dtype=dtype))


@rule(aten.var_mean.correction)
def var_mean(
    x: Series, dim: Sequence[int] | None = None, *, correction: Number | None = None, keepdim: bool = False
) -> tuple[Series, Series]:
    """Variance, sum (x - mean)^2 / (count - correction), and mean."""
    places = axes(dim, x.ndim)
    center = x.coefficients.mean(places, keepdim=True)
    count = x.coefficients[0].numel() // max(center[0].numel(), 1)
    degrees = max(count - (1 if correction is None else correction), 0)
    squares = recurrences.square(x.coefficients - center)
    center = center if keepdim else center.squeeze(places)
    return Series(squares.sum(places, keepdim).div_(degrees)), Series(center)


@rule(aten.var.correction)
def var(x: Series, dim: Sequence[int] | None = None, **options: Any) -> Series:
    """The variance."""
    return var_mean(x, dim, **options)[0]


@rule(aten.std.correction)
def std(x: Series, dim: Sequence[int] | None = None, **options: Any) -> Series:
    """The standard deviation; constant where it is 0."""
    return Series(recurrences.root_of_squares(var_mean(x, dim, **options)[0].coefficients))


@rule(aten.linalg_vector_norm.default)
def vector_norm(
    x: Series,
    ord: Number = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Series:
    """The norm; constant where it is 0."""
    if ord == 2:
        squares = reduced(torch.sum, Series(recurrences.square(x.coefficients)), dim, keepdim, dtype=dtype)
        return Series(recurrences.root_of_squares(squares.coefficients))
    norm = decomposition_table[aten.linalg_vector_norm.default](x, ord, dim, keepdim, dtype=dtype)
    norm.coefficients[1:].masked_fill_(norm.coefficients[0] == 0, 0)
    return norm
