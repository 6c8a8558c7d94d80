r"""Rules of linear algebra (inverses, solves, determinants, Cholesky factors, matrix exponential) and of products.

A X = B gives X_n = A_0^{-1} (B_n - sum_{j=1..n} A_j X_{n-j}). A = L L' gives
L_n = L_0 Phi(L_0^{-1} (A_n - sum_{0<i<n} L_i L_{n-i}') L_0^{-T}), where Phi takes the lower triangle and half of the
diagonal. (log det A)' = tr(A^{-1} A'). A function of a matrix is that of the block Toeplitz matrix of its coefficients.
(Griewank & Walther 2008, ch. 13; Higham 2008, *Functions of Matrices*, ch. 3.) Cost: one factorization, and
(k + 1)(k + 2) / 2 matrix products.

Example:
    >>> from tl_jets.calculus import Series
    >>> torch.linalg.inv(Series.line(2 * torch.eye(1), torch.eye(1), order=2)).coefficients.flatten()
    tensor([ 0.5000, -0.2500,  0.1250])
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tl_jets.calculus import recurrences
from tl_jets.calculus.rules_structure import constant, lift, terms_of
from tl_jets.calculus.series import Series, rule

aten = torch.ops.aten


def _solve(a: Tensor, b: Tensor, first: Callable[[Tensor], Tensor]) -> Tensor:
    """Coefficients of x with a x = b; `first` solves with a_0."""
    out: list[Tensor] = []
    for n in range(a.shape[0]):
        right = b[n]
        for j in range(1, n + 1):
            right = right - a[j] @ out[n - j]
        out.append(first(right))
    return torch.stack(out)


def _inverse(a: Tensor) -> Tensor:
    known = torch.linalg.inv_ex(a[0]).inverse
    one = constant(torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand(a.shape[1:]), len(a))
    return _solve(a, one, lambda right: known @ right)


@rule(aten.linalg_inv_ex.default)
def inv(x: Series, *, check_errors: bool = False) -> tuple[Series, Tensor]:
    """The inverse, and PyTorch's `info` for c_0."""
    info = torch.linalg.inv_ex(x.coefficients[0], check_errors=check_errors).info
    return Series(_inverse(x.coefficients)), info


@rule(aten._linalg_solve_ex.default)
def solve(a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False) -> tuple[Any, ...]:
    """The x with a x = b, or x a = b, and PyTorch's factors of c_0."""
    terms = terms_of(a, b)
    u, w = lift(a, terms), lift(b, terms)
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    w = w.unsqueeze(-1) if vector else w
    if not left:
        u, w = u.mT, w.mT
    factors, pivots, info = torch.linalg.lu_factor_ex(u[0], check_errors=check_errors)
    out = _solve(u, w, lambda right: torch.linalg.lu_solve(factors, pivots, right))
    out = out if left else out.mT
    return Series(out.squeeze(-1) if vector else out), factors, pivots, info


@rule(aten.linalg_solve_triangular.default)
def solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Series:
    """The x with a x = b, or x a = b; only one triangle of a is read."""
    terms = terms_of(a, b)
    u, w = lift(a, terms), lift(b, terms)
    u = u.triu(int(unitriangular)) if upper else u.tril(-int(unitriangular))
    if not left:
        u, w, upper = u.mT, w.mT, not upper

    def first(right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(u[0], right, upper=upper, unitriangular=unitriangular)

    out = _solve(u, w, first)
    return Series(out if left else out.mT)


@rule(aten.triangular_solve.default)
def triangular_solve(
    b: Tensor, a: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    """The x with a x = b, and a copy of a."""
    matrix, upper = (a.mT, not upper) if transpose else (a, upper)
    return torch.linalg.solve_triangular(matrix, b, upper=upper, unitriangular=unitriangular), a.clone()


@rule(aten.linalg_cholesky_ex.default)
def cholesky_ex(x: Series, *, upper: bool = False, check_errors: bool = False) -> tuple[Series, Tensor]:
    """The L with L L' = x, and PyTorch's `info` for c_0."""
    a = x.coefficients
    known, info = torch.linalg.cholesky_ex(a[0], check_errors=check_errors)
    out = [known]
    for n in range(1, a.shape[0]):
        # Only the lower triangle is read.
        rest = a[n].tril() + a[n].tril(-1).mT
        for i in range(1, n):
            rest = rest - out[i] @ out[n - i].mT
        half = torch.linalg.solve_triangular(known, rest, upper=False)
        inner = torch.linalg.solve_triangular(known.mT, half, upper=True, left=False).tril()
        out.append(known @ (inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))))
    factor = torch.stack(out)
    return Series(factor.mT.contiguous() if upper else factor), info


