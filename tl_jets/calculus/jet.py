r"""The jet of a tensor function: its truncated Taylor series at a center, evaluated at a variate.

For center x, variate y and v = y - x (Chen et al., *Jet Expansions of Residual Computation*, arXiv 2410.06024, eq. 6-7),

    c_j = D^j f(x)[v, ..., v] / j!,    J^k f(x)(y) = c_0 + ... + c_k.

"Coefficient" always includes the 1/j!. All coefficients come from one pass of f over a `Series`. Nested forward
differentiation would cost 2^k and is silently wrong through `F.layer_norm` (pytorch#196700).

| symbol | variable |
|---|---|
| f | `f` |
| x, y | `center`, `variate` |
| k | `order` |
| c_j | `Jet.coefficients[j]` |
| J^k f(x)(y) | `Jet.value` |

Cost: about k + 1 evaluations of f, batched as one, and one more to check c_0.

Example:
    >>> jet(torch.exp, torch.zeros(1), torch.ones(1), order=3).value
    tensor([2.6667])
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tl_jets.calculus.modes import refuse_autocast
from tl_jets.calculus.norms import check_order
from tl_jets.calculus.series import Series


@dataclass(frozen=True, eq=False)
class Jet:
    """Truncated Taylor series of a function along the segment from its center to its variate.

    Attributes:
        coefficients: c_0 .. c_k with c_j = D^j f(x)[v, ..., v] / j!, `[order+1, *out]`.
    """

    coefficients: Float[Tensor, " terms *out"]

    @property
    def order(self) -> int:
        """The truncation order k."""
        return self.coefficients.shape[0] - 1

    @property
    def partial_sums(self) -> Float[Tensor, " terms *out"]:
        """J^0, ..., J^k of f, `[order+1, *out]`."""
        return self.coefficients.cumsum(0)

    @property
    def value(self) -> Float[Tensor, "*out"]:
        """J^k f(center)(variate), `[*out]`."""
        return self.coefficients.sum(0)

    def __repr__(self) -> str:
        """Order, output shape and dtype."""
        shape = list(self.coefficients.shape[1:])
        return f"Jet(order={self.order}, out={shape}, dtype={self.coefficients.dtype})"


@torch.no_grad()
def jet(
    f: Callable[[Tensor], Tensor],
    center: Float[Tensor, "*shape"],
    variate: Float[Tensor, "*shape"],
    order: int,
) -> Jet:
    """The jet J^order f(center), evaluated at the variate (arXiv 2410.06024, eq. 6-7).

    Args:
        f: a function of one tensor made of PyTorch operations that have Taylor rules, such as a module. Called once at
            order 0 and twice above; must be deterministic, and must not write results into plain tensors that it holds.
        center: expansion point, `[*shape]`, float32 or float64, finite.
        variate: evaluation point, `[*shape]`, of the dtype and device of `center`.
        order: truncation order k >= 0; order 0 is f(center).

    Returns:
        The coefficients c_0 .. c_k, `[order+1, *out]`. If f does not depend on its argument, f's value and zeros.

    Raises:
        TypeError: `order` is not an int, an input is not a plain float32 or float64 tensor, f returns no tensor or writes to one.
        ValueError: `order` is out of range, the inputs do not match, values are not finite, f is random, or autocast is active.
        NotImplementedError: f uses an operation that has no Taylor rule.

    Example:
        >>> x, y = torch.tensor([1.0]), torch.tensor([3.0])
        >>> jet(lambda t: t**2, x, y, order=2).coefficients.flatten()
        tensor([1., 4., 4.])
    """
    check_order(order)
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
    refuse_autocast(center.device)
    # Always pass a new tensor: f may write into it.
    argument = Series.line(center, variate - center, order) if order else center.detach().clone()
    out = f(argument)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"f maps a tensor to a tensor; it returned {type(out).__name__}. "
            "Wrap it, for example lambda x: module(x)[0]."
        )
    if isinstance(out, Series):
        coefficients = out.coefficients
    else:
        coefficients = out.new_zeros((order + 1, *out.shape))
        coefficients[0] = out
    if not torch.isfinite(coefficients).all():
        _refuse_what_is_not_finite(f, coefficients, center, variate - center)
    if order:
        _check_value(coefficients[0], f(center.detach().clone()), center)
    return Jet(coefficients)


def _check_value(found: Tensor, expected: Tensor, center: Tensor) -> None:
    """Compare c_0 with f(center), up to sqrt(eps) of the largest value and 100 eps of the center."""
    if found.shape == expected.shape:
        scale = expected.abs().amax().item() if expected.numel() else 0.0
        precision = max(torch.finfo(x.dtype).eps for x in (found, expected) if x.is_floating_point())
        largest = (found - expected).abs().amax().item() if expected.numel() else 0.0
        inside = max(center.abs().amax().item(), 1.0) if center.numel() else 1.0
        if largest <= precision**0.5 * scale + 100 * precision * inside:
            return
        what = f"they differ by {largest:.3g}, where f(center) is at most {scale:.3g}"
    else:
        what = f"they have shapes {list(found.shape)} and {list(expected.shape)}"
    raise ValueError(
        f"c_0 is f(center); {what}. If f is random (dropout) or keeps a state, call eval() or pass a function that gives "
        "the same twice; if it is neither, one of its operations has a wrong Taylor rule: please report it."
    )


def _refuse_what_is_not_finite(
    f: Callable[[Tensor], Tensor], coefficients: Tensor, center: Tensor, direction: Tensor
) -> None:
    order = coefficients.shape[0] - 1
    first = next(n for n in range(order + 1) if not torch.isfinite(coefficients[n]).all())
    with _FirstNotFinite() as watch:
        f(Series.line(center, direction, order))
    where = f" It arises first in {watch.name}." if watch.name else ""
    raise ValueError(
        f"the coefficients of a jet are finite; order {first} is not.{where} Move the center off the point where f has "
        "no finite value or derivative (sqrt at 0, log at 0), or lower the order."
    )


class _FirstNotFinite(TorchDispatchMode):
    """Record the first operation with finite arguments and a non-finite result."""

    name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        known = self.name is not None or not _is_finite((args, kwargs))
        out = func(*args, **kwargs or {})
        if not known and not _is_finite(out):
            self.name = str(func)
        return out


def _is_finite(items: Any) -> bool:
    series = (item for item in tree_leaves(items) if isinstance(item, Series))
    return all(bool(torch.isfinite(item.coefficients).all()) for item in series)


def _check_point(point: Tensor, name: str) -> None:
    if not isinstance(point, Tensor) or isinstance(point, Series):
        raise TypeError(f"{name} is a plain tensor; got {type(point).__name__}. Jets of jets are not supported.")
    if point.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"jets are computed in float32 or float64; got {point.dtype} as {name}. Cast it first.")
