r"""LayerNorm and RMSNorm, and their jets of every order in closed form.

After `Norm.center` (LayerNorm subtracts the mean; RMSNorm and "none" do not), with v = y - x and per position

    a = mean(x^2) + eps,    b = mean(x v),    c = mean(v^2),

the norm at x + t v is (x + t v) / sqrt(a + 2 b t + c t^2), times the weight, plus the bias. The inverse root is the
generating function of the Legendre polynomials, the sum of s_n t^n with

    s_0 = a^(-1/2),    n a s_n = -(2n - 1) b s_{n-1} - (n - 1) c s_{n-2}.

The jet's coefficients are x s_n + v s_{n-1}, and their sum telescopes: for every order k

    J^k norm(x)(y) = alpha_k (weight x) + beta_k (weight y) + bias,    alpha_k = s_k,    beta_k = s_0 + ... + s_{k-1}.

With rho = sqrt(c / a), the coefficient of order n has a root mean square of at most rho^n before the weight: if rho < 1
the series converges at t = 1 with a tail after order k of at most rho^{k+1} / (1 - rho), if rho > 1 it generically
diverges. (NIST Digital Library of Mathematical Functions, 18.12.11; Chen et al., arXiv 2410.06024, eq. 6-7.)

| symbol | variable |
|---|---|
| x, y | `center`, `variate`, after `Norm.center` |
| alpha_k, beta_k | `NormJet.alpha[k]`, `NormJet.beta[k]` |
| s_n | `NormJet.alpha[n]` |
| rho | `NormJet.rho` |
| k | `order` |

Cost: three reductions over d_model, then O(k) operations per position.

Example:
    >>> norm = Norm("RMS", eps=0.0)
    >>> x, y = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    >>> bool((norm_jet(norm, x, y, order=12).value() - norm(y)).abs().max() < 1e-5)
    True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

NormKind = Literal["LN", "RMS", "none"]
CenterScale = Literal["none", "match", "orthogonal"]
CENTER_SCALES: tuple[CenterScale, ...] = get_args(CenterScale)
# The highest order of a jet.
MAX_ORDER = 1000


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm, an RMSNorm or no norm, as a function of the residual stream.

    Args:
        kind: "LN" subtracts the mean over d_model and divides by the root mean square, "RMS" only divides, "none" is
            the identity before weight and bias.
        weight: gain w, `[d_model]`; None is 1. For Gemma pass 1 + w.
        bias: `[d_model]`; None is 0.
        eps: added to the mean square.

    Raises:
        ValueError: `kind` is unknown, or `eps` is negative.

    Example:
        >>> Norm("LN", eps=0.0)(torch.tensor([1.0, 3.0]))
        tensor([-1.,  1.])
    """

    kind: NormKind
    weight: Float[Tensor, " d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        """Validate kind and eps."""
        if self.kind not in get_args(NormKind):
            raise ValueError(
                f"kind is one of {', '.join(get_args(NormKind))}; got {self.kind!r}. "
                "Folded norms (LNPre, RMSPre) are LN and RMS without weight."
            )
        if not self.eps >= 0:
            raise ValueError(f"eps is at least 0; got {self.eps}. Give the model's own, such as 1e-5.")

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Normalize the last axis, then apply weight and bias: `[*batch, d_model]`."""
        x = self.center(x)
        if self.kind != "none":
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.add_bias(self.scale(x))

    def center(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Subtract the mean for "LN"; otherwise return x unchanged: `[*batch, d_model]`."""
        return x - x.mean(-1, keepdim=True) if self.kind == "LN" else x

    def scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Multiply by the weight: `[*batch, d_model]`."""
        return x if self.weight is None else x * self.weight

    def add_bias(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Add the bias: `[*batch, d_model]`."""
        return x if self.bias is None else x + self.bias


@dataclass(frozen=True, eq=False)
class NormJet:
    """Jets of a norm at all orders up to k: J^k = alpha_k (weight center) + beta_k (weight variate) + bias.

    Attributes:
        norm: the norm.
        center: x after `norm.center`, `[*batch, d_model]`.
        variate: y after `norm.center`, `[*batch, d_model]`.
        alpha: coefficient of the center at each order, `[order+1, *batch]`.
        beta: coefficient of the variate at each order, `[order+1, *batch]`.
        rho: rms(y - x) / sqrt(mean(x^2) + eps), `[*batch]`; below 1 the series converges at the variate.
        tail_bound: rho^{k+1} / (1 - rho), infinite where rho >= 1, `[order+1, *batch]`: bounds the root mean square of
            the error after each order, before the weight.
    """

    norm: Norm
    center: Float[Tensor, "*batch d_model"]
    variate: Float[Tensor, "*batch d_model"]
    alpha: Float[Tensor, " terms *batch"]
    beta: Float[Tensor, " terms *batch"]
    rho: Float[Tensor, "*batch"]
    tail_bound: Float[Tensor, " terms *batch"]

    @property
    def order(self) -> int:
        """The highest order k."""
        return self.alpha.shape[0] - 1

    def value(self, order: int | None = None) -> Float[Tensor, "*batch d_model"]:
        """J^order norm(center)(variate), `[*batch, d_model]`; None is the highest order.

        Raises:
            ValueError: `order` was not computed.
        """
        order = self.order if order is None else order
        if not 0 <= order <= self.order:
            raise ValueError(f"order lies in 0 .. {self.order}; got {order}. Call norm_jet with a higher order.")
        mixed = self.alpha[order, ..., None] * self.center
        if order > 0:
            mixed = mixed + self.beta[order, ..., None] * self.variate
        return self.norm.add_bias(self.norm.scale(mixed))

    def coefficients(self) -> Float[Tensor, "terms *batch d_model"]:
        """c_0 .. c_k, `[order+1, *batch, d_model]`; c_0 includes the bias."""
        s = self.alpha[..., None]
        higher = self.norm.scale(self.center * s[1:] + (self.variate - self.center) * s[:-1])
        return torch.cat([self.value(0).unsqueeze(0), higher])

    def __repr__(self) -> str:
        """Kind, order and batch shape."""
        return f"NormJet(kind={self.norm.kind!r}, order={self.order}, batch={list(self.rho.shape)})"


def check_order(order: Any) -> None:
    """Raise TypeError or ValueError unless the order of a jet is an int in 0 .. `MAX_ORDER`."""
    if isinstance(order, bool) or not isinstance(order, int):
        raise TypeError(f"order must be an integer >= 0; got {order!r}. Order 0 is the value at the center.")
    if order < 0:
        raise ValueError(f"order must be an integer >= 0; got {order}. Order 0 is the value at the center.")
    if order > MAX_ORDER:
        raise ValueError(
            f"order must be at most {MAX_ORDER}; got {order}. A series that converges needs a few orders only."
        )


def norm_jet(
    norm: Norm,
    center: Float[Tensor, "*batch d_model"],
    variate: Float[Tensor, "*batch d_model"],
    order: int,
    *,
    dtype: torch.dtype | None = None,
) -> NormJet:
    """Jets of orders 0 to `order` of a norm at `center`, evaluated at `variate`, in closed form.

    Args:
        norm: the norm.
        center: x before the norm, `[*batch, d_model]`.
        variate: y before the norm, `[*batch, d_model]`.
        order: highest order k >= 0.
        dtype: dtype of the result, None is that of `center`; alpha, beta and rho are computed in float64.

    Raises:
        TypeError: `order` is not an int.
        ValueError: `order` is out of range, shapes differ, or eps = 0 and a center is zero after centering.

    Source: arXiv 2410.06024, eq. 6-7; DLMF 18.12.11.

    Example:
        >>> jets = norm_jet(Norm("RMS", eps=0.0), torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), order=1)
        >>> jets.alpha.tolist(), jets.beta.tolist(), jets.rho.item()
        ([1.0, -1.0], [0.0, 1.0], 1.0)
    """
    check_order(order)
    x, y = _centered(norm, center, variate)
    if norm.kind == "none":
        s = x.new_zeros((order + 1, *x.shape[:-1]))
        s[0] = 1
        rho = torch.zeros_like(s[0])
    else:
        v = y - x
        a, b, c = (x * x).mean(-1) + norm.eps, (x * v).mean(-1), (v * v).mean(-1)
        if norm.eps == 0 and (a == 0).any():
            raise ValueError(
                f"a norm with eps = 0 has a jet only where its center is not zero; {int((a == 0).sum())} of "
                f"{a.numel()} centers are zero after centering. Leave them out or give eps > 0."
            )
        s = _inverse_root_series(a, b, c, order)
        rho = (c / a).sqrt()
    dtype = center.dtype if dtype is None else dtype
    beta = torch.cat([torch.zeros_like(s[:1]), s[:-1].cumsum(0)])
    tail_bound = torch.stack([rho ** (k + 1) / (1 - rho) for k in range(order + 1)])
    tail_bound = tail_bound.masked_fill(rho >= 1, torch.inf)
    if norm.kind == "none":
        tail_bound[0] = (y - x).square().mean(-1).sqrt()  # the identity's jet is exact from order 1 on
    return NormJet(norm, *(t.to(dtype) for t in (x, y, s, beta, rho, tail_bound)))


def center_scale(
    norm: Norm,
    center: Float[Tensor, "*batch d_model"],
    variate: Float[Tensor, "*batch d_model"],
    mode: CenterScale,
    *,
    obtuse: Literal["match", "raise"] = "match",
) -> Float[Tensor, "*batch"]:
    """Positive factors that rescale centers so that the norm's series converges, or converges faster.

    With theta the angle between x and y after `norm.center`:

    - "none": 1, the paper's center.
    - "match": |y| / |x|; rho = 2 sin(theta / 2).
    - "orthogonal": |y|^2 / (x.y), so that y - x is orthogonal to y; rho = sin(theta), below 1 for every acute angle.

    If theta >= 90 degrees, no positive factor makes the series converge. The factor of a zero center is 1.

    Args:
        norm: the norm.
        center: x before the norm, `[*batch, d_model]`.
        variate: y before the norm, `[*batch, d_model]`.
        mode: which factor.
        obtuse: where x.y <= 0 under "orthogonal": "match" uses the factor of mode "match", "raise" refuses.

    Returns:
        One finite factor >= 0 per position, `[*batch]`, in the dtype of `center`; computed in float64.

    Raises:
        ValueError: `mode` or `obtuse` is unknown, shapes differ, or an angle is obtuse under `obtuse="raise"`.

    Example:
        >>> x, y = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
        >>> center_scale(Norm("RMS"), x, y, "orthogonal").item()
        2.0
    """
    if mode not in CENTER_SCALES:
        raise ValueError(f"mode is one of {', '.join(CENTER_SCALES)}; got {mode!r}. The paper's is 'none'.")
    if obtuse not in ("match", "raise"):
        raise ValueError(f"obtuse is 'match' or 'raise'; got {obtuse!r}. 'match' is the default.")
    x, y = _centered(norm, center, variate)
    factor = torch.ones_like(x[..., 0])
    if mode != "none":
        length = x.norm(dim=-1)
        somewhere = length > 0
        factor = torch.where(somewhere, y.norm(dim=-1) / length.masked_fill(~somewhere, 1), factor)
    if mode == "orthogonal":
        overlap = (x * y).sum(-1)
        acute = overlap > 0
        if obtuse == "raise" and (somewhere & ~acute).any():
            raise ValueError(
                f"an orthogonal center needs an acute angle to its variate; {int((somewhere & ~acute).sum())} of "
                f"{acute.numel()} have x.y <= 0. Use mode='match', or obtuse='match' for those alone."
            )
        factor = torch.where(acute, (y * y).sum(-1) / overlap.masked_fill(~acute, 1), factor)
    return factor.to(center.dtype)


def rescaled(
    norm: Norm, centers: Float[Tensor, "*many d_model"], variate: Float[Tensor, "*#many d_model"], mode: CenterScale
) -> Float[Tensor, "*many d_model"]:
    """Centers times their `center_scale` toward a variate."""
    if mode == "none":
        return centers
    return centers * center_scale(norm, centers, variate.expand_as(centers), mode)[..., None]


def _centered(norm: Norm, center: Tensor, variate: Tensor) -> tuple[Tensor, Tensor]:
    """Both points in float64, after `norm.center`."""
    if center.shape != variate.shape:
        raise ValueError(
            f"center and variate have one shape; got {list(center.shape)} and {list(variate.shape)}. "
            "Expand one of them first."
        )
    return norm.center(center.double()), norm.center(variate.double())


def _inverse_root_series(a: Tensor, b: Tensor, c: Tensor, order: int) -> Tensor:
    """s_0 .. s_order of (a + 2 b t + c t^2)^(-1/2): `[order+1, *batch]`."""
    s = [a.rsqrt()]
    for n in range(1, order + 1):
        s_n = -(2 * n - 1) * b * s[n - 1]
        if n > 1:
            s_n = s_n - (n - 1) * c * s[n - 2]
        s.append(s_n / (n * a))
    return torch.stack(s)