@rule(aten.cholesky.default)
def cholesky(x: Series, upper: bool = False) -> Series:
    """The L with L L' = x."""
    return torch.linalg.cholesky(x, upper=upper)  # type: ignore[return-value]


@rule(aten.cholesky_solve.default)
def cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """The x with L L' x = b."""
    lower = factor.mT if upper else factor
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


@rule(aten.cholesky_inverse.default)
def cholesky_inverse(factor: Series, upper: bool = False) -> Tensor:
    """The inverse of L L'."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return cholesky_solve(eye.expand(factor.shape), factor, upper)


@rule(aten._linalg_slogdet.default)
def slogdet(x: Series) -> tuple[Any, ...]:
    """Sign and logarithm of |det|, with PyTorch's factors of c_0."""
    sign, value, factors, pivots = aten._linalg_slogdet(x.coefficients[0])
    return sign, Series(_log_det(x.coefficients, value)), factors, pivots


@rule(aten._linalg_det.default)
def det(x: Series) -> tuple[Any, ...]:
    """The determinant of an invertible matrix, with PyTorch's factors of c_0."""
    value, factors, pivots = aten._linalg_det(x.coefficients[0])
    change = _log_det(x.coefficients, torch.zeros_like(value))
    return Series(recurrences.exponential(change) * value), factors, pivots


def _log_det(a: Tensor, value: Tensor) -> Tensor:
    """Coefficients of log det with c_0 = `value` and slope tr(a^{-1} a')."""
    terms = a.shape[0]
    inverse, slope = _inverse(a[:-1]) if terms > 1 else a[:0], recurrences.derivative(a)
    out = [value]
    for n in range(1, terms):
        traces = [(inverse[n - j] * slope[j - 1].mT).sum((-2, -1)) for j in range(1, n + 1)]
        out.append(torch.stack(traces).sum(0) / n)
    return torch.stack(out)


@rule(aten.linalg_matrix_exp.default)
def matrix_exp(x: Series) -> Series:
    """The exponential of a matrix."""
    a, size = x.coefficients, x.shape[-1]
    terms = a.shape[0]
    blocks = a.new_zeros((*x.shape[:-2], terms * size, terms * size))
    for row in range(terms):
        for column in range(row + 1):
            place = blocks[..., row * size : (row + 1) * size, column * size : (column + 1) * size]
            place.copy_(a[row - column])
    out = torch.linalg.matrix_exp(blocks)[..., :size]
    return Series(torch.stack(out.split(size, -2)))


# Products and sums along an axis. -----------------------------------------------------------------------------------


@rule(aten.prod.dim_int)
def prod(x: Series, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product over an axis by pairwise halving, valid where factors are 0."""
    out: Tensor = x if dtype is None else x.to(dtype)
    if out.ndim == 0:
        return out.clone()
    if out.shape[dim] == 0:
        out = torch.cat([out, out.new_ones([1 if i == dim % out.ndim else n for i, n in enumerate(out.shape)])], dim)
    while out.shape[dim] > 1:
        half = out.shape[dim] // 2
        pairs = out.narrow(dim, 0, half) * out.narrow(dim, half, half)
        rest = out.narrow(dim, 2 * half, out.shape[dim] - 2 * half)
        out = torch.cat([pairs, rest], dim) if rest.numel() else pairs
    return out.clone() if keepdim else out.squeeze(dim).clone()


@rule(aten.prod.default)
def prod_all(x: Series, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product over all axes."""
    return prod(x.flatten(), 0, dtype=dtype)  # type: ignore[arg-type]


@rule(aten.cumprod.default)
def cumprod(x: Series, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Running products along an axis."""
    return _scan(torch.mul, x if dtype is None else x.to(dtype), dim)


@rule(aten.logcumsumexp.default)
def logcumsumexp(x: Series, dim: int) -> Tensor:
    """Logarithm of the running sums of exponentials along an axis."""
    return _scan(torch.logaddexp, x, dim)


def _scan(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """Running results of an associative operation, in log2(length) steps."""
    shift, length = 1, x.shape[dim] if x.ndim else 1
    while shift < length:
        joined = combine(x.narrow(dim, shift, length - shift), x.narrow(dim, 0, length - shift))
        x = torch.cat([x.narrow(dim, 0, shift), joined], dim)
        shift *= 2
    return x.clone()
