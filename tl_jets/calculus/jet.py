r"""The jet of any tensor function: its truncated Taylor series at a center, evaluated at a variate.

For center x, variate y and v = y - x,

    c_j = D^j f(x)[v, ..., v] / j!,    J^k f(x)(y) = c_0 + ... + c_k

(Chen et al., *Jet Expansions of Residual Computation*, arXiv 2410.06024, eq. 6-7). "Coefficient" always includes the
1/j!. Computed by Taylor arithmetic in one pass of f over a `Series`, not by nested forward differentiation, which costs
2^k and is silently wrong through `F.layer_norm` (pytorch#196700).

| symbol | variable |
|---|---|
| f | `f` |
| x, y | `center`, `variate` |
| k | `order` |
| c_j | `Jet.coefficients[j]` |
| J^k f(x)(y) | `Jet.value` |

Cost: about k + 1 evaluations of f, as one evaluation on stacked tensors.

Example:
    >>> jet(torch.exp, torch.zeros(1), torch.ones(1), order=3).value
    tensor([2.6667])
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_jets.calculus.series import Series

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Jet:
    """A truncated Taylor series of a function, along the segment from its center to its variate.

    Attributes:
        coefficients: c_0 .. c_k with c_j = D^j f(x)[v, ..., v] / j!, `[order+1, *out]`.

    Source: arXiv 2410.06024, eq. 6-7.

    Example:
        >>> Jet(torch.tensor([1.0, 1.0, 0.5])).partial_sums
        tensor([1.0000, 2.0000, 2.5000])
    """

    coefficients: Float[Tensor, " terms *out"]

    @property
    def order(self) -> int:
        """The truncation order k."""
        return self.coefficients.shape[0] - 1

    @property
    def partial_sums(self) -> Float[Tensor, " terms *out"]:
        """J^0, ..., J^k of f at the center, evaluated at the variate: `[order+1, *out]`."""
        return self.coefficients.cumsum(0)

    @property
    def value(self) -> Float[Tensor, "*out"]:
        """J^k f(center)(variate), `[*out]`."""
        return self.coefficients.sum(0)

    def __repr__(self) -> str:
        """Order and output shape; the numbers are in `.coefficients`."""
        shape = list(self.coefficients.shape[1:])
        return f"Jet(order={self.order}, out={shape}, dtype={self.coefficients.dtype})"


@torch.no_grad()
def jet(
    f: Callable[[Tensor], Tensor],
    center: Float[Tensor, "*shape"],
    variate: Float[Tensor, "*shape"],
    order: int,
) -> Jet:
    """The jet J^order f(center), evaluated at the variate.

    Args:
        f: any function of one tensor made of PyTorch operations, such as a module; called once. It must not mutate
            plain tensors that it closes over with what it computes from its argument.
        center: where f is expanded, `[*shape]`, float32 or float64, finite.
        variate: where the expansion is evaluated, `[*shape]`, like `center`.
        order: truncation order k >= 0; order 0 is f(center).

    Returns:
        The coefficients c_0 .. c_k, `[order+1, *out]`. If f does not depend on its argument, f's value and zeros.

    Raises:
        TypeError: `order` is not an int, an input is not a plain float32 or float64 tensor, or f gives no tensor.
        ValueError: `order` is negative, or the inputs differ in shape, dtype or device, or are not finite.
        NotImplementedError: f uses an operation that has no Taylor rule.

    Source: arXiv 2410.06024, eq. 6-7.

    Example:
        >>> x, y = torch.tensor([1.0]), torch.tensor([3.0])
        >>> jet(lambda t: t**2, x, y, order=2).coefficients.flatten()
        tensor([1., 4., 4.])
    """
    _check_order(order)
    _check_point(center, "center")
    _check_point(variate, "variate")
    for fact in ("shape", "dtype", "device"):
        if getattr(center, fact) != getattr(variate, fact):
            raise ValueError(
                f"center and variate have one {fact}; got {getattr(center, fact)} and {getattr(variate, fact)}. "
                "Expand, cast or move one of them first."
            )
    for name, point in (("center", center), ("variate", variate)):
        if not torch.isfinite(point).all():
            raise ValueError(f"{name} is finite; it holds NaN or infinity. Find where they arise before expanding.")
    # The argument is a fresh tensor in either case: f may write into it.
    argument = Series.line(center, variate - center, order) if order else center.detach().clone()
    out = f(argument)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"f maps a tensor to a tensor; it returned {type(out).__name__}. "
            "Wrap it, for example lambda x: module(x)[0]."
        )
    if isinstance(out, Series):
        return Jet(out.coefficients)
    coefficients = out.new_zeros((order + 1, *out.shape))
    coefficients[0] = out
    return Jet(coefficients)


def _check_order(order: int) -> None:
    if not isinstance(order, int) or isinstance(order, bool):
        raise TypeError(f"order is an int; got {order!r}. Give 0 for the value at the center, 1 for the tangent.")
    if order < 0:
        raise ValueError(f"order is at least 0; got {order}. Order 0 is the value at the center.")


def _check_point(point: Tensor, name: str) -> None:
    if not isinstance(point, Tensor) or isinstance(point, Series):
        raise TypeError(f"{name} is a plain tensor; got {type(point).__name__}. Jets of jets are not supported.")
    if point.dtype in _HALF:
        raise TypeError(f"jets are computed in float32 or float64; {name} is {point.dtype}. Cast to float32 first.")
    if point.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} is real floating point; got {point.dtype}. Cast to float32 or float64 first.")
