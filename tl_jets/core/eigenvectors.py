r"""The largest eigenvectors of a symmetric positive matrix that is only applied, by a block Krylov method.

From a block X of random vectors, the subspace of X, GX, GGX, ... grows by a block a step. With an orthonormal basis Q of it, the
eigenvectors of Q' G Q are the best guesses (Rayleigh and Ritz), and the residual |Gv - theta v| says how good they are.

Source: Golub and Van Loan, *Matrix Computations*, section 10.3 (block Lanczos, here with full orthogonalization).

Example:
    >>> import torch
    >>> G = torch.diag(torch.tensor([1.0, 9.0, 4.0, 0.5, 0.1, 0.0]).double())
    >>> found = largest_eigenvectors(lambda x: x @ G, torch.ones(2, 6).double().triu(), 1, torch.float64)
    >>> found.abs().round(decimals=6).tolist()
    [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def largest_eigenvectors(
    apply: Callable[[Tensor], Tensor], start: Float[Tensor, "block size"], k: int, dtype: torch.dtype
) -> Float[Tensor, "k size"]:
    """The k largest eigenvectors, orthonormal, largest first, float64.

    Args:
        apply: G x for vectors [many, size], to the rounding of `dtype`.
        start: The first block, at least k vectors.
        k: Number of eigenvectors.
        dtype: Precision of the products: the residual |G v - theta v| falls to 16 of its units, relative to the largest theta.

    Returns:
        The eigenvectors; the residual is that, or where rounding stops it from falling.
    """
    size, goal, before = start.shape[1], 16 * torch.finfo(dtype).eps, float("inf")
    block = _orthonormal(start.double()[:size], start.new_zeros(0, size).double())
    basis, images = block[:0], block[:0]
    while True:
        basis, images = torch.cat([basis, block]), torch.cat([images, apply(block).double()])
        projected = images @ basis.T
        squares, ritz = torch.linalg.eigh((projected + projected.T) / 2)
        best = ritz.T.flip(0)[:k]
        residuals = best @ images - squares.flip(0)[:k, None] * (best @ basis)
        error = float(residuals.norm(dim=1).max() / squares[-1].clamp_min(torch.finfo(torch.float64).tiny))
        is_stuck = error > before / 2 and error < goal**0.5
        block = _orthonormal(images[-len(block) :], basis)[: size - len(basis)]
        if error <= goal or is_stuck or not len(block):
            return best @ basis
        before = error


def _orthonormal(vectors: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what the vectors add to an orthonormal basis; directions of rounding are left out."""
    size = vectors.norm(dim=1).max()
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        vectors = vectors - (vectors @ basis.T) @ basis
    _, values, right = torch.linalg.svd(vectors, full_matrices=False)
    right = right[values > 1e-12 * size]
    right = right - (right @ basis.T) @ basis
    return torch.linalg.qr(right.T)[0].T
